// The registered operators, each as a C++ function that calls it through torch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ce {

// The options that every operator takes. `reduction` is at::Reduction's number; the loss has the dtype of the
// logits, with `full_precision` that of the accumulator: float32 for half types.
struct Options {
  int64_t reduction;
  c10::SymInt ignore_index;
  double label_smoothing;
  bool full_precision = false;
};

using OptionalTensor = std::optional<at::Tensor>;

// Loss with autograd, as torch.nn.functional.cross_entropy; operands of different dtypes are promoted.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, c10::SymInt ignore_index, double label_smoothing, bool full_precision);
// The same whose gradient replaces the logits.
at::Tensor cross_entropy_(at::Tensor logits, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                          c10::SymInt ignore_index, double label_smoothing, bool full_precision);
// Each row's (maximum, logsumexp, loss) with autograd through the last two.
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_stats(const at::Tensor& logits, const at::Tensor& target,
                                                         const OptionalTensor& weight, c10::SymInt ignore_index,
                                                         double label_smoothing);

namespace op {

// The differentiable loss of operands of one dtype; the others are its steps below autograd.
at::Tensor loss(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight, const Options&);
// (loss, max, sum, lse), the last three per row in the accumulator's dtype: max z, Σ exp(z − max), ln Σ exp(z).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& logits, const at::Tensor& target,
                                                                   const OptionalTensor& weight, const Options&);
// (loss, its gradient with respect to the logits); for a reduction.
std::tuple<at::Tensor, at::Tensor> forward_grad(const at::Tensor& logits, const at::Tensor& target,
                                                const OptionalTensor& weight, const Options&);
// The same with the gradient written over the logits.
at::Tensor forward_grad_(at::Tensor logits, const at::Tensor& target, const OptionalTensor& weight, const Options&);
// The gradient of the logits, given those of the loss and of each row's lse.
at::Tensor backward(const at::Tensor& grad_loss, const OptionalTensor& grad_lse, const at::Tensor& logits,
                    const at::Tensor& target, const OptionalTensor& weight, const at::Tensor& max,
                    const at::Tensor& sum, const Options&);
// The same written over the logits.
void backward_(at::Tensor logits, const at::Tensor& grad_loss, const at::Tensor& target, const OptionalTensor& weight,
               const at::Tensor& max, const at::Tensor& sum, const Options&);
// The gradients of probability targets and of the class weights under them.
at::Tensor target_backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                           const OptionalTensor& weight, const at::Tensor& max, const at::Tensor& sum, const Options&);
at::Tensor weight_backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                           const at::Tensor& weight, const at::Tensor& max, const at::Tensor& sum, const Options&);
// grad *= factor, a no-op where the factor is 1.
void scale_(at::Tensor grad, const at::Tensor& factor);

}  // namespace op
}  // namespace ce
