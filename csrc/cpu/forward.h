// How the forward passes go over a problem's tiles. What a pass finds of their rows, and how, is its own: it has
//
//     T, p, kernels    the element type, the problem, its kernels
//     tiling           the problem's tiles
//     Rows             what is found of a tile's rows, or of one of their pieces
//     Gradient         what the gradient of a tile's rows is made from
//     keep(tiles)      what it keeps of the elements for the gradient, of so many tiles at a time: .of(i)
//     is_read(), accumulate(), merge(), finish(), write_gradient()
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include <ATen/Parallel.h>

#include "row_blocks.h"
#include "stage.h"

namespace ce::cpu {

template <typename Result, typename Value>
void write_row(void* results, int64_t offset, Value value) {
  if (results) {
    static_cast<Result*>(results)[offset] = static_cast<Result>(value);
  }
}

// Rows enough for all threads: each thread takes whole tiles, whose elements are still in its cache for the gradient.
template <typename Pass>
void forward_by_tile(const Pass& pass) {
  const Problem& p = pass.p;
  const Tiling& tiling = pass.tiling;
  at::parallel_for(0, tiling.tiles, tiling.grain(p, tiling.tiles), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    typename Pass::Rows rows;
    const auto kept = pass.keep(1);
    for_each_tile(p, pass.kernels, tiling, begin, end, [&](const Tile& tile, const auto& fetch) {
      const TileTargets<typename Pass::A> targets(p, tile, tiling.lanes);
      if (!pass.is_read(targets)) {
        rows = typename Pass::Rows();
      } else {
        fetch();
        for (int64_t piece = 0; piece < tiling.pieces; ++piece) {
          pass.accumulate(tile, targets, piece, kept.of(0), rows);
        }
      }
      const typename Pass::Gradient gradient = pass.finish(tile, targets, rows);
      for (int64_t piece = 0; p.grad.data && piece < tiling.pieces; ++piece) {
        pass.write_gradient(tile, targets, gradient, piece, kept.of(0));
      }
    });
  });
}

// Few rows of many classes: the threads share the pieces of a row, of the tiles from `first` to `last` at a time.
template <typename Pass, typename Kept>
void forward_by_piece(const Pass& pass, int64_t first, int64_t last, const Kept& kept) {
  using Targets = TileTargets<typename Pass::A>;
  const Problem& p = pass.p;
  const Tiling& tiling = pass.tiling;
  const int64_t items = (last - first) * tiling.pieces;
  std::vector<typename Pass::Rows> found(items);
  const auto for_each_piece = [&](auto&& f) {
    at::parallel_for(0, items, tiling.grain(p, tiling.tiles * tiling.pieces), [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = tiling.tile(first + i / tiling.pieces);
        f(i, tile, Targets(p, tile, tiling.lanes), i % tiling.pieces);
      }
    });
  };
  for_each_piece([&](int64_t i, const Tile& tile, const Targets& targets, int64_t piece) {
    if (pass.is_read(targets)) {
      pass.accumulate(tile, targets, piece, kept.of(i / tiling.pieces), found[i]);
    }
  });
  std::vector<typename Pass::Gradient> gradients;
  for (int64_t t = 0; t < last - first; ++t) {
    const Tile tile = tiling.tile(first + t);
    auto& merged = found[t * tiling.pieces];
    for (int64_t piece = 1; piece < tiling.pieces; ++piece) {
      pass.merge(merged, found[t * tiling.pieces + piece], tile.rows);
    }
    gradients.push_back(pass.finish(tile, Targets(p, tile, tiling.lanes), merged));
  }
  if (p.grad.data) {
    for_each_piece([&](int64_t i, const Tile& tile, const Targets& targets, int64_t piece) {
      const int64_t t = i / tiling.pieces;
      pass.write_gradient(tile, targets, gradients[t], piece, kept.of(t));
    });
  }
}

// Σ loss of a block's rows. −0 is the identity of addition: the total of losses of −0 is −0, as it is without a
// reduction.
template <typename A, bool kWeighted>
double sum_block(const Problem& p, int64_t begin, int64_t end) {
  constexpr int kSums = 8;
  double sums[kSums];
  std::fill(sums, sums + kSums, -0.0);
  const A* loss = static_cast<const A*>(p.loss);
  if constexpr (kWeighted) {
    for (int64_t row = begin; row < end; ++row) {
      const double row_weight = row_value<A>(p, p.row_weight, row, 1);
      sums[row % kSums] += weighted_loss<double>(row_weight, loss[row_offset(p, row, p.row_strides)]);
    }
  } else {  // in the order of memory, where the losses are without gaps
    for (; begin + kSums <= end; begin += kSums) {
      for (int i = 0; i < kSums; ++i) {
        sums[i] += loss[begin + i];
      }
    }
    for (; begin < end; ++begin) {
      sums[begin % kSums] += loss[begin];
    }
  }
  return std::accumulate(sums, sums + kSums, -0.0);
}

template <typename A, bool kWeighted>
void sum_losses(const Problem& p) {
  const auto blocks = for_each_block(p, sum_block<A, kWeighted>);
  *static_cast<A*>(p.total) = static_cast<A>(std::accumulate(blocks.begin(), blocks.end(), -0.0) / p.divisor.value);
}

// Calls f(row) for all rows with picks that are read.
template <typename A, typename F>
void for_each_picked_row(const Problem& p, F&& f) {
  at::parallel_for(0, p.rows, kSerial / (p.picks + 1) + 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t row = begin; row < end; ++row) {
      if (counts<A>(p, row)) {
        f(row);
      }
    }
  });
}

template <typename Pass>
void run_forward(const Pass& pass) {
  constexpr int64_t kTilesPerThread = 4;
  const Problem& p = pass.p;
  const Tiling& tiling = pass.tiling;
  if (tiling.pieces > 1 && tiling.tiles < kTilesPerThread * at::get_num_threads()) {
    constexpr int64_t kPiecesPerThread = 16;
    const int64_t batch = kPiecesPerThread * at::get_num_threads() / tiling.pieces + 1;
    const auto kept = pass.keep(std::min(batch, tiling.tiles));
    for (int64_t begin = 0; begin < tiling.tiles; begin += batch) {
      forward_by_piece(pass, begin, std::min(tiling.tiles, begin + batch), kept);
    }
  } else {
    forward_by_tile(pass);
  }
  if (p.total) {
    p.row_weight.data ? sum_losses<typename Pass::A, true>(p) : sum_losses<typename Pass::A, false>(p);
  }
}

// The forward pass of a divergence from a teacher.
void diverge(const Problem&);
// The gradient of the picks, from `max` and `sum`, after that of all classes.
void write_picks(const Problem&);

}  // namespace ce::cpu
