#define CE_ELEMENT double
#include "tile_kernels_of.h"
