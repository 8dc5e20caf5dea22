// The kernels of tile.h that stage logits and gradients. Included by tile_kernels.h, so without a guard.

namespace ce::cpu::CE_ISA {

template <typename T>
void stage_in(const Problem& p, int64_t first, int64_t rows, void* columns) {
  using A = Acc<T>;
  constexpr int64_t kClassesAhead = 4;
  const T* const data = static_cast<const T*>(p.logits.data) + row_offset(p, first, p.logits.strides);
  const int64_t row_stride = p.logits.strides[p.dims - 1], class_stride = p.logits.class_stride;
  const int64_t step = columns_of_tile(p, kLanes<A>);
  auto* const to = static_cast<Vec<A>*>(columns);
  if (class_stride == 1) {
    return transpose_in(data, row_stride, static_cast<int>(rows), p.classes, to);
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const T* from = data + c * class_stride;
    Vec<A>* column = to + c;
    for (int64_t row = 0; row < rows; row += kLanes<A>, from += kLanes<A> * row_stride, column += step) {
      __builtin_prefetch(from + kClassesAhead * class_stride);
      *column = load(from, row_stride, rows - row < kLanes<A> ? static_cast<int>(rows - row) : kLanes<A>);
    }
  }
}

template <typename T>
void stage_out(const Problem& p, int64_t first, int64_t rows, const void* columns) {
  using A = Acc<T>;
  T* const data = static_cast<T*>(p.grad.data) + row_offset(p, first, p.grad.strides);
  const int64_t row_stride = p.grad.strides[p.dims - 1], class_stride = p.grad.class_stride;
  const int64_t step = columns_of_tile(p, kLanes<A>);
  const auto* const from = static_cast<const Vec<A>*>(columns);
  if (class_stride == 1 && rows <= kLanes<A>) {
    return transpose_out(from, data, row_stride, static_cast<int>(rows), p.classes);
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    T* to = data + c * class_stride;
    const Vec<A>* column = from + c;
    for (int64_t row = 0; row < rows; row += kLanes<A>, to += kLanes<A> * row_stride, column += step) {
      store(to, row_stride, rows - row < kLanes<A> ? static_cast<int>(rows - row) : kLanes<A>, *column);
    }
  }
}

}  // namespace ce::cpu::CE_ISA
