#include <algorithm>

#include <ATen/Parallel.h>

#include "tile.h"

namespace ce::cpu {

void scale(DType dtype, void* data, int64_t count, const void* factor) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const auto scalar = *static_cast<const Acc<T>*>(factor);
    if (scalar == 1) {
      return;
    }
    const auto& kernels = tile_kernels<T>();
    at::parallel_for(0, count, kSerial, [&](int64_t begin, int64_t end) {
      kernels.scale(static_cast<T*>(data) + begin, end - begin, scalar);
    });
  });
}

}  // namespace ce::cpu
