// Tiles whose lanes run across rows are staged: their logits are copied to columns of vectors, and their gradient from
// there.
#pragma once

#include <algorithm>
#include <memory>

#include "tile.h"

namespace ce::cpu {

// Memory for the columns of a thread's tiles.
class Columns {
 public:
  Columns(const Problem& p, const Tiling& tiling) : tile_bytes_(tiling.column_bytes(p)) {
    const int64_t bytes = tiling.staged * tile_bytes_;
    if (bytes > int64_t{sizeof(few_)}) {
      many_.reset(new Line[bytes / sizeof(Line) + 1]);
    }
  }

  void* of(int64_t tile) { return reinterpret_cast<char*>(many_ ? many_.get() : few_) + tile * tile_bytes_; }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  int64_t tile_bytes_;
  std::unique_ptr<Line[]> many_;
  Line few_[64];
};

// Calls f(tile, fetch) for the tiles [begin, end). A tile's columns hold its logits after fetch(); the gradient that is
// left in them is written.
template <typename T, typename F>
void for_each_tile(const Problem& p, const TileKernels<T>& kernels, const Tiling& tiling, int64_t begin, int64_t end,
                   F&& f) {
  if (tiling.staged == 0) {
    for (int64_t i = begin; i < end; ++i) {
      f(tiling.tile(i), [] {});
    }
    return;
  }
  Columns columns(p, tiling);
  for (int64_t line = begin / tiling.tiles_per_line; begin < end;) {
    const int64_t line_begin = line * tiling.tiles_per_line, line_end = line_begin + tiling.tiles_per_line;
    const int64_t last = std::min({end, line_end, begin + tiling.staged});
    const int64_t offset = (begin - line_begin) * tiling.lanes, first_row = line * tiling.line + offset;
    const int64_t rows = std::min(tiling.line - offset, (last - begin) * tiling.lanes);
    bool is_fetched = false;
    for (int64_t row = 0, i = begin; i < last; ++i, row += tiling.lanes) {
      void* const own = columns.of(i - begin);
      const auto fetch = [&] {
        if (!is_fetched) {  // not of the tiles before, where the gradient may be by now
          kernels.stage_in(p, first_row + row, rows - row, own);
          is_fetched = true;
        }
      };
      f(Tile{first_row + row, static_cast<int>(std::min<int64_t>(tiling.lanes, rows - row)), own}, fetch);
    }
    if (p.grad.data) {
      kernels.stage_out(p, first_row, rows, columns.of(0));
    }
    line += last == line_end;
    begin = last;
  }
}

}  // namespace ce::cpu
