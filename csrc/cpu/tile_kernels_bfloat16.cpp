#define CE_ELEMENT BFloat16
#include "tile_kernels_of.h"
