// The loss of a row whose target names some of its classes, i_j with a probability q_j each, as the top of a teacher's
// softmax. The rest of the mass belongs to nobody, u = 0, or is spread over the other classes:
//
//     u    = max(0, 1 − Σ_j q_j) / (classes − picks)
//     a_c  = u + Σ_j [c = i_j] · (q_j − u)
//
// are the coefficients of row_loss.h. The Kullback–Leibler divergence adds Σ_j q_j · ln q_j + (classes − picks) · u ·
// ln u, which does not depend on the logits.
#pragma once

#include "row_loss.h"

namespace ce {

// What is known of a row before the pass over its classes.
template <typename T>
struct PickedRow {
  RowState<T> state;  // of the picks alone, without their exponentials
  T background = 0;   // u
  T constant = 0;

  // What a pick adds to the constant.
  CE_HOST_DEVICE static T negative_entropy(T q) { return q > 0 ? q * std::log(q) : T(0); }

  // From Σ q_j and Σ q_j · ln q_j.
  CE_HOST_DEVICE PickedRow(T mass, T negative_entropies, int64_t picks, int64_t classes, bool spreads,
                           bool is_divergence) {
    const int64_t others = classes - picks;
    background = spreads && others > 0 && mass < 1 ? (1 - mass) / T(others) : T(0);
    constant = is_divergence ? negative_entropies + T(others) * negative_entropy(background) : T(0);
  }
  PickedRow() = default;

  // Whether a coefficient besides the background adds nothing to the linear terms: where it is 0, and for a class of
  // logit −∞, to which the background has given a loss of ∞. For scalars and for SIMD vectors.
  template <typename V>
  CE_HOST_DEVICE static auto adds_nothing(V coefficient, V logit) {
    return (coefficient == 0) | ((coefficient < 0) & (logit == -INFINITY));
  }

  // Returns the pick's coefficient besides the background.
  CE_HOST_DEVICE T add(T q, T logit) {
    if (logit > state.exps.max) {
      state.raise(logit);
    }
    if (adds_nothing(q - background, logit)) {
      state.coefficients += q - background;
    } else {
      state.add(q - background, logit);
    }
    return q - background;
  }

  // With what the pass has found, in which every class has the coefficient 1, or 0 if there is no background. The
  // constant becomes a part of the linear terms, which the loss has with the other sign.
  template <typename S>
  CE_HOST_DEVICE RowState<S> complete(RowState<S> classes) const {
    classes.linear = background == 0 ? S(0) : classes.linear * S(background);
    classes.coefficients *= S(background);
    RowState<S> result = classes.merge({{S(state.exps.max), 0}, S(state.linear), S(state.coefficients)});
    result.linear -= S(constant);
    return result;
  }
  CE_HOST_DEVICE T coefficients(int64_t classes) const { return background * T(classes) + state.coefficients; }
  // The same of the gradient of the other classes.
  CE_HOST_DEVICE RowGradient<T> gradient_of_others(RowGradient<T> row) const {
    row.upstream *= background;
    return row;
  }
};

}  // namespace ce
