#include "forward.h"

#include <memory>
#include <optional>

namespace ce::cpu {
namespace {

// What only some calls ask of a tile's rows.
struct TileDetails {
  Moment<double> moments[kMaxLanes];
  RowPlace<double> places[kMaxLanes];
  double target_logits[kMaxLanes] = {};

  void clear(int rows) {
    std::fill(moments, moments + rows, Moment<double>());
    std::fill(places, places + rows, RowPlace<double>());
    std::fill(target_logits, target_logits + rows, 0.0);
  }

  // As states `mine` are merged with `others`, of which `other` are the details.
  void merge(const TileDetails& other, const TileStates& mine, const TileStates& others, int rows) {
    for (int lane = 0; lane < rows; ++lane) {
      moments[lane] = moments[lane].merge(mine.exps(lane), other.moments[lane], others.exps(lane));
      places[lane] = places[lane].merge(other.places[lane]);
      target_logits[lane] += other.target_logits[lane];
    }
  }
};

// Whether to keep a row's exponentials for its gradient is faster than to compute them again. That is for the shape to
// tell alone, so that the bits depend on nothing else. Half types are bound by arithmetic and gain most; only where a
// row could not be streamed as a whole they lose. In float32 it is faster as long as everything stays in the caches.
// With a softcap there is so much to compute again that it always is.
template <typename T>
bool keeps_exps(const Problem& p) {
  const int64_t row_bytes = p.classes * sizeof(T);
  const bool is_short = p.classes <= 1 << 18;
  return p.softcap > 0    ? is_short
         : sizeof(T) == 2 ? is_short && (row_bytes < kStreamedRow || row_bytes % 64 == 0)
                          : p.classes <= 1 << 12 && p.rows * row_bytes <= 1 << 23;
}

// Whether the exponentials can be kept with a softcap's slope: all that is to be multiplied with it, and in its range.
bool keeps_slope(const Problem& p) {
  return p.softcap == 0 || (!has_coefficients(p) && p.softcap > 1e-3 && p.softcap < 1e6);
}

// The exponentials of some tiles at a time, where they are kept; the kernels that compute an entropy do not.
template <typename T>
class KeptExps {
 public:
  using A = Acc<T>;

  KeptExps(const Problem& p, const Tiling& tiling, int lanes, int64_t tiles) {
    if (p.grad.data && !p.entropy && tiling.along && p.logits.class_stride == 1 && p.grad.class_stride == 1 &&
        keeps_slope(p) && keeps_exps<T>(p)) {
      references_ = p.classes;
      size_ = references_ + p.classes / (kGroup * lanes) + 1;
      memory_.reset(new A[tiles * size_]);
    }
  }

  Exps<A> of(int64_t tile) const {
    A* const values = memory_.get() + tile * size_;
    return memory_ ? Exps<A>{values, values + references_} : Exps<A>();
  }

 private:
  int64_t references_ = 0, size_ = 0;
  std::unique_ptr<A[]> memory_;
};

const TileDetails kNoDetails;

template <typename A, typename Value>
void write_rows(void* results, const Tile& tile, const RowOffsets& offsets, const Value* values) {
  for (int lane = 0; results && lane < tile.rows; ++lane) {
    write_row<A>(results, offsets.of(lane), values[lane]);
  }
}

// Whether there is more to a call than what torch's loss of indices needs.
bool asks_for_more(const Problem& p) {
  return has_stats(p) || p.lse || p.linear || p.picks > 0 || p.z_loss != 0;
}

// `kMore` is asks_for_more(): the others shall not pay for it with each row.
template <typename Element, bool kMore>
struct LossPass {
  using T = Element;
  using A = Acc<T>;
  using Gradient = TileGradient<A>;
  struct Rows {
    TileStates states;
    std::optional<TileDetails> details;

    Rows() { states.clear(); }
  };

  const Problem& p;
  const TileKernels<T>& kernels;
  const Tiling tiling;
  const Upstream<A> upstream;
  const bool has_details;  // only if kMore
  Accumulate<A>* const accumulate_classes;
  WriteGradient<A>* const write_gradient_of_classes;

  explicit LossPass(const Problem& problem)
      : p(problem),
        kernels(tile_kernels<T>()),
        tiling(problem, kernels.lanes),
        upstream(problem),
        has_details(has_stats(p)),
        accumulate_classes(kernels.accumulate(p, tiling.along)),
        write_gradient_of_classes(kernels.gradient(p, tiling.along)) {}

  KeptExps<T> keep(int64_t tiles) const { return KeptExps<T>(p, tiling, kernels.lanes, tiles); }

  // A tile of ignored rows is read only for what does not depend on the targets.
  bool is_read(const TileTargets<A>& targets) const { return targets.any_kept || (kMore && reads_ignored_rows(p)); }

  void accumulate(const Tile& tile, const TileTargets<A>& targets, int64_t piece, Exps<A> exps, Rows& rows) const {
    const int64_t begin = piece * kPiece, end = std::min(p.classes, begin + kPiece);
    if (kMore && has_details && !rows.details) {
      rows.details.emplace();
    } else if (kMore && has_details && piece == 0) {
      rows.details->clear(tile.rows);
    }
    accumulate_classes(p, tile, targets, begin, end, exps, rows.states,
                       kMore && p.entropy ? rows.details->moments : nullptr);
    if (kMore && (p.log_prob || p.argmax || p.rank)) {
      kernels.place(p, tiling.along, tile, targets, begin, end, rows.details->places, rows.details->target_logits);
    }
  }

