#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/Parallel.h>

#include "tile.h"

namespace ce::cpu {
namespace {

template <typename Result, typename Value>
void write_row(void* results, int64_t offset, Value value) {
  if (results) {
    static_cast<Result*>(results)[offset] = static_cast<Result>(value);
  }
}

// What only some calls ask of a tile's rows.
struct TileDetails {
  Moment<double> moments[kMaxLanes];
  RowPlace<double> places[kMaxLanes];
  double target_logits[kMaxLanes] = {};

  // As states `mine` are merged with `others`, of which `other` are the details.
  void merge(const TileDetails& other, const RowState<double>* mine, const RowState<double>* others, int rows) {
    for (int lane = 0; lane < rows; ++lane) {
      moments[lane] = moments[lane].merge(mine[lane].exps, other.moments[lane], others[lane].exps);
      places[lane] = places[lane].merge(other.places[lane]);
      target_logits[lane] += other.target_logits[lane];
    }
  }
};

// Whether to keep a row's exponentials for its gradient is faster than to compute them again. That is for the shape to
// tell alone, so that the bits depend on nothing else. Half types are bound by arithmetic and gain most; only where a
// row could not be streamed as a whole they lose. In float32 it is faster as long as everything stays in the caches.
template <typename T>
bool keeps_exps(const Problem& p) {
  const int64_t row_bytes = p.classes * sizeof(T);
  return sizeof(T) == 2 ? p.classes <= 1 << 18 && (row_bytes < kStreamedRow || row_bytes % 64 == 0)
                        : p.classes <= 1 << 12 && p.rows * row_bytes <= 1 << 23;
}

// The exponentials of some tiles at a time, where they are kept.
template <typename T>
class KeptExps {
 public:
  using A = Acc<T>;

