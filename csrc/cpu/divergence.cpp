// Divergences from a teacher; row_divergence.h has their formulas.

#include "forward.h"

namespace ce::cpu {
namespace {

// Nothing is kept.
struct NoExps {
  int of(int64_t) const { return 0; }
};

template <typename Element>
struct DivergencePass {
  using T = Element;
  using A = Acc<T>;
  using Gradient = TileDivergence<A>;
  struct Rows {
    RowDivergence<double> rows[kMaxLanes];
  };

  const Problem& p;
  const TileKernels<T>& kernels;
  const Tiling tiling;
  const Upstream<A> upstream;

  explicit DivergencePass(const Problem& problem)
      : p(problem), kernels(tile_kernels<T>()), tiling(problem, kernels.lanes), upstream(problem) {}

  NoExps keep(int64_t) const { return {}; }
  bool is_read(const TileTargets<A>& targets) const { return targets.any_kept; }

  void accumulate(const Tile& tile, const TileTargets<A>&, int64_t piece, int, Rows& found) const {
    const int64_t begin = piece * kPiece;
    kernels.diverge(p, tiling.along, tile, begin, std::min(p.classes, begin + kPiece), found.rows);
  }

  void merge(Rows& into, const Rows& more, int rows) const {
    for (int lane = 0; lane < rows; ++lane) {
      into.rows[lane] = into.rows[lane].merge(more.rows[lane]);
    }
  }

  void write_gradient(const Tile& tile, const TileTargets<A>& targets, const Gradient& gradient, int64_t piece,
                      int) const {
    const int64_t begin = piece * kPiece;
    kernels.divergence_gradient(p, tiling.along, tile, targets, gradient, /*of_teacher=*/false, begin,
                                std::min(p.classes, begin + kPiece));
  }

  Gradient finish(const Tile& tile, const TileTargets<A>& targets, const Rows& found) const {
    const RowOffsets offsets(p, tile, p.row_strides);
    Gradient gradient(tile, tiling.lanes);
    for (int lane = 0; lane < tile.rows; ++lane) {
      const int64_t offset = offsets.of(lane);
      const RowDivergence<double>& row = found.rows[lane];
      const MaxSum<double> logits = row.logits(p.reverse), teacher = row.teacher(p.reverse);
      const double loss = row.value() + z_loss_of(logits, logits.log_sum(), p.z_loss);
      write_row<A>(p.loss, offset, targets.kept[lane] ? loss : 0);
      write_row<A>(p.max, offset, logits.max);
      write_row<A>(p.sum, offset, logits.sum);
      write_row<A>(p.teacher_max, offset, teacher.max);
      write_row<A>(p.teacher_sum, offset, teacher.sum);
      write_row<A>(p.mean, offset, row.mean());
      if (p.grad.data) {
        gradient.set(lane,
                     divergence_gradient_of<A>(p, {A(logits.max), A(logits.sum)}, {A(teacher.max), A(teacher.sum)},
                                               A(row.mean()), upstream.of(tile.row + lane), /*of_teacher=*/false));
      }
    }
    return gradient;
  }
};

}  // namespace

void diverge(const Problem& p) {
  dispatch(p.dtype, [&](auto element) { run_forward(DivergencePass<decltype(element)>(p)); });
}

}  // namespace ce::cpu
