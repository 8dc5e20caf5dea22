#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ce::cpu {

// Asks the kernel to back a large fresh allocation with huge pages. The C library returns blocks above 32 MiB to the
// system on every free, so each call touches such a gradient for the first time: with 4 KiB pages that takes several
// times as long as computing it.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  constexpr size_t kReturned = size_t(32) << 20;
  if (bytes >= kReturned) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: nothing to do where it fails
  }
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace ce::cpu
