// The reduction behind every log-sum-exp of the project: the monoid of (max x, Σ exp(x − max x)).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define CE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ce {

// `merge` is associative and commutative up to rounding, with identity {−inf, 0}. A NaN reaches `sum`, never `max`.
template <typename T>
struct MaxSum {
  T max = -INFINITY;
  T sum = 0;

  // What a sum taken relative to `from` has to be multiplied with to be relative to `to` ≥ `from`. An empty sum has
  // from = −inf; the test keeps −inf − (−inf) from making a NaN of it.
  CE_HOST_DEVICE static T rescale(T from, T to) { return from == -INFINITY ? T(0) : std::exp(from - to); }

  CE_HOST_DEVICE MaxSum merge(const MaxSum& other) const {
    const T top = other.max > max ? other.max : max;
    return {top, sum * rescale(max, top) + other.sum * rescale(other.max, top)};
  }

  CE_HOST_DEVICE MaxSum push(T x) const { return merge({x, T(1)}); }

  // Makes the sum relative to `top` ≥ max.
  CE_HOST_DEVICE void raise(T top) {
    sum *= rescale(max, top);
    max = top;
  }

  // What x is to be taken relative to in exp(x − max), so that no −inf − (−inf) makes a NaN.
  CE_HOST_DEVICE T reference() const { return max == -INFINITY ? T(0) : max; }

  CE_HOST_DEVICE T log_sum() const { return std::log(sum); }

  // ln Σ exp(x). A row that holds +inf has lse +inf although its sum is NaN (inf − inf).
  CE_HOST_DEVICE T lse() const { return lse(log_sum()); }
  CE_HOST_DEVICE T lse(T log_of_sum) const { return max == INFINITY ? max : max + log_of_sum; }
};

}  // namespace ce
