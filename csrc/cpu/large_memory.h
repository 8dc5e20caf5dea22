// Memory for large gradients.
//
// The C library returns blocks above 32 MiB to the system on every free, so that each call would touch its gradient's
// pages for the first time: that takes several times as long as computing the gradient. Here the last block that was
// freed is kept for the next gradient, in huge pages, and marked as free for the system to take back whenever it needs
// memory (MADV_FREE).
#pragma once

#include <cstddef>

namespace ce::cpu {

constexpr size_t kLargeMemory = size_t(8) << 20;  // bytes

struct LargeBlock {
  void* data = nullptr;
  size_t bytes = 0;
  bool is_reused = false;  // its pages were touched before
};

// `data` is null where the system has none to give.
LargeBlock allocate_large(size_t bytes);
void free_large(LargeBlock block);

// Gives the block that is kept back to the system.
void release_large();

}  // namespace ce::cpu
