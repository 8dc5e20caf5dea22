// The kernels of tile.h for one element type, CE_ELEMENT. Each type has a file of its own, so that they are compiled
// side by side.

#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "tile.h"

#define CE_ISA_FILE "tile_kernels.h"
#include "foreach_isa.h"

namespace ce::cpu {

template <typename T>
const TileKernels<T>& tile_kernels() {
  return CE_PICK_ISA(kTileKernels<T>);
}

template const TileKernels<CE_ELEMENT>& tile_kernels<CE_ELEMENT>();

}  // namespace ce::cpu
