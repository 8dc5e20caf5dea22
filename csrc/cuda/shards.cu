// The results of rows whose classes lie in shards.

#include "launch.cuh"

namespace ce::cuda {
namespace {

constexpr int kMergeThreads = 256;

template <typename A>
__global__ void __launch_bounds__(kMergeThreads) merge_rows(const __grid_constant__ Shards s) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (row >= s.rows) {
    return;
  }
  const RowState<A> state = merge_states(static_cast<const A*>(s.states) + row, s.shards, s.rows);
  static_cast<A*>(s.loss)[row] = state.loss(static_cast<A>(s.z_loss));
  static_cast<A*>(s.max)[row] = state.exps.max;
  static_cast<A*>(s.sum)[row] = state.exps.sum;
  static_cast<A*>(s.coefficients)[row] = state.coefficients;
}

}  // namespace

void merge_shards(const Shards& s, Stream stream) {
  const Grid grid{(s.rows + kMergeThreads - 1) / kMergeThreads, kMergeThreads};
  s.is_double ? launch(merge_rows<double>, grid, stream, s) : launch(merge_rows<float>, grid, stream, s);
}

}  // namespace ce::cuda
