// The upstream gradient that comes after the gradient: a factor, mostly 1.

#include "row.cuh"

namespace ce::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 1024;  // a power of two

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_elements(T* data, int64_t count, const void* factor, DType factor_type) {
  using A = Acc<T>;
  const A scalar = static_cast<A>(load_as_double(factor, 0, factor_type));
  if (scalar == 1) {
    return;
  }
  const Along<T> walk(data, 0, 1, count);
  const Companion<T> out(data, 1, walk);
  Plan plan;  // for which all elements are one row
  plan.threads = plan.lanes = kThreads;
  plan.blocks = gridDim.x;
  for_each_piece(walk, Along<T>::seat(plan), [&](int64_t i, const auto& piece) {
    constexpr int kSize = std::decay_t<decltype(piece)>::kSize;
    A values[kSize];
    unpack(piece, values);
    for (A& value : values) {
      value *= scalar;
    }
    out.write(i, pack<T, kSize>(values));
  });
}

}  // namespace

void scale(DType dtype, void* data, int64_t count, const void* factor, DType factor_type, Stream stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t pieces = count * sizeof(T) / 16 + 1;
    int blocks = 1;
    while (blocks < kMostBlocks && int64_t{blocks} * kThreads < pieces) {
      blocks *= 2;
    }
    launch(scale_elements<T>, {blocks, kThreads}, stream, static_cast<T*>(data), count, factor, factor_type);
  });
}

}  // namespace ce::cuda
