// Sums over rows: the loss, and the class weights that a mean divides by.
#pragma once

#include "reduce.cuh"
#include "target.cuh"

namespace ce::cuda {

CE_DEVICE void add(RowSums& to, const RowSums& sums) {
  to.loss += sums.loss;
  to.weight += sums.weight;
}

CE_DEVICE RowSums sum_in_warp(RowSums sums) {
  return {sum_of_lanes(sums.loss, kWarp), sum_of_lanes(sums.weight, kWarp)};
}

// What a row of this weight has of the mean's divisor. `target` is what index_of() has read.
template <typename A, typename P>
CE_DEVICE A weight_of_row(const P& p, A row_weight, int64_t target) {
  if (!has_indices(p)) {
    return row_weight;
  }
  return judge(p, target) == Verdict::kKept ? row_weight * weight_of_target<A>(p, target) : A(0);
}

// Writes the results of sums over all rows: the divisor, if they have the `weights`, and the total of the losses.
template <typename A>
CE_DEVICE void write_sums(const Problem& p, const RowSums& sums, bool losses, bool weights) {
  A* const divisor = Workspace(p.workspace).template divisor<A>();
  if (weights) {
    *divisor = static_cast<A>(divisor_of_mean(sums.weight, p));
  }
  if (losses) {
    const bool is_known = !p.divides_by_weight && !p.divisor.data;  // to more digits than A may have
    store_from_double(sums.loss / (is_known ? p.divisor.value : double(divisor_of<A>(p))), p.total, p.total_type);
  }
}

}  // namespace ce::cuda
