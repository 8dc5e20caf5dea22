// Targets that pick some classes of a row: what comes before and after the passes over all classes, a warp for each
// row.

#include "../picks.h"
#include "reduce.cuh"
#include "target.cuh"

namespace ce::cuda {
namespace {

constexpr int kPickThreads = 128;
constexpr int kPickRows = kPickThreads / kWarp;  // of a block

CE_DEVICE int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kPickRows + threadIdx.x / kWarp;
}

template <typename T>
__global__ void __launch_bounds__(kPickThreads) gather_rows(const __grid_constant__ Problem p) {
  using A = Acc<T>;
  const int64_t row = row_of_warp();
  if (row >= p.rows || !counts<A>(p, row)) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const Picks<A> picks(p, row);
  const LogitTransform<A> transform = transform_of<A>(p);
  const T* const logits = static_cast<const T*>(p.logits.data) + row_offset(p, row, p.logits.strides);
  const int64_t offset = row_offset(p, row, p.row_strides);
  A mass = 0, negative_entropies = 0;
  for (int64_t j = lane; j < p.picks; j += kWarp) {
    const A q = picks.probability(j);
    mass += q;
    negative_entropies += PickedRow<A>::negative_entropy(q);
  }
  mass = sum_of_lanes(mass, kWarp);
  negative_entropies = sum_of_lanes(negative_entropies, kWarp);
  PickedRow<A> result(mass, negative_entropies, p.picks, p.classes, p.spreads, p.kappa != 0);
  bool is_bad = false;
  for (int64_t j = lane; j < p.picks; j += kWarp) {
    if (picks.is_out_of_bounds(j)) {
      is_bad = true;
      if (p.bad_target) {
        report(p.bad_target, offset, picks.index(j));
      }
      continue;
    }
    const A z = apply(transform, A(to_accumulator(logits[picks.index(j) * p.logits.class_stride])));
    picks.logits[j] = z;
    picks.coefficients[j] = result.add(picks.probability(j), z);
  }
  is_bad = __any_sync(kAllLanes, is_bad);
  result.state = sum_of_lanes<true>(result.state, kWarp);
  if (is_bad) {
    result.state.linear = result.state.coefficients = NAN;
  }
  if (lane == 0) {
    picks.row = result;
  }
}

template <typename T>
__global__ void __launch_bounds__(kPickThreads, kBlocks<T, 2>) write_rows(const __grid_constant__ Problem p) {
  using A = Acc<T>;
  const int64_t row = row_of_warp();
  if (row >= p.rows || !counts<A>(p, row)) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const Picks<A> picks(p, row);
  const A coefficients = picks.row.coefficients(p.classes), background = picks.row.background;
  if (coefficients != coefficients) {
    return;  // a pick is out of bounds, and the gradient is NaN
  }
  T* const grad = static_cast<T*>(p.grad.data) + row_offset(p, row, p.grad.strides);
  for (int64_t j = lane; j < p.picks; j += kWarp) {
    PickTag<T>::write(place_of(picks, grad, j), j);
  }
  __syncwarp();
  bool is_repeated = false;
  for (int64_t j = lane; j < p.picks; j += kWarp) {
    is_repeated |= tag_of(picks, grad, j) != j;
  }
  if (__any_sync(kAllLanes, is_repeated) && lane == 0) {
    merge_repeated(picks, grad);
  }
  __syncwarp();
  const LogitTransform<A> transform = transform_of<A>(p);
  const RowGradient<A> gradient =
      make_row_gradient<A>(exps_of<A>(p, row), coefficients, A(p.z_loss), {upstream_of<A>(p, row)});
  for (int64_t j = lane; j < p.picks; j += kWarp) {
    const A z = picks.logits[j], exp = exponential(z - gradient.max);
    const A element = gradient.element(exp, picks.coefficients[j] + background, gradient.scale, gradient.upstream);
    const A slope = transform.cap > 0 ? transform.scale * transform.slope(z) : transform.scale;
    from_accumulator(element * slope, *place_of(picks, grad, j));
  }
}

Grid grid_of(const Problem& p) {
  return {(p.rows + kPickRows - 1) / kPickRows, kPickThreads};
}

}  // namespace

void gather_picks(const Problem& p, Stream stream) {
  dispatch(p.dtype, [&](auto element) { launch(gather_rows<decltype(element)>, grid_of(p), stream, p); });
}

void write_picks(const Problem& p, Stream stream) {
  dispatch(p.dtype, [&](auto element) { launch(write_rows<decltype(element)>, grid_of(p), stream, p); });
}

}  // namespace ce::cuda
