#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace ce::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa detect() {
  Isa widest = Isa::kPortable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    widest = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      widest = Isa::kAvx512;
    }
  }
  if (const char* wanted = std::getenv("CROSS_ENTROPY_ISA")) {
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
      if (isa < widest && std::strcmp(wanted, kNames[static_cast<int>(isa)]) == 0) {
        widest = isa;
      }
    }
  }
#endif
  return widest;
}

}  // namespace

Isa isa() {
  static const Isa detected = detect();
  return detected;
}

const char* isa_name() {
  return kNames[static_cast<int>(isa())];
}

bool reads_in_stripes() {
  static const bool detected = [] {
    if (const char* wanted = std::getenv("CROSS_ENTROPY_STRIPES")) {
      return std::strcmp(wanted, "0") != 0;
    }
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
#else
    return false;
#endif
  }();
  return detected;
}

}  // namespace ce::cpu
