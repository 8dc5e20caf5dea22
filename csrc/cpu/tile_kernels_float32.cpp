#define CE_ELEMENT float
#include "tile_kernels_of.h"
