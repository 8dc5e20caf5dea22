// The loss and its gradients written from torch's differentiable operators: what forward-mode AD and double backward
// differentiate, and vmap where it has no other way. Plain forward and backward passes never come here.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "ops.h"

namespace ce::formulas {

// ln Σ exp(z) of each row, in the accumulator's dtype.
at::Tensor lse(const at::Tensor& logits);

// What the reduction divides by; undefined if it is not the mean.
at::Tensor divisor(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight, const Options&);

// The reduction of each row's loss, in the loss's dtype.
at::Tensor reduce(const at::Tensor& rows, const at::Tensor& logits, const at::Tensor& target,
                  const OptionalTensor& weight, const Options&);

// The gradient of each row's loss, given that of the reduced loss: of shape (), or (rows) without a reduction.
at::Tensor upstream_of_rows(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                            const OptionalTensor& weight, const Options&);

at::Tensor loss(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight, const Options&);

// Of the logits, of probability targets and of the class weights; the last two undefined for class indices.
// An undefined upstream gradient is 0.
std::array<at::Tensor, 3> gradients(const at::Tensor& grad_loss, const at::Tensor& grad_lse, const at::Tensor& logits,
                                    const at::Tensor& target, const OptionalTensor& weight, const Options&);

// Of what gradients() gives for the logits, given its own upstream gradient: with respect to grad_loss, grad_lse, the
// logits, probability targets and the class weights.
std::array<at::Tensor, 5> gradients_of_gradient(const at::Tensor& upstream, const at::Tensor& grad_loss,
                                                const at::Tensor& grad_lse, const at::Tensor& logits,
                                                const at::Tensor& target, const OptionalTensor& weight, const Options&);

}  // namespace ce::formulas
