#include <algorithm>
#include <numeric>
#include <vector>

#include <ATen/Parallel.h>

#include "forward.h"

namespace ce::cpu {
namespace {

template <typename T>
struct Backward {
  using A = Acc<T>;
  const Problem& p;
  const TileKernels<T>& kernels;
  const Tiling tiling;
  const Upstream<A> upstream;

  explicit Backward(const Problem& problem)
      : p(problem), kernels(tile_kernels<T>()), tiling(problem, kernels.lanes), upstream(problem) {}

  // Calls f(tile, begin, end, i) for all pieces i of all tiles.
  template <typename F>
  void for_each_piece(F&& f) const {
    const int64_t items = tiling.tiles * tiling.pieces;
    at::parallel_for(0, items, tiling.grain(p, items), [&](int64_t first, int64_t last) {
      const FlushSubnormals flush;
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % tiling.pieces * kPiece;
        f(tiling.tile(i / tiling.pieces), begin, std::min(p.classes, begin + kPiece), i);
      }
    });
  }

  MaxSum<A> exps(int64_t offset) const {
    return {static_cast<const A*>(p.max)[offset], static_cast<const A*>(p.sum)[offset]};
  }

  // The sum of the coefficients that every row of an index target has, but for the target's own.
  double shared_coefficients() const {
    double shared[kMaxLanes] = {};
    if (has_coefficients(p) && has_indices(p)) {
      kernels.sum_coefficients(p, true, {0, 1}, shared);
    }
    return shared[0];
  }

  TileGradient<A> gradient_of(const Tile& tile, const TileTargets<A>& targets, double shared) const {
    double coefficients[kMaxLanes];
    std::fill(coefficients, coefficients + kMaxLanes, shared);
    if (p.target_type == TargetType::kProbabilities && !p.coefficients) {
      kernels.sum_coefficients(p, tiling.along, tile, coefficients);
    }
    const RowOffsets offsets(p, tile, p.row_strides);
    TileGradient<A> gradient(tile, tiling.lanes);
    for (int lane = 0; lane < tile.rows; ++lane) {
      const int64_t row = tile.row + lane;
      const int64_t offset = offsets.of(lane);
      const PickedRow<A>* const picks = p.picks > 0 && targets.kept[lane] ? &Picks<A>(p, row).row : nullptr;
      if (picks) {
        coefficients[lane] = picks->coefficients(p.classes);
      } else if (p.coefficients) {
        coefficients[lane] = static_cast<const A*>(p.coefficients)[offset];
      } else if (targets.index[lane] >= 0) {
        coefficients[lane] += smoothing_of<A>(p).keep * targets.weight[lane];
      }
      const bool kept = targets.kept[lane];
      const RowUpstream<A> grads{kept ? upstream.of(row) : A(0), row_value<A>(p, p.grad_lse, row, 0),
                                 kept ? row_value<A>(p, p.grad_log_prob, row, 0) : A(0),
                                 row_value<A>(p, p.grad_entropy, row, 0)};
      const A entropy = p.entropy ? static_cast<const A*>(p.entropy)[offset] : A(0);
      const auto of_row = make_row_gradient<A>(exps(offset), A(coefficients[lane]), A(p.z_loss), grads, entropy);
      gradient.set(lane, picks ? picks->gradient_of_others(of_row) : of_row);
    }
    return gradient;
  }

  void keep_reached(TileTargets<A>& targets) const {
    if (reaches_ignored_rows(p)) {
      std::fill(targets.kept, targets.kept + kMaxLanes, true);
      targets.any_kept = true;
    }
  }

  void logits() const {
    if (p.picks > 0) {
      for_each_picked_row<A>(p, [&](int64_t row) { kernels.gather_picks(p, row); });
    }
    const double shared = shared_coefficients();
    WriteGradient<A>* const write_gradient = kernels.gradient(p, tiling.along);
    const auto write = [&](const Tile& tile, int64_t begin, int64_t end) {
      TileTargets<A> targets(p, tile, tiling.lanes);
      const TileGradient<A> gradient = gradient_of(tile, targets, shared);
      keep_reached(targets);
      write_gradient(p, tile, targets, gradient, begin, end, {});
    };
    if (tiling.staged == 0) {
      for_each_piece([&](const Tile& tile, int64_t begin, int64_t end, int64_t) { write(tile, begin, end); });
    } else {
      at::parallel_for(0, tiling.tiles, tiling.grain(p, tiling.tiles), [&](int64_t first, int64_t last) {
        const FlushSubnormals flush;
        for_each_tile(p, kernels, tiling, first, last, [&](const Tile& tile, const auto& fetch) {
          fetch();
          write(tile, 0, p.classes);
        });
      });
    }
    if (p.picks > 0) {
      picks();
    }
  }

