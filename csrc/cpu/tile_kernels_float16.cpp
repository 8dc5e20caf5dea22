#define CE_ELEMENT Float16
#include "tile_kernels_of.h"
