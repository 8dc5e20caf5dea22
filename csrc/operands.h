// How the kernels of all backends address a problem's operands: element types, offsets of rows, targets.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "row_divergence.h"

namespace ce {

// Element types that C++ lacks.

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What each type is computed in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccumulatorOf<std::remove_const_t<T>>::type;

// The one switch over element types: calls f with a value of the type that `dtype` names.
template <typename F>
inline auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double());
    case DType::kFloat16:
      return f(Float16());
    case DType::kBFloat16:
      return f(BFloat16());
    default:
      return f(float());
  }
}

CE_HOST_DEVICE int64_t divide(int64_t n, const Divider& by) {
#ifdef __CUDA_ARCH__
  const uint64_t high = __umul64hi(n, by.multiplier);
#else
  const uint64_t high = static_cast<uint64_t>(static_cast<unsigned __int128>(n) * by.multiplier >> 64);
#endif
  return static_cast<int64_t>(high >> by.shift);
}

// The offset of a row in an operand. Rows are numbered along the grid, its last dimension fastest.
template <typename P>
CE_HOST_DEVICE int64_t row_offset(const P& p, int64_t row, const int64_t (&strides)[kMaxDims]) {
  if (p.dims <= 1) {
    return row * strides[0];
  }
  if (p.dims == 2) {
    const int64_t outer = divide(row, p.dividers[1]);
    return outer * strides[0] + (row - outer * p.sizes[1]) * strides[1];
  }
  int64_t offset = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (int d = p.dims - 1; d > 0; --d) {
    const int64_t rest = divide(row, p.dividers[d]);
    offset += (row - rest * p.sizes[d]) * strides[d];
    row = rest;
  }
  return offset + row * strides[0];
}

template <typename P>
CE_HOST_DEVICE int64_t read_index(const P& p, int64_t offset) {
  switch (p.target_type) {
    case TargetType::kInt32:
      return static_cast<const int32_t*>(p.target.data)[offset];
    case TargetType::kUInt8:
      return static_cast<const uint8_t*>(p.target.data)[offset];
    default:
      return static_cast<const int64_t*>(p.target.data)[offset];
  }
}

template <typename P>
CE_HOST_DEVICE int64_t read_target(const P& p, int64_t row) {
  return read_index(p, row_offset(p, row, p.target.strides));
}

template <typename P>
CE_HOST_DEVICE int64_t all_classes(const P& p) {
  return p.all_classes > 0 ? p.all_classes : p.classes;
}

template <typename P>
CE_HOST_DEVICE bool is_out_of_bounds(const P& p, int64_t target) {
  return target < 0 || target >= all_classes(p);
}

// Which of the problem's classes a target within bounds names; −1: another shard's.
template <typename P>
CE_HOST_DEVICE int64_t own_class(const P& p, int64_t target) {
  const int64_t c = target - p.first_class;
  return c >= 0 && c < p.classes ? c : -1;
}

template <typename A>
CE_HOST_DEVICE Smoothing<A> smoothing_of(const Problem& p) {
  return p.picks > 0 ? Smoothing<A>{1, A(p.spreads)} : make_smoothing<A>(p.label_smoothing, all_classes(p));
}

template <typename A>
CE_HOST_DEVICE A value_of(const Scalar& scalar) {
  return scalar.data ? A(scalar.value) * *static_cast<const A*>(scalar.data) : A(scalar.value);
}

// What a mean divides by whose weights sum up to `weight`.
CE_HOST_DEVICE double divisor_of_mean(double weight, const Problem& p) {
  return weight == 0 && p.zero_if_empty ? INFINITY : weight;
}

// Whether the loss is of other logits than those that are given.
CE_HOST_DEVICE bool transforms(const Problem& p) {
  return p.logit_scale.value != 1 || p.logit_scale.data || p.softcap > 0;
}

template <typename A>
CE_HOST_DEVICE LogitTransform<A> transform_of(const Problem& p) {
  return {value_of<A>(p.logit_scale), A(p.softcap)};
}

template <typename A>
CE_HOST_DEVICE LogitTransform<A> teacher_transform_of(const Problem& p) {
  return {A(p.teacher_scale), 0};
}

// A row's value of an operand of shape (rows) in the accumulator's type, or `otherwise` where there is none.
template <typename A, typename P>
CE_HOST_DEVICE A row_value(const P& p, const Input& operand, int64_t row, A otherwise) {
  return operand.data ? static_cast<const A*>(operand.data)[row_offset(p, row, operand.strides)] : otherwise;
}

// An operand that is known not to be there.
struct Absent {
  static constexpr const void* data = nullptr;
};
template <typename A, typename P>
CE_HOST_DEVICE A row_value(const P&, Absent, int64_t, A otherwise) {
  return otherwise;
}

// What a row adds to a sum of losses: one without a loss, as an ignored row, nothing, even if its weight is ∞ or NaN.
template <typename A>
CE_HOST_DEVICE A weighted_loss(A row_weight, A loss) {
  return loss == 0 ? loss : row_weight * loss;
}

// Whether a row with a teacher or picks is read: one without weight has no loss, whatever its logits are.
template <typename A>
CE_HOST_DEVICE bool counts(const Problem& p, int64_t row) {
  return row_value<A>(p, p.row_weight, row, 1) != 0;
}

// The gradient of a row's logits or of its teacher's.
template <typename A>
CE_HOST_DEVICE DivergenceGradient<A> divergence_gradient_of(const Problem& p, const MaxSum<A>& logits,
                                                            const MaxSum<A>& teacher, A mean, A upstream,
                                                            bool of_teacher) {
  return of_teacher ? make_divergence_gradient(teacher, logits, !p.reverse, mean, upstream, A(0))
                    : make_divergence_gradient(logits, teacher, p.reverse, mean, upstream,
                                               upstream * z_loss_slope(logits, A(p.z_loss)));
}

// Whether more is asked of rows than what the loss needs.
CE_HOST_DEVICE bool has_stats(const Problem& p) {
  return p.log_prob || p.entropy || p.argmax || p.rank;
}

// Whether anything is asked of a row that does not depend on its target.
CE_HOST_DEVICE bool reads_ignored_rows(const Problem& p) {
  return p.lse || p.entropy || p.argmax;
}

// Whether gradients reach an ignored row too, which has no loss, but a log-sum-exp and an entropy.
CE_HOST_DEVICE bool reaches_ignored_rows(const Problem& p) {
  return p.grad_lse.data || p.grad_entropy.data;
}

// What the order of the given logits has to be multiplied with to be that of the formula's, of which a softcap may
// round different ones to the same.
template <typename A>
CE_HOST_DEVICE A order_of_logits(const Problem& p) {
  const A scale = value_of<A>(p.logit_scale);
  return A(scale > 0) - A(scale < 0);
}

// Whether targets are indices of classes, one of each row.
template <typename P>
CE_HOST_DEVICE bool has_indices(const P& p) {
  return p.target_type < TargetType::kProbabilities && p.picks == 0;
}

// Whether classes other than an index target have coefficients.
CE_HOST_DEVICE bool has_coefficients(const Problem& p) {
  return p.target_type == TargetType::kProbabilities || p.label_smoothing > 0 || (p.picks > 0 && p.spreads);
}

}  // namespace ce