  void picks() const {
    for_each_picked_row<A>(p, [&](int64_t row) {
      const A coefficients = Picks<A>(p, row).row.coefficients(p.classes);
      kernels.write_picks(
          p, row,
          make_row_gradient<A>(exps(row_offset(p, row, p.row_strides)), coefficients, A(p.z_loss), {upstream.of(row)}));
    });
  }

  void logit_scale() const {
    const double shared = shared_coefficients();
    std::vector<double> sums(tiling.tiles * tiling.pieces);
    for_each_piece([&](const Tile& tile, int64_t begin, int64_t end, int64_t i) {
      TileTargets<A> targets(p, tile, tiling.lanes);
      const TileGradient<A> gradient = gradient_of(tile, targets, shared);
      keep_reached(targets);
      kernels.logit_scale_gradient(p, tiling.along, tile, targets, gradient, begin, end, &sums[i]);
    });
    *static_cast<A*>(p.grad.data) = static_cast<A>(std::accumulate(sums.begin(), sums.end(), 0.0));
  }

  void divergence(bool of_teacher) const {
    for_each_piece([&](const Tile& tile, int64_t begin, int64_t end, int64_t) {
      const TileTargets<A> targets(p, tile, tiling.lanes);
      const RowOffsets offsets(p, tile, p.row_strides);
      TileDivergence<A> gradient(tile, tiling.lanes);
      for (int lane = 0; lane < tile.rows; ++lane) {
        const int64_t offset = offsets.of(lane);
        const auto value = [&](const void* rows) { return static_cast<const A*>(rows)[offset]; };
        gradient.set(
            lane, divergence_gradient_of(p, {value(p.max), value(p.sum)}, {value(p.teacher_max), value(p.teacher_sum)},
                                         value(p.mean), upstream.of(tile.row + lane), of_teacher));
      }
      kernels.divergence_gradient(p, tiling.along, tile, targets, gradient, of_teacher, begin, end);
    });
  }

  TileGradient<A> log_sums(const Tile& tile) const {
    const RowOffsets offsets(p, tile, p.row_strides);
    TileGradient<A> rows(tile, tiling.lanes);
    for (int lane = 0; lane < tile.rows; ++lane) {
      const MaxSum<A> row = exps(offsets.of(lane));
      rows.set(lane, {row.max, row.log_sum(), upstream.of(tile.row + lane)});
    }
    return rows;
  }

  void target() const {
    for_each_piece([&](const Tile& tile, int64_t begin, int64_t end, int64_t) {
      kernels.target_gradient(p, tiling.along, tile, log_sums(tile), begin, end);
    });
  }

  void weight() const {
    // Each thread takes classes, not rows: nothing is shared, and the order of the rows is fixed.
    constexpr int64_t kBlock = 256;
    at::parallel_for(0, (p.classes + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * kBlock;
        const int64_t end = std::min(p.classes, begin + kBlock);
        double sums[kBlock] = {};
        for (int64_t i = 0; i < tiling.tiles; ++i) {
          const Tile tile = tiling.tile(i);
          kernels.weight_gradient(p, tiling.along, tile, log_sums(tile), begin, end, sums);
        }
        std::copy(sums, sums + (end - begin), static_cast<A*>(p.grad.data) + begin);
      }
    });
  }
};

}  // namespace

void backward(const Problem& p) {
  dispatch(p.dtype, [&](auto element) {
    const Backward<decltype(element)> backward(p);
    p.target_type == TargetType::kTeacher ? backward.divergence(/*of_teacher=*/false) : backward.logits();
  });
}

void write_picks(const Problem& p) {
  dispatch(p.dtype, [&](auto element) { Backward<decltype(element)>(p).picks(); });
}

void target_backward(const Problem& p) {
  dispatch(p.dtype, [&](auto element) {
    const Backward<decltype(element)> backward(p);
    p.target_type == TargetType::kTeacher ? backward.divergence(/*of_teacher=*/true) : backward.target();
  });
}

void weight_backward(const Problem& p) {
  dispatch(p.dtype, [&](auto element) { Backward<decltype(element)>(p).weight(); });
}

void logit_scale_backward(const Problem& p) {
  dispatch(p.dtype, [&](auto element) { Backward<decltype(element)>(p).logit_scale(); });
}

}  // namespace ce::cpu
