// The results of rows whose classes lie in shards.

#include "../shards.h"
#include "launch.cuh"

namespace ce::cuda {
namespace {

constexpr int kMergeThreads = 256;

template <typename A>
__global__ void __launch_bounds__(kMergeThreads) merge_rows(const __grid_constant__ Shards s) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (row < s.rows) {
    merge_row<A>(s, row);
  }
}

}  // namespace

void merge_shards(const Shards& s, Stream stream) {
  const Grid grid{(s.rows + kMergeThreads - 1) / kMergeThreads, kMergeThreads};
  s.is_double ? launch(merge_rows<double>, grid, stream, s) : launch(merge_rows<float>, grid, stream, s);
}

}  // namespace ce::cuda
