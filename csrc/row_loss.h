// The loss of a row and the gradient of its logits, for every kind of target.
//
// All of them are one formula. With logits x, their scale s, softcap k and
//
//     z_c  = s · x_c,   or with a softcap   k · tanh(s · x_c / k)
//     lse  = ln Σ exp(z_c)
//     a_c  = w_c · ((1 − ε) · q_c + ε / classes)
//
// where w are the class weights (1 without), ε the label smoothing and q the target's probabilities: given, or 1 at
// the target's index and 0 elsewhere; and with ζ of the z-loss:
//
//     loss    = Σ_c a_c · (lse − z_c) + ζ · lse²
//     ∂/∂z_c  = (Σ_k a_k + 2 · ζ · lse) · p_c − a_c,    p_c = exp(z_c − lse)
//     ∂/∂x_c  = ∂/∂z_c · s · (1 − (z_c / k)²)
//
// A new option of the loss is a change of the coefficients of this formula.
#pragma once

#include <cstdint>

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

// tanh(u) of floats, |u| ≤ kTanhLimit: a minimax ratio of polynomials in u², with a relative error of 2.9e-7. At the
// limit it is 1, as it is to be beyond, and nowhere more.
constexpr float kTanhLimit = 8.09481621f;
template <typename V>
struct Ratio {
  V numerator, denominator;
};
template <typename V>
CE_HOST_DEVICE Ratio<V> tanh_ratio(V u) {
  const V t = u * u;
  const V p = ((t * 1.54645345e-08f + 2.20587408e-05f) * t + 0.00358146126f) * t + 0.134527892f;
  const V q = (((t * 8.61661476e-07f + 0.000342748157f) * t + 0.0262019131f) * t + 0.467861205f) * t + 1.0f;
  return {u * t * p + u, q};
}

// The same for |u| ≤ kTanhNear without a division: tanh(u) / u is a minimax polynomial in u², with a relative error of
// 2.8e-7. Lowest degree first.
constexpr float kTanhNear = 0.6875f;
constexpr float kTanhOverArgument[] = {0.999999762f, -0.333305895f, 0.132857695f, -0.0510158986f, 0.0139861787f};

// From logits as they are given to those of the formula.
template <typename T>
struct LogitTransform {
  T scale = 1;
  T cap = 0;  // 0: none

  CE_HOST_DEVICE bool is_given() const { return scale != 1 || cap > 0; }

  // z is scale · x without a softcap, and with one cap · tanh(before_tanh() · x).
  CE_HOST_DEVICE T before_tanh() const { return scale / cap; }
  // What a softcap makes of the scale in ∂z/∂x: 1 − (z / cap)², and 0 where the tanh is ±1. For scalars and for SIMD
  // vectors.
  template <typename V>
  CE_HOST_DEVICE V slope(V z) const {
    const T inverse = T(1) / cap;
    return (cap - z) * inverse * ((cap + z) * inverse);
  }
};

// ζ · lse², and its slope.
template <typename T>
CE_HOST_DEVICE T z_loss_of(const MaxSum<T>& exps, T log_sum, T z_loss) {
  if (z_loss == 0) {
    return T(-0.0);  // the identity of addition
  }
  const T lse = exps.lse(log_sum);
  return z_loss * lse * lse;
}
template <typename T>
CE_HOST_DEVICE T z_loss_slope(const MaxSum<T>& exps, T z_loss) {
  return z_loss == 0 ? T(0) : 2 * z_loss * exps.lse();
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

  // Adds what the pass left out: the part of the coefficient that only the target's index has. T may be a SIMD vector.
  CE_HOST_DEVICE void add(T coefficient, T logit) {
    const T distance = logit - exps.max;
    linear += coefficient * (logit == -INFINITY ? logit : distance);
    coefficients += coefficient;
  }

  CE_HOST_DEVICE T loss(T z_loss) const { return loss(z_loss, exps.log_sum()); }
  CE_HOST_DEVICE T loss(T z_loss, T log_sum) const {
    return loss_of_logits(log_sum) + z_loss_of(exps, log_sum, z_loss);
  }
  // Without the z-loss; T may be a SIMD vector.
  CE_HOST_DEVICE T loss_of_logits(T log_sum) const { return -(linear - coefficients * log_sum); }

 private:
  // Linear terms of logits −∞ alone are ∞ or none, whatever they are relative to.
  CE_HOST_DEVICE T relative_to(T top) const {
    const bool is_same = coefficients == 0 || exps.max == top || exps.max == -INFINITY;
    return is_same ? linear : linear + coefficients * (exps.max - top);
  }
};

