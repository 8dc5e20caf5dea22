// The loss and its gradients written from torch's differentiable operators: for derivatives of gradients, tangents that
// the kernels do not have, and what vmap and DTensors need beside a kernel. Forward and backward passes of plain
// tensors never come here.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "ops.h"

namespace ce::formulas {

// What the reduction divides by; undefined if it is not the mean.
at::Tensor divisor(const Inputs&);

// The row weights, 0 in ignored rows: there they may be NaN or ∞.
at::Tensor row_weight_of(const Inputs&);

// The reduction of each row's loss, row weights included, in the loss's dtype.
at::Tensor reduce(const at::Tensor& rows, const Inputs&);

// The gradient of each row's loss before its row weight, given that of the reduced loss: of shape (), or (rows) without
// a reduction or with row weights.
at::Tensor upstream_of_rows(const at::Tensor& grad_loss, const Inputs&);

// Differentiable in every operand.
at::Tensor loss(const Inputs&);

// What the operator of the name gives; the loss and lse, log_prob, entropy are differentiable in every operand.
Stats stats(int64_t outputs, const Inputs&);

// Of a teacher; the loss is differentiable.
Diverged diverge(const Inputs&);

// The gradient of the tensor among the logits' scales.
at::Tensor logit_scale_gradient(const at::Tensor& grad_loss, const Inputs&);

// The others are of plain inputs. An undefined upstream gradient is 0. Targets and class weights have a gradient where
// the target is probabilities.
at::Tensor logits_gradient(const at::Tensor& grad_loss, const at::Tensor& grad_lse, const Inputs&);
at::Tensor target_gradient(const at::Tensor& grad_loss, const Inputs&);
at::Tensor weight_gradient(const at::Tensor& grad_loss, const Inputs&);

// Of what logits_gradient() gives, given its own upstream gradient: with respect to grad_loss, grad_lse, the
// logits, probability targets and the class weights.
std::array<at::Tensor, 5> gradients_of_gradient(const at::Tensor& upstream, const at::Tensor& grad_loss,
                                                const at::Tensor& grad_lse, const Inputs&);

}  // namespace ce::formulas
