#include "../picks.h"
#include "row_blocks.h"

namespace ce::cpu {
namespace {

// The first row whose index is out of bounds.
TargetSummary find_bad_index(const Problem& p, int64_t begin, int64_t end) {
  TargetSummary summary;
  for_each_row(p, p.target.strides, begin, end, [&](int64_t row, int64_t offset) {
    const int64_t target = read_index(p, offset);
    if (summary.bad_row < 0 && target != p.ignore_index && is_out_of_bounds(p, target)) {
      summary.bad_row = row;
      summary.bad_target = target;
    }
  });
  return summary;
}

template <typename A, bool kWeighted>
TargetSummary summarize_indices(const Problem& p, int64_t begin, int64_t end) {
  const A* weights = static_cast<const A*>(p.weight);
  TargetSummary summary;
  bool is_any_bad = false;
  int64_t kept = 0;
  for_each_row(p, p.target.strides, begin, end, [&](int64_t row, int64_t offset) {
    const int64_t target = read_index(p, offset);
    const bool is_kept = target != p.ignore_index, is_bad = is_kept & is_out_of_bounds(p, target);
    const int64_t own = is_bad ? -1 : own_class(p, target);
    is_any_bad |= is_bad;
    if constexpr (kWeighted) {
      if (is_kept) {
        const double weight = own < 0 ? 0.0 : weights ? double(weights[own]) : 1.0;
        summary.weight += weight * row_value<A>(p, p.row_weight, row, 1);
      }
    } else {
      kept += is_kept & (own >= 0);
    }
  });
  summary.weight += kept;
  return is_any_bad ? find_bad_index(p, begin, end) : summary;
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
  TargetSummary total;
  const auto summarize = p.dtype == DType::kFloat64 ? summarize_block<double> : summarize_block<float>;
  for (const TargetSummary& block : for_each_block(p, summarize)) {
    if (block.bad_row >= 0) {
      return block;
    }
    total.weight += block.weight;
  }
  return total;
}

}  // namespace ce::cpu