  void merge(Rows& into, const Rows& more, int rows) const {
    if (kMore && into.details && more.details) {
      into.details->merge(*more.details, into.states, more.states, rows);
    }
    for (int lane = 0; lane < rows; ++lane) {
      into.states.set(lane, into.states.get(lane).merge(more.states.get(lane)));
    }
  }

  void write_gradient(const Tile& tile, const TileTargets<A>& targets, const Gradient& gradient, int64_t piece,
                      Exps<A> exps) const {
    const int64_t begin = piece * kPiece;
    write_gradient_of_classes(p, tile, targets, gradient, begin, std::min(p.classes, begin + kPiece), exps);
  }

  void write_details(int lane, int64_t offset, bool kept, const RowState<double>& state, double log_sum,
                     const TileDetails& details) const {
    const double of_target = details.target_logits[lane];
    write_row<A>(p.log_prob, offset, kept ? log_probability(state.exps, of_target, log_sum) : 0);
    write_row<A>(p.entropy, offset, details.moments[lane].entropy(state.exps, log_sum));
    write_row<int64_t>(p.argmax, offset, details.places[lane].argmax);
    write_row<int64_t>(p.rank, offset, kept ? details.places[lane].rank : -1);
  }

  // Adds the picks' part to what their rows have.
  void complete(const Tile& tile, const TileTargets<A>& targets, Rows& rows) const {
    for (int lane = 0; lane < tile.rows; ++lane) {
      if (targets.kept[lane]) {
        rows.states.set(lane, Picks<A>(p, tile.row + lane).row.complete(rows.states.get(lane)));
      }
    }
  }

  // The logarithms of the rows' sums.
  void find_log_sums(const Tile& tile, const TileTargets<A>& targets, const TileStates& states,
                     double* log_sums) const {
    if (tile.rows == 1) {  // a vector costs more than one logarithm
      log_sums[0] = kMore || targets.kept[0] ? states.exps(0).log_sum() : 0;
      return;
    }
    std::copy(states.sum, states.sum + kMaxLanes, log_sums);
    kernels.take_logs(log_sums, tile.rows);
  }

  void write_more(const Tile& tile, const TileTargets<A>& targets, const RowOffsets& offsets, const Rows& rows,
                  const double* log_sums) const {
    for (int lane = 0; lane < tile.rows; ++lane) {
      const int64_t offset = offsets.of(lane);
      const RowState<double> state = rows.states.get(lane);
      if (p.linear) {
        write_row<A>(p.linear, offset, state.linear);
        write_row<A>(p.coefficients, offset, state.coefficients);
      }
      if (p.lse) {
        write_row<A>(p.lse, offset, state.exps.lse(log_sums[lane]));
      }
      if (has_details) {
        write_details(lane, offset, targets.kept[lane], state, log_sums[lane],
                      rows.details ? *rows.details : kNoDetails);
      }
    }
  }

  void prepare_gradient(const Tile& tile, const TileTargets<A>& targets, const TileStates& states, const A* upstreams,
                        Gradient& gradient) const {
    for (int lane = 0; lane < tile.rows; ++lane) {
      const RowState<double> state = states.get(lane);
      RowGradient<A> of_row = make_row_gradient<A>({A(state.exps.max), A(state.exps.sum)}, A(state.coefficients),
                                                   A(p.z_loss), {upstreams[lane]});
      if (kMore && p.picks > 0 && targets.kept[lane]) {
        of_row = Picks<A>(p, tile.row + lane).row.gradient_of_others(of_row);
      }
      gradient.set(lane, of_row);
    }
  }

  // Writes the rows' results and prepares their gradient.
  Gradient finish(const Tile& tile, const TileTargets<A>& targets, Rows& rows) const {
    const RowOffsets offsets(p, tile, p.row_strides);
    const TileStates& states = rows.states;
    A losses[kMaxLanes], upstreams[kMaxLanes];
    Gradient gradient(tile, tiling.lanes);
    for (int lane = 0; p.grad.data && lane < tile.rows; ++lane) {
      upstreams[lane] = upstream.of(tile.row + lane);
    }
    if (!kMore && tile.rows > 1) {
      kernels.finish_rows(targets, states, p.grad.data ? upstreams : nullptr, losses, gradient);
    } else {
      if (kMore && p.picks > 0) {
        complete(tile, targets, rows);
      }
      double log_sums[kMaxLanes];
      find_log_sums(tile, targets, states, log_sums);
      for (int lane = 0; lane < tile.rows; ++lane) {
        losses[lane] = targets.kept[lane] ? A(states.get(lane).loss(p.z_loss, log_sums[lane])) : A(0);
      }
      if (kMore) {
        write_more(tile, targets, offsets, rows, log_sums);
      }
      if (p.grad.data) {
        prepare_gradient(tile, targets, states, upstreams, gradient);
      }
    }
    write_rows<A>(p.loss, tile, offsets, losses);
    write_rows<A>(p.max, tile, offsets, states.max);
    write_rows<A>(p.sum, tile, offsets, states.sum);
    return gradient;
  }
};

}  // namespace

void forward(const Problem& p) {
  if (p.target_type == TargetType::kTeacher) {
    diverge(p);
    return;
  }
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.picks > 0) {
      for_each_picked_row<Acc<T>>(p, [&](int64_t row) { tile_kernels<T>().gather_picks(p, row); });
    }
    asks_for_more(p) ? run_forward(LossPass<T, true>(p)) : run_forward(LossPass<T, false>(p));
    if (p.picks > 0 && p.grad.data) {
      write_picks(p);
    }
  });
}

}  // namespace ce::cpu
