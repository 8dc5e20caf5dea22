#include <cmath>
#include <cstdint>
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

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();
template const TileKernels<Float16>& tile_kernels<Float16>();
template const TileKernels<BFloat16>& tile_kernels<BFloat16>();

}  // namespace ce::cpu
