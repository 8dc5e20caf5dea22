#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>

#include "tile.h"

namespace ce::cpu {
namespace {

constexpr int64_t kBlock = 1 << 14;  // rows; fixed, so that the sums do not depend on the number of threads

template <typename A, bool kWeighted>
TargetSummary summarize_indices(const Problem& p, int64_t begin, int64_t end) {
  const A* weights = static_cast<const A*>(p.weight);
  TargetSummary summary;
  int64_t kept = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = read_target(p, row);
    if (target == p.ignore_index) {
      continue;
    }
    if (is_out_of_bounds(p, target)) {
      summary.bad_row = row;
      summary.bad_target = target;
      return summary;
    }
    const int64_t own = own_class(p, target);
    if constexpr (kWeighted) {
      const double weight = own < 0 ? 0.0 : weights ? double(weights[own]) : 1.0;
      summary.weight += weight * row_value<A>(p, p.row_weight, row, 1);
    } else {
      kept += own >= 0;
    }
  }
  summary.weight += kept;
  return summary;
}

template <typename A>
TargetSummary summarize_picks(const Problem& p, int64_t begin, int64_t end) {
  TargetSummary summary;
  for (int64_t row = begin; row < end; ++row) {
    const Picks<A> picks(p, row);
    for (int64_t j = 0; j < p.picks && counts<A>(p, row); ++j) {
      if (picks.is_out_of_bounds(j)) {
        summary.bad_row = row;
        summary.bad_target = picks.index(j);
        return summary;
      }
    }
    summary.weight += row_value<A>(p, p.row_weight, row, 1);
  }
  return summary;
}

template <typename A>
TargetSummary summarize_block(const Problem& p, int64_t begin, int64_t end) {
  if (p.picks > 0) {
    return summarize_picks<A>(p, begin, end);
  }
  if (has_indices(p)) {
    return (p.weight || p.row_weight.data ? summarize_indices<A, true> : summarize_indices<A, false>)(p, begin, end);
  }
  TargetSummary summary;
  for (int64_t row = begin; row < end; ++row) {
    summary.weight += row_value<A>(p, p.row_weight, row, 1);
  }
  return summary;
}

}  // namespace

TargetSummary summarize_targets(const Problem& p) {
  const auto summarize = p.dtype == DType::kFloat64 ? summarize_block<double> : summarize_block<float>;
  if (p.rows <= kBlock) {
    return summarize(p, 0, p.rows);
  }
  std::vector<TargetSummary> blocks((p.rows + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      blocks[i] = summarize(p, i * kBlock, std::min(p.rows, (i + 1) * kBlock));
    }
  });
  TargetSummary total;
  for (const TargetSummary& block : blocks) {
    if (block.bad_row >= 0) {
      return block;
    }
    total.weight += block.weight;
  }
  return total;
}

}  // namespace ce::cpu
