// Sums over a problem's rows: in blocks of a fixed size, so that the number of threads changes no bit of them.
#pragma once

#include <algorithm>

#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include "../operands.h"

namespace ce::cpu {

// f(problem, begin, end) of each block of rows.
template <typename Result>
c10::SmallVector<Result, 4> for_each_block(const Problem& p, Result (*f)(const Problem&, int64_t, int64_t)) {
  constexpr int64_t kBlock = 1 << 14;
  c10::SmallVector<Result, 4> blocks((p.rows + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      blocks[i] = f(p, i * kBlock, std::min(p.rows, (i + 1) * kBlock));
    }
  });
  return blocks;
}

// Calls f(row, offset) for the rows [begin, end), with each row's offset in an operand.
template <typename F>
void for_each_row(const Problem& p, const int64_t (&strides)[kMaxDims], int64_t begin, int64_t end, F&& f) {
  const int64_t line = p.sizes[p.dims - 1], step = strides[p.dims - 1];
  while (begin < end) {
    const int64_t last = std::min(end, begin - begin % line + line);
    for (int64_t offset = row_offset(p, begin, strides); begin < last; ++begin, offset += step) {
      f(begin, offset);
    }
  }
}

}  // namespace ce::cpu
