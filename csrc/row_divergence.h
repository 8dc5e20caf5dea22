// How far a row's softmax is from that of a teacher's logits, and the gradients of both.
//
// With the logits z and the teacher's t, p = softmax(z) and q = softmax(t):
//
//     D = Σ_c q_c · (κ · ln q_c − ln p_c),   or reversed   Σ_c p_c · (κ · ln p_c − ln q_c)
//
// is the Kullback–Leibler divergence with κ = 1 and the cross-entropy with κ = 0. Both are of one softmax A =
// softmax(a) from another B = softmax(b). With u_c = a_c − max a and v_c = b_c − max b:
//
//     M        = Σ_c A_c · (κ · u_c − v_c)
//     D        = M − κ · ln Σ exp(u) + ln Σ exp(v)
//     ∂D/∂a_c  = A_c · (κ · u_c − v_c − M)
//     ∂D/∂b_c  = B_c − A_c
//
// The terms of M are differences of what belongs together, so that those of close softmaxes stay small.
#pragma once

#include "row_loss.h"

namespace ce {

// What the one pass over both rows leaves behind.
template <typename T>
struct RowDivergence {
  MaxSum<T> of, from;
  T cross = 0;  // Σ exp(u_c) · (κ · u_c − v_c)
  T kappa = 1;

  // Of one class, for scalars and SIMD vectors. Where exp(u) is 0, so is the term: 0 · ∞ is none.
  template <typename V>
  CE_HOST_DEVICE static V term(V exp, V u, V v, V kappa) {
    return exp == 0 ? V{} : exp * (kappa * u - v);
  }

  // Makes all sums relative to maxima that are at least theirs.
  CE_HOST_DEVICE void raise(T top_of, T top_from) {
    const T factor = MaxSum<T>::rescale(of.max, top_of);
    const T step = of.max == -INFINITY ? T(0) : top_of - of.max;
    const T shift = from.max == -INFINITY ? T(0) : top_from - from.max;
    cross = factor == 0 ? T(0) : (cross + of.sum * (shift - kappa * step)) * factor;
    of.raise(top_of);
    from.raise(top_from);
  }

  CE_HOST_DEVICE RowDivergence merge(RowDivergence other) const {
    RowDivergence result = *this;
    const T top_of = other.of.max > of.max ? other.of.max : of.max;
    const T top_from = other.from.max > from.max ? other.from.max : from.max;
    result.raise(top_of, top_from);
    other.raise(top_of, top_from);
    result.of.sum += other.of.sum;
    result.from.sum += other.from.sum;
    result.cross += other.cross;
    return result;
  }

  // Of the logits and of the teacher's; a reference to one or the other would keep a GPU from holding them in
  // registers.
  CE_HOST_DEVICE MaxSum<T> logits(bool reverse) const {
    return {reverse ? of.max : from.max, reverse ? of.sum : from.sum};
  }
  CE_HOST_DEVICE MaxSum<T> teacher(bool reverse) const { return logits(!reverse); }

  CE_HOST_DEVICE T mean() const { return cross / of.sum; }
  CE_HOST_DEVICE T value() const { return mean() - kappa * of.log_sum() + from.log_sum(); }
};

// The gradient of one of the two rows of logits, its own, ready for each class: with the other's exponentials and
// distances from the maximum,
//
//     exp(own) · (scale + tilt · (κ · own − other)) − upstream · exp(other)
template <typename T>
struct DivergenceGradient {
  T own_max = 0;
  T other_max = 0;
  T scale = 0;
  T tilt = 0;      // not 0 only of a softmax of which the divergence is
  T upstream = 0;  // not 0 only of one from which it is

  // For scalars and SIMD vectors; u and v are the distances.
  template <typename V>
  CE_HOST_DEVICE static V element_of(V exp, V u, V v, V kappa, V scale, V tilt) {
    return scale * exp + tilt * RowDivergence<T>::term(exp, u, v, kappa);
  }
  template <typename V>
  CE_HOST_DEVICE static V element_from(V exp, V other_exp, V scale, V upstream) {
    return scale * exp - upstream * other_exp;
  }
};

// `of_lse` is what the row's log-sum-exp gets besides.
template <typename T>
CE_HOST_DEVICE DivergenceGradient<T> make_divergence_gradient(const MaxSum<T>& own, const MaxSum<T>& other, bool is_of,
                                                              T mean, T upstream, T of_lse) {
  return is_of ? DivergenceGradient<T>{own.max, other.max, (of_lse - upstream * mean) / own.sum, upstream / own.sum, 0}
               : DivergenceGradient<T>{own.max, other.max, (of_lse + upstream) / own.sum, 0, upstream / other.sum};
}

}  // namespace ce
