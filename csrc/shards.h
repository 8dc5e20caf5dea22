// The results of a row whose classes lie in shards, on every backend alike.
#pragma once

#include "kernels.h"
#include "row_loss.h"

namespace ce {

// Merges them in their order, and writes what comes of it.
template <typename A>
CE_HOST_DEVICE void merge_row(const Shards& s, int64_t row) {
  RowState<A> state;
  const A* of_shard = static_cast<const A*>(s.states) + row;
  for (int64_t shard = 0; shard < s.shards; ++shard, of_shard += 4 * s.rows) {
    state = state.merge({{of_shard[0], of_shard[s.rows]}, of_shard[2 * s.rows], of_shard[3 * s.rows]});
  }
  static_cast<A*>(s.loss)[row] = state.loss(static_cast<A>(s.z_loss));
  static_cast<A*>(s.max)[row] = state.exps.max;
  static_cast<A*>(s.sum)[row] = state.exps.sum;
  static_cast<A*>(s.coefficients)[row] = state.coefficients;
}

}  // namespace ce