  KeptExps(const Problem& p, const Tiling& tiling, int lanes, int64_t tiles) {
    if (p.grad.data && tiling.along && p.logits.class_stride == 1 && p.grad.class_stride == 1 && p.softcap == 0 &&
        keeps_exps<T>(p)) {
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

template <typename T>
struct Forward {
  using A = Acc<T>;
  const Problem& p;
  const TileKernels<T>& kernels;
  const Tiling tiling;
  const Upstream<A> upstream;
  const bool has_details;

  explicit Forward(const Problem& problem)
      : p(problem),
        kernels(tile_kernels<T>()),
        tiling(problem, kernels.lanes),
        upstream(problem),
        has_details(has_stats(p)) {}

  // A tile of ignored rows is read only for what does not depend on the targets.
  bool is_read(const TileTargets<A>& targets) const { return targets.any_kept || reads_ignored_rows(p); }

  void accumulate(Tile tile, const TileTargets<A>& targets, int64_t piece, Exps<A> exps, RowState<double>* states,
                  TileDetails* details) const {
    const int64_t begin = piece * kPiece, end = std::min(p.classes, begin + kPiece);
    kernels.accumulate(p, tiling.along, tile, targets, begin, end, exps, states,
                       p.entropy ? details->moments : nullptr);
    if (p.log_prob || p.argmax || p.rank) {
      kernels.place(p, tiling.along, tile, targets, begin, end, details->places, details->target_logits);
    }
  }

  void write_gradient(Tile tile, const TileTargets<A>& targets, const TileGradient<A>& gradient, int64_t piece,
                      Exps<A> exps) const {
    const int64_t begin = piece * kPiece;
    kernels.gradient(p, tiling.along, tile, targets, gradient, begin, std::min(p.classes, begin + kPiece), exps);
  }

  void write_details(int lane, int64_t offset, bool kept, const RowState<double>& state,
                     const TileDetails& details) const {
    const double of_target = details.target_logits[lane];
    write_row<A>(p.log_prob, offset, kept ? log_probability(state.exps, of_target) : 0);
    write_row<A>(p.entropy, offset, details.moments[lane].entropy(state.exps));
    write_row<int64_t>(p.argmax, offset, details.places[lane].argmax);
    write_row<int64_t>(p.rank, offset, kept ? details.places[lane].rank : -1);
  }

  // Writes the rows' results and prepares their gradient.
  TileGradient<A> finish(Tile tile, const TileTargets<A>& targets, const RowState<double>* states,
                         const TileDetails* details) const {
    TileGradient<A> gradient(tile);
    for (int lane = 0; lane < tile.rows; ++lane) {
      const int64_t row = tile.row + lane;
      const int64_t offset = row_offset(p, row, p.row_strides);
      const RowState<double>& state = states[lane];
      write_row<A>(p.loss, offset, targets.kept[lane] ? state.loss(p.z_loss) : 0);
      write_row<A>(p.max, offset, state.exps.max);
      write_row<A>(p.sum, offset, state.exps.sum);
      if (p.lse) {
        write_row<A>(p.lse, offset, state.exps.lse());
      }
      if (details) {
        write_details(lane, offset, targets.kept[lane], state, *details);
      }
      if (p.grad.data) {
        const MaxSum<A> exps{A(state.exps.max), A(state.exps.sum)};
        gradient.set(lane, make_row_gradient<A>(exps, A(state.coefficients), A(p.z_loss), {upstream.of(row)}));
      }
    }
    return gradient;
  }

  // Rows enough for all threads: each thread takes whole tiles, whose logits are still in its cache for the gradient.
  void by_tile() const {
    at::parallel_for(0, tiling.tiles, tiling.grain(p, tiling.tiles), [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      RowState<double> states[kMaxLanes];
      const KeptExps<T> kept(p, tiling, kernels.lanes, 1);
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = tiling.tile(i);
        const TileTargets<A> targets(p, tile);
        std::optional<TileDetails> details;
        if (has_details) {
          details.emplace();
        }
        TileDetails* const wanted = details ? &*details : nullptr;
        if (!is_read(targets)) {
          std::fill(states, states + tile.rows, RowState<double>());
        } else {
          for (int64_t piece = 0; piece < tiling.pieces; ++piece) {
            accumulate(tile, targets, piece, kept.of(0), states, wanted);
          }
        }
        const TileGradient<A> gradient = finish(tile, targets, states, wanted);
        for (int64_t piece = 0; p.grad.data && piece < tiling.pieces; ++piece) {
          write_gradient(tile, targets, gradient, piece, kept.of(0));
        }
      }
    });
  }

  // Few rows of many classes: the threads share the pieces of a row, of some rows at a time.
  void by_piece() const {
    constexpr int64_t kPiecesPerThread = 16;
    const int64_t batch = kPiecesPerThread * at::get_num_threads() / tiling.pieces + 1;
    const KeptExps<T> kept(p, tiling, kernels.lanes, std::min(batch, tiling.tiles));
    for (int64_t begin = 0; begin < tiling.tiles; begin += batch) {
      by_piece(begin, std::min(tiling.tiles, begin + batch), kept);
    }
  }

  void by_piece(int64_t first, int64_t last, const KeptExps<T>& kept) const {
    const int64_t items = (last - first) * tiling.pieces;
    std::vector<RowState<double>> states(items * kMaxLanes);
    std::vector<TileDetails> details(has_details ? items : 0);
    const auto for_each_piece = [&](auto&& f) {
      at::parallel_for(0, items, tiling.grain(p, tiling.tiles * tiling.pieces), [&](int64_t begin, int64_t end) {
        const FlushSubnormals flush;
        for (int64_t i = begin; i < end; ++i) {
          const Tile tile = tiling.tile(first + i / tiling.pieces);
          f(i, tile, TileTargets<A>(p, tile), i % tiling.pieces);
        }
      });
    };
    for_each_piece([&](int64_t i, Tile tile, const TileTargets<A>& targets, int64_t piece) {
      if (is_read(targets)) {
        accumulate(tile, targets, piece, kept.of(i / tiling.pieces), &states[i * kMaxLanes],
                   has_details ? &details[i] : nullptr);
      }
    });
    std::vector<TileGradient<A>> gradients;
    for (int64_t t = 0; t < last - first; ++t) {
      const Tile tile = tiling.tile(first + t);
      RowState<double>* merged = &states[t * tiling.pieces * kMaxLanes];
      TileDetails* const merged_details = has_details ? &details[t * tiling.pieces] : nullptr;
      for (int64_t piece = 1; piece < tiling.pieces; ++piece) {
        if (merged_details) {
          merged_details->merge(merged_details[piece], merged, merged + piece * kMaxLanes, tile.rows);
        }
        for (int lane = 0; lane < tile.rows; ++lane) {
          merged[lane] = merged[lane].merge(merged[piece * kMaxLanes + lane]);
        }
      }
      gradients.push_back(finish(tile, TileTargets<A>(p, tile), merged, merged_details));
    }
    if (p.grad.data) {
      for_each_piece([&](int64_t i, Tile tile, const TileTargets<A>& targets, int64_t piece) {
        const int64_t t = i / tiling.pieces;
        write_gradient(tile, targets, gradients[t], piece, kept.of(t));
      });
    }
  }

  template <bool kWeighted>
  void total() const {
    // Two stages with a fixed number of sums, so that the order is the same for any number of threads. −0 is the
    // identity of addition: the total of losses of −0 is −0, as it is without a reduction.
    constexpr int kSums = 8;
    double sums[kSums];
    std::fill(sums, sums + kSums, -0.0);
    const A* loss = static_cast<const A*>(p.loss);
    for (int64_t row = 0; row < p.rows; ++row) {
      const double of_row = loss[row_offset(p, row, p.row_strides)];
      sums[row % kSums] += kWeighted ? of_row * row_value<A>(p, p.row_weight, row, 1) : of_row;
    }
    double total = -0.0;
    for (const double sum : sums) {
      total += sum;
    }
    *static_cast<A*>(p.total) = static_cast<A>(total / p.divisor.value);
  }
};

}  // namespace

void forward(const Problem& p) {
  dispatch(p.dtype, [&](auto element) {
    const Forward<decltype(element)> forward(p);
    constexpr int64_t kTilesPerThread = 4;
    if (forward.tiling.pieces > 1 && forward.tiling.tiles < kTilesPerThread * at::get_num_threads()) {
      forward.by_piece();
    } else {
      forward.by_tile();
    }
    if (p.total) {
      p.row_weight.data ? forward.template total<true>() : forward.template total<false>();
    }
  });
}

}  // namespace ce::cpu
