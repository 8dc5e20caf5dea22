// How the CPU kernels walk a problem: in tiles of rows, and a tile's classes in pieces.
//
// A vector's lanes run either along one row's classes or across several rows of the same class, whichever the layout
// of the logits has next to each other. Pieces have a fixed size and are merged in their order, so that neither the
// number of threads nor who computes a piece changes a bit of the result.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../picks.h"

namespace ce::cpu {

// While it lives, what its thread computes is 0 instead of a subnormal number, which can cost a hundred cycles: the
// exponentials of logits far below the maximum.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  const unsigned saved_ = _mm_getcsr();
#else
 public:
  FlushSubnormals() {}
#endif
};

constexpr int kMaxLanes = 16;         // floats in the widest vector
constexpr int64_t kPiece = 1 << 14;   // classes
constexpr int64_t kSerial = 1 << 15;  // elements that are not worth a second thread
constexpr int kGroup = 8;             // vectors that are taken together
// How far ahead of its use a row is fetched: beyond its page, with which the processor's own fetching ends.
constexpr int64_t kBytesAhead = 1 << 13;
// Whether a gradient is that of a backward pass, which is the first to read its logits: otherwise the forward pass has
// just read them.
CE_HOST_DEVICE bool is_backward(const Problem& p) {
  return !p.loss;
}
// Bytes of a row from which on its gradient is streamed past the caches: a shorter one is written faster than streams
// are.
constexpr int64_t kStreamedRow = 1 << 14;
// Rows of so few vectors are transposed, so that the lanes run across them: less work than a row costs by itself.
constexpr int kNarrow = 8;

// Rows next to each other on the last dimension of the grid.
struct Tile {
  int64_t row;              // the first
  int rows;                 // 1 when lanes run along the classes
  void* columns = nullptr;  // where its logits are staged: a vector for each class
};

// Where a tile's rows are in an operand.
struct RowOffsets {
  int64_t first, step;

  RowOffsets(const Problem& p, const Tile& tile, const int64_t (&strides)[kMaxDims])
      : first(row_offset(p, tile.row, strides)), step(strides[p.dims - 1]) {}

  int64_t of(int lane) const { return first + lane * step; }
};

// Vectors of a staged tile: odd, so that the tiles of a class do not meet in the caches; and whole blocks of transposed
// rows.
inline int64_t columns_of_tile(const Problem& p, int vector_lanes) {
  return (p.classes > vector_lanes ? p.classes : vector_lanes) | 1;
}

struct Tiling {
  bool along;    // lanes run along the classes
  int lanes;     // rows of a full tile
  int64_t line;  // rows of the grid's last dimension
  int64_t tiles_per_line;
  int64_t tiles;
  int64_t pieces;  // of a tile
  int staged;      // tiles that are staged together, 0: none are

  // `vector_lanes` accumulators fit the running processor's vectors.
  Tiling(const Problem& p, int vector_lanes);

  Tile tile(int64_t i) const {
    if (lanes == 1) {
      return {i, 1};
    }
    const int64_t first = i % tiles_per_line * lanes;
    const int64_t rest = line - first;
    return {i / tiles_per_line * line + first, rest < lanes ? static_cast<int>(rest) : lanes};
  }
  // Of a staged tile.
  int64_t column_bytes(const Problem& p) const {
    return columns_of_tile(p, lanes) * lanes * (p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
  }
  // Tiles or pieces that a thread should take at least.
  int64_t grain(const Problem& p, int64_t items) const { return kSerial / (p.rows * p.classes / items + 1) + 1; }
};

// The targets of a tile's rows. Those of `lanes` without a row are not kept.
template <typename A>
struct TileTargets {
  int64_t index[kMaxLanes];  // −1: ignored, another shard's, or the target has classes itself
  A weight[kMaxLanes];       // of the target's class
  bool kept[kMaxLanes];
  bool any_kept;

  TileTargets(const Problem& p, const Tile& tile, int lanes);
};

// The states of a tile's rows, field by field, so that the compiler makes vectors of them.
struct TileStates {
  double max[kMaxLanes];
  double sum[kMaxLanes];
  double linear[kMaxLanes];
  double coefficients[kMaxLanes];

  // Of rows of which nothing has been read.
  CE_HOST_DEVICE void clear() {
    for (int lane = 0; lane < kMaxLanes; ++lane) {
      set(lane, {});
    }
  }
  CE_HOST_DEVICE MaxSum<double> exps(int lane) const { return {max[lane], sum[lane]}; }
  CE_HOST_DEVICE RowState<double> get(int lane) const { return {exps(lane), linear[lane], coefficients[lane]}; }
  CE_HOST_DEVICE void set(int lane, const RowState<double>& row) {
    max[lane] = row.exps.max;
    sum[lane] = row.exps.sum;
    linear[lane] = row.linear;
    coefficients[lane] = row.coefficients;
  }
};

// What the gradient kernels need of a tile's rows.
template <typename A>
struct TileGradient {
  A max[kMaxLanes];
  A scale[kMaxLanes];
  A upstream[kMaxLanes];
  A tilt[kMaxLanes];
  A log_prob[kMaxLanes];

  // Those of `lanes` without a row are computed too, but not stored.
  TileGradient(const Tile& tile, int lanes) {
    for (int lane = tile.rows; lane < lanes; ++lane) {
      set(lane, {});
    }
  }

