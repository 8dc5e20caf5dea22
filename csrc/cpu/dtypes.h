// The element types that C++ lacks, and what each type is computed in.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../kernels.h"

namespace ce::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

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

// The offset of a row in an operand. Rows are numbered along the grid, its last dimension fastest.
inline int64_t row_offset(const Problem& p, int64_t row, const int64_t (&strides)[kMaxDims]) {
  int64_t offset = 0;
  for (int d = p.dims - 1; d > 0; --d) {
    offset += row % p.sizes[d] * strides[d];
    row /= p.sizes[d];
  }
  return offset + row * strides[0];
}

inline int64_t read_target(const Problem& p, int64_t row) {
  const int64_t offset = row_offset(p, row, p.target.strides);
  switch (p.target_type) {
    case TargetType::kInt32:
      return static_cast<const int32_t*>(p.target.data)[offset];
    case TargetType::kUInt8:
      return static_cast<const uint8_t*>(p.target.data)[offset];
    default:
      return static_cast<const int64_t*>(p.target.data)[offset];
  }
}

}  // namespace ce::cpu