// ln p of a logit.
template <typename T>
CE_HOST_DEVICE T log_probability(const MaxSum<T>& exps, T logit, T log_sum) {
  return (logit - exps.max) - log_sum;
}

// The entropy −Σ p_c · ln p_c comes from the moment Σ exp(z_c − max) · (z_c − max).
template <typename T>
struct Moment {
  T sum = 0;

  // −∞ · 0 is no part of it: what is further from the maximum has no weight that could be told from 0.
  static constexpr T kFarthest = sizeof(T) == 8 ? 1024 : 128;

  // The same, of which `exps` are the exponentials, relative to `top` ≥ their maximum.
  CE_HOST_DEVICE Moment relative_to(T top, const MaxSum<T>& exps) const {
    const T step = exps.max - top < -kFarthest ? -kFarthest : exps.max - top;
    return {step == 0 || exps.max == -INFINITY ? sum : (sum + exps.sum * step) * MaxSum<T>::rescale(exps.max, top)};
  }
  CE_HOST_DEVICE Moment merge(const MaxSum<T>& exps, const Moment& other, const MaxSum<T>& other_exps) const {
    const T top = other_exps.max > exps.max ? other_exps.max : exps.max;
    return {relative_to(top, exps).sum + other.relative_to(top, other_exps).sum};
  }
  CE_HOST_DEVICE T entropy(const MaxSum<T>& exps, T log_sum) const { return log_sum - sum / exps.sum; }
};

// Where a row's target is among its classes: first those of a larger logit, among equal ones those of a smaller index.
template <typename T>
struct RowPlace {
  T max = -INFINITY;   // of the classes that have been seen, NaN left out,
  int64_t argmax = 0;  // and the first class that has it
  int64_t rank = 0;    // classes before the target, NaN among them

  CE_HOST_DEVICE RowPlace merge(const RowPlace& other) const {
    const bool is_other = other.max > max || (other.max == max && max != -INFINITY && other.argmax < argmax);
    return {is_other ? other.max : max, is_other ? other.argmax : argmax, rank + other.rank};
  }
  CE_HOST_DEVICE static bool is_before(T logit, T target_logit, bool has_smaller_index) {
    return !(logit < target_logit) && (has_smaller_index || logit != target_logit);
  }
};

// What the one pass leaves where more than the loss is asked for.
template <typename T>
struct RowStats {
  RowState<T> state;
  Moment<T> moment;
  RowPlace<T> place;

  CE_HOST_DEVICE RowStats merge(const RowStats& other) const {
    return {state.merge(other.state), moment.merge(state.exps, other.moment, other.state.exps),
            place.merge(other.place)};
  }
  CE_HOST_DEVICE void raise(T top) {
    moment = moment.relative_to(top, state.exps);
    state.raise(top);
  }
};

// The gradients that reach what a row has given.
template <typename T>
struct RowUpstream {
  T loss = 0;  // over the divisor of its reduction
  T lse = 0;
  T log_prob = 0;  // of the target's index
  T entropy = 0;
};

// The gradient of a row's logits, ready for a multiply-add or two an element:
//
//     exp(z_c − max) · (scale + tilt · (z_c − max)) − upstream · a_c,   and + log_prob at the target's index
//
// An entropy H gives the tilt and a part of the scale: ∂H/∂z_c = −p_c · (ln p_c + H).
template <typename T>
struct RowGradient {
  T max = 0;
  T scale = 0;
  T upstream = 0;
  T tilt = 0;
  T log_prob = 0;

  // `exp` is exp(z_c − max), `coefficient` is a_c.
  template <typename V>
  CE_HOST_DEVICE static V element(V exp, V coefficient, V scale, V upstream) {
#ifdef __CUDA_ARCH__
    // Which product is fused with the difference is not the compiler's choice: kernels have to agree to the bit.
    return fma(scale, exp, -(upstream * coefficient));
#else
    return scale * exp - upstream * coefficient;
#endif
  }
};

template <typename T>
CE_HOST_DEVICE RowGradient<T> make_row_gradient(const MaxSum<T>& exps, T coefficients, T z_loss,
                                                const RowUpstream<T>& upstream, T entropy = 0) {
  T scale = upstream.loss * (coefficients + z_loss_slope(exps, z_loss)) + upstream.lse - upstream.log_prob;
  if (upstream.entropy != 0) {
    scale += upstream.entropy * (exps.log_sum() - entropy);
  }
  return {exps.max, scale / exps.sum, upstream.loss, -upstream.entropy / exps.sum, upstream.log_prob};
}

}  // namespace ce