  CE_HOST_DEVICE void set(int lane, RowGradient<A> row) {
    max[lane] = row.max;
    scale[lane] = row.scale;
    upstream[lane] = row.upstream;
    tilt[lane] = row.tilt;
    log_prob[lane] = row.log_prob;
  }
};

// The same for the gradient of a divergence.
template <typename A>
struct TileDivergence {
  A own_max[kMaxLanes];
  A other_max[kMaxLanes];
  A scale[kMaxLanes];
  A tilt[kMaxLanes];
  A upstream[kMaxLanes];

  TileDivergence(const Tile& tile, int lanes) {
    for (int lane = tile.rows; lane < lanes; ++lane) {
      set(lane, {});
    }
  }

  void set(int lane, DivergenceGradient<A> row) {
    own_max[lane] = row.own_max;
    other_max[lane] = row.other_max;
    scale[lane] = row.scale;
    tilt[lane] = row.tilt;
    upstream[lane] = row.upstream;
  }
};

// The exponentials of a row that the forward pass keeps for the gradient, relative to the reference of their group.
template <typename A>
struct Exps {
  A* values = nullptr;      // (classes)
  A* references = nullptr;  // (groups)
};

// The upstream gradient of each row's loss: with its weight, over the divisor of the reduction.
template <typename A>
class Upstream {
 public:
  explicit Upstream(const Problem& p)
      : p_(p), is_same_(!p.grad_loss.data && !p.row_weight.data), of_all_(1 / static_cast<A>(p.divisor.value)) {}

  A of(int64_t row) const {
    return is_same_ ? of_all_
                    : row_value<A>(p_, p_.grad_loss, row, 1) * row_value<A>(p_, p_.row_weight, row, 1) /
                          static_cast<A>(p_.divisor.value);
  }

 private:
  const Problem& p_;
  bool is_same_;
  A of_all_;
};

// Merges into the states, and moments[lane] if entropies are asked for, what the classes [begin, end) add to the
// state of each row. Fills `exps` if it is not null.
template <typename A>
using Accumulate = void(const Problem&, const Tile&, const TileTargets<A>&, int64_t begin, int64_t end, Exps<A> exps,
                        TileStates& states, Moment<double>* moments);
// Writes the gradient of the logits, from `exps` if it is not null.
template <typename A>
using WriteGradient = void(const Problem&, const Tile&, const TileTargets<A>&, const TileGradient<A>&, int64_t begin,
                           int64_t end, Exps<A> exps);

// The kernels over the classes [begin, end) of a tile, for one element type and the running processor.
template <typename T>
struct TileKernels {
  using A = Acc<T>;
  int lanes;  // of a vector
  // Those for all tiles of a problem.
  Accumulate<A>* (*accumulate)(const Problem&, bool along);
  WriteGradient<A>* (*gradient)(const Problem&, bool along);
  // Merges what is asked of places and of the target's logit, as the formula has it.
  void (*place)(const Problem&, bool along, const Tile&, const TileTargets<A>&, int64_t begin, int64_t end,
                RowPlace<double>* places, double* logits_of_targets);
  // The sum of each row's coefficients, without a look at the logits.
  void (*sum_coefficients)(const Problem&, bool along, const Tile&, double* sums);
  // upstream · (1 − ε) · w_c · (lse − z_c), the gradient of the probabilities. `scale` holds ln Σ exp(z − max).
  void (*target_gradient)(const Problem&, bool along, const Tile&, const TileGradient<A>&, int64_t begin, int64_t end);
  // Adds Σ upstream · q'_c · (lse − z_c) over the tile's rows to sums[c − begin], the gradient of the class weights.
  void (*weight_gradient)(const Problem&, bool along, const Tile&, const TileGradient<A>&, int64_t begin, int64_t end,
                          double* sums);
  // Adds Σ ∂loss/∂z_c · ∂z_c/∂scale of all the tile's rows to *sum.
  void (*logit_scale_gradient)(const Problem&, bool along, const Tile&, const TileTargets<A>&, const TileGradient<A>&,
                               int64_t begin, int64_t end, double* sum);
  // Copies the logits of the rows [first, first + rows), neighbours on a line, to columns, those of one tile after the
  // other; and what the columns hold then to the gradient.
  void (*stage_in)(const Problem&, int64_t first, int64_t rows, void* columns);
  void (*stage_out)(const Problem&, int64_t first, int64_t rows, const void* columns);
  void (*scale)(T* data, int64_t count, A factor);
  // Replaces numbers by their logarithms, fast where all are ≥ 1. There is room for whole vectors, of numbers too.
  void (*take_logs)(double* x, int count);
  // The losses of the rows of a tile across rows, without a z-loss, and their gradient from that of their losses.
  void (*finish_rows)(const TileTargets<A>&, const TileStates&, const A* upstreams, A* losses, TileGradient<A>&);
  // Merges into rows[lane] what the classes add to the divergence of each row.
  void (*diverge)(const Problem&, bool along, const Tile&, int64_t begin, int64_t end, RowDivergence<double>* rows);
  // The gradient of the logits, or of the teacher's.
  void (*divergence_gradient)(const Problem&, bool along, const Tile&, const TileTargets<A>&, const TileDivergence<A>&,
                              bool of_teacher, int64_t begin, int64_t end);
  // Finds picked_row() and the logits of a row's picks; then, after the gradient of all classes has been written as if
  // they were not picked, writes theirs.
  void (*gather_picks)(const Problem&, int64_t row);
  void (*write_picks)(const Problem&, int64_t row, RowGradient<A> gradient);
};

template <typename T>
const TileKernels<T>& tile_kernels();

}  // namespace ce::cpu
