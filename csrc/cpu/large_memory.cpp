#include "large_memory.h"

#include <cstdint>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ce::cpu {

#if defined(__linux__)
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

std::mutex mutex;
LargeBlock kept;

// A huge page is only used where it is aligned.
LargeBlock map_aligned(size_t bytes) {
  const size_t slack = bytes + kHugePage;
  void* mapped = mmap(nullptr, slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return {};
  }
  char* const begin = static_cast<char*>(mapped);
  char* const data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) & ~(kHugePage - 1));
  if (data > begin) {
    munmap(begin, data - begin);
  }
  if (begin + slack > data + bytes) {
    munmap(data + bytes, begin + slack - (data + bytes));
  }
  madvise(data, bytes, MADV_HUGEPAGE);  // advice: nothing to do where it fails
  return {data, bytes, false};
}

// In place of what was kept.
void keep(LargeBlock block) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    std::swap(block, kept);
  }
  if (block.data) {
    munmap(block.data, block.bytes);
  }
}

}  // namespace

LargeBlock allocate_large(size_t bytes) {
  bytes = (bytes + kHugePage - 1) & ~(kHugePage - 1);
  LargeBlock block;
  {
    std::lock_guard<std::mutex> lock(mutex);
    block = std::exchange(kept, {});
  }
  if (block.bytes >= bytes && block.bytes / 2 <= bytes) {
    block.is_reused = true;
    return block;
  }
  if (block.data) {
    munmap(block.data, block.bytes);
  }
  return map_aligned(bytes);
}

void free_large(LargeBlock block) {
  madvise(block.data, block.bytes, MADV_FREE);
  keep(block);
}

void release_large() {
  keep({});
}

#else

LargeBlock allocate_large(size_t) {
  return {};
}
void free_large(LargeBlock) {}
void release_large() {}

#endif

}  // namespace ce::cpu
