// The loss of a row and the gradient of its logits, for every kind of target.
//
// All of them are one formula. With logits z, coefficients a ≥ 0 and lse = ln Σ exp(z_c):
//
//     loss    = Σ_c a_c · (lse − z_c)
//     ∂/∂z_c  = (Σ_k a_k) · p_c − a_c,    p_c = exp(z_c − lse)
//
//     a_c = w_c · ((1 − ε) · q_c + ε / classes)
//
// where w are the class weights (1 without), ε the label smoothing and q the target's probabilities: given, or 1 at
// the target's index and 0 elsewhere. A new option of the loss is a change of these coefficients.
#pragma once

#include "max_sum.h"

namespace ce {

template <typename T>
struct Smoothing {
  T keep;     // 1 − ε
  T uniform;  // ε / classes

  // Written for scalars and for SIMD vectors of T alike.
  template <typename V>
  CE_HOST_DEVICE V coefficient(V weight, V probability) const {
    return weight * (keep * probability + uniform);
  }
  template <typename V>
  CE_HOST_DEVICE V background(V weight) const {  // of a class that is not the target's index
    return weight * uniform;
  }
};

template <typename T>
CE_HOST_DEVICE Smoothing<T> make_smoothing(double epsilon, long long classes) {
  // Torch takes ε ≤ 0 and NaN for no smoothing.
  return epsilon > 0 ? Smoothing<T>{T(1 - epsilon), T(epsilon / double(classes))} : Smoothing<T>{T(1), T(0)};
}

// What the one pass over a row leaves behind.
template <typename T>
struct RowState {
  MaxSum<T> exps;
  T linear = 0;        // Σ a_c · (z_c − max): every term ≤ 0 for a ≥ 0, so nothing cancels
  T coefficients = 0;  // Σ a_c

  CE_HOST_DEVICE RowState merge(const RowState& other) const {
    RowState result{exps.merge(other.exps), 0, coefficients + other.coefficients};
    result.linear = relative_to(result.exps.max) + other.relative_to(result.exps.max);
    return result;
  }

  // Makes all sums relative to `top` ≥ the maximum.
  CE_HOST_DEVICE void raise(T top) {
    linear = relative_to(top);
    exps.raise(top);
  }

  // Adds what the pass left out: the part of the coefficient that only the target's index has.
  CE_HOST_DEVICE void add(T coefficient, T logit) {
    linear += coefficient * (logit == -INFINITY ? logit : logit - exps.max);
    coefficients += coefficient;
  }

  CE_HOST_DEVICE T loss() const { return -(linear - coefficients * exps.log_sum()); }

 private:
  CE_HOST_DEVICE T relative_to(T top) const {
    return coefficients == 0 || exps.max == top ? linear : linear + coefficients * (exps.max - top);
  }
};

// The gradient of a row's logits, ready for one multiply-add an element.
template <typename T>
struct RowGradient {
  T max;
  T scale;     // upstream · Σ a / Σ exp(z − max)
  T upstream;  // the row's upstream gradient over the divisor of its reduction

  // `exp` is exp(z_c − max), `coefficient` is a_c.
  template <typename V>
  CE_HOST_DEVICE static V element(V exp, V coefficient, V scale, V upstream) {
    return scale * exp - upstream * coefficient;
  }
};

// `upstream_lse` is the gradient that reaches the row's logsumexp itself.
template <typename T>
CE_HOST_DEVICE RowGradient<T> make_row_gradient(MaxSum<T> exps, T coefficients, T upstream, T upstream_lse) {
  return {exps.max, (upstream * coefficients + upstream_lse) / exps.sum, upstream};
}

}  // namespace ce
