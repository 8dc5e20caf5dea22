// From tensors to the kernels' problem.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include "operands.h"
#include "ops.h"

namespace ce {

inline at::ScalarType accumulator_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::ScalarType loss_dtype(const Inputs& in) {
  const at::ScalarType logits = in.logits.scalar_type();
  return in.options.full_precision ? accumulator_of(logits) : logits;
}

DType dtype_of(const at::Tensor& tensor);

// A scalar on the CPU, and a tensor in the accumulator's dtype. For a scalar both cost less than torch's operators do.
at::Tensor make_scalar(double value, const at::TensorOptions& options);
at::Tensor to_accumulator(const at::Tensor& tensor, at::ScalarType accumulator);

// Builds the problem of one call, and keeps the tensors that it points to. The operands of shape (rows) or
// (rows, classes) are added one by one; problem() then lays their rows out on one grid.
class ProblemBuilder {
 public:
  explicit ProblemBuilder(const Inputs&);
  ProblemBuilder(const ProblemBuilder&) = delete;

  at::ScalarType accumulator() const { return accumulator_of(logits_.scalar_type()); }
  // The shape of the rows: the logits' without the classes.
  at::IntArrayRef row_sizes() const { return row_sizes_; }
  // Whether there is nothing to compute. Rows without classes can still have an index, which is out of bounds.
  bool is_empty() const { return problem_.rows == 0 || (problem_.classes == 0 && !has_indices(problem_)); }

  // A new tensor of shape (rows) in the accumulator's dtype, for one of the problem's row results.
  at::Tensor add_row_result(void* Problem::* result);
  at::Tensor add_row_result(int64_t* Problem::* result);
  // What an earlier call left in one.
  void add_row_input(void* Problem::* input, const at::Tensor& rows);
  // Upstream gradients, of shape (rows) or ().
  void add_grad_loss(const at::Tensor& grad);
  void add_row_upstream(Input Problem::* input, const OptionalTensor& grad);
  // The destination of a gradient of the logits' shape.
  void add_grad(const at::Tensor& grad, bool streams);

  // Valid as long as the builder is.
  Problem& problem();

 private:
  struct Operand {
    int64_t* strides;
    c10::DimVector rows;
  };
  void add_rows(Input Problem::* input, const at::Tensor& rows);
  Scalar scalar_of(double factor, const OptionalTensor& tensor);
  void add_operand(int64_t* strides, const at::Tensor& tensor, bool has_classes);

  const at::Tensor logits_, target_;
  const int64_t class_dim_;
  c10::DimVector row_sizes_;
  c10::SmallVector<at::Tensor, 4> kept_;
  c10::SmallVector<Operand, 7> operands_;
  Problem problem_;
};

}  // namespace ce
