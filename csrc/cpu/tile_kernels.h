// The kernels of tile.h for one instruction set. Included by foreach_isa.h's rounds, so without a guard.

#include "simd.h"
#include "tile_view.h"
#include "transform.h"

namespace ce::cpu::CE_ISA {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// f of what a kernel is to be compiled for: along, linear, the change, and whether it has to do with entropy. Along
// rows without coefficients, where most calls go, there are kernels of one change alone.
template <typename F>
auto specialize(const Problem& p, bool along, bool entropy, F&& f) {
  constexpr Constant<true> kYes;
  constexpr Constant<false> kNo;
  const auto pick_entropy = [&](auto a, auto linear, auto change) {
    return entropy ? f(a, linear, change, kYes) : f(a, linear, change, kNo);
  };
  const auto pick_change = [&](auto a, auto linear) {
    constexpr Constant<Change::kNone> kNone;
    if constexpr (a && !linear) {
      return p.softcap > 0   ? pick_entropy(a, linear, Constant<Change::kSoftcap>())
             : transforms(p) ? pick_entropy(a, linear, Constant<Change::kScale>())
                             : pick_entropy(a, linear, kNone);
    } else {
      return entropy || transforms(p) ? pick_entropy(a, linear, Constant<Change::kAny>()) : f(a, linear, kNone, kNo);
    }
  };
  const auto pick_linear = [&](auto a) { return has_coefficients(p) ? pick_change(a, kYes) : pick_change(a, kNo); };
  return along ? pick_linear(kYes) : pick_linear(kNo);
}

}  // namespace ce::cpu::CE_ISA

#include "stage_kernels.h"
#include "accumulate_kernels.h"
#include "finish_kernels.h"
#include "gradient_kernels.h"
#include "place_kernels.h"
#include "divergence_kernels.h"
#include "pick_kernels.h"

namespace ce::cpu::CE_ISA {

template <typename T>
void scale(T* data, int64_t count, Acc<T> factor) {
  constexpr int kStep = kLanes<Acc<T>>;
  for (int64_t i = 0; i < count; i += kStep) {
    const int lanes = count - i < kStep ? static_cast<int>(count - i) : kStep;
    store(data + i, 1, lanes, load(data + i, 1, lanes) * factor);
  }
}

template <typename T>
constexpr TileKernels<T> kTileKernels = {kLanes<Acc<T>>,
                                         accumulate<T>,
                                         gradient<T>,
                                         place<T>,
                                         sum_coefficients<T>,
                                         target_gradient<T>,
                                         weight_gradient<T>,
                                         logit_scale_gradient<T>,
                                         stage_in<T>,
                                         stage_out<T>,
                                         scale<T>,
                                         take_logs,
                                         finish_rows<Acc<T>>,
                                         diverge<T>,
                                         divergence_gradient<T>,
                                         gather_picks<T>,
                                         write_picks<T>};

}  // namespace ce::cpu::CE_ISA
