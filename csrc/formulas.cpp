#include "formulas.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>

#include "checks.h"
#include "problem.h"
#include "row_loss.h"

namespace ce::formulas {
namespace {

using at::Tensor;

// The operands of one call in the accumulator's dtype, the class dimension kept in all of them.
struct Operands {
  int64_t dim;
  Tensor z;             // logits, with 0 in ignored rows
  Tensor w;             // class weights, shaped to broadcast
  Tensor index;         // of class-index targets, 0 in ignored rows
  Tensor kept;          // of class-index targets: 1, or 0 in ignored rows
  Tensor background;    // the coefficients of row_loss.h, but for the part that only an index target has
  Tensor target_part;   // that part, per row
  Tensor coefficients;  // the sum of all coefficients, per row
  Tensor divisor;       // of the mean, else undefined
  double keep, uniform;

  Operands(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Options& options)
      : dim(class_dim(logits)) {
    const auto acc = accumulator_of(logits.scalar_type());
    const auto classes = logits.size(dim);
    const auto smoothing = make_smoothing<double>(options.label_smoothing, classes);
    keep = smoothing.keep;
    uniform = smoothing.uniform;
    z = logits.to(acc);
    at::DimVector broadcast(logits.dim(), 1);
    broadcast[dim] = classes;
    w = weight && weight->defined() ? weight->to(acc).view(broadcast) : at::ones(broadcast, z.options());
    const bool mean = options.reduction == at::Reduction::Mean;
    if (is_probabilities(logits, target)) {
      background = w * (keep * target.to(acc) + uniform);
      coefficients = background.sum(dim, /*keepdim=*/true);
      if (mean) {
        divisor = at::full({}, static_cast<double>(logits.numel()) / static_cast<double>(classes), z.options());
      }
      return;
    }
    const Tensor rows = target.to(at::kLong).reshape(coefficient_shape(logits));
    const Tensor is_kept = rows != options.ignore_index;
    kept = is_kept.to(acc);
    index = rows.masked_fill(is_kept.logical_not(), 0);
    z = z.masked_fill(is_kept.logical_not(), 0);
    const Tensor target_weight = w.expand_as(z).gather(dim, index) * kept;
    background = w * uniform * kept;
    target_part = keep * target_weight;
    coefficients = background.sum(dim, true) + target_part;
    if (mean) {
      divisor = target_weight.sum();
    }
  }

  at::DimVector coefficient_shape(const Tensor& logits) const {
    at::DimVector shape(logits.sizes().begin(), logits.sizes().end());
    shape[dim] = 1;
    return shape;
  }

  // The gradient that reaches each row's loss.
  Tensor upstream(const Tensor& grad_loss, const Options& options) const {
    if (!grad_loss.defined()) {
      return at::zeros({}, z.options());
    }
    Tensor g = grad_loss.to(z.scalar_type());
    if (options.reduction == at::Reduction::None) {
      return g.unsqueeze(dim);
    }
    return divisor.defined() ? g / divisor : g;
  }
};

// The log-sum-exp comes from row_stats, whose backward pass is this project's own again.
Tensor log_probabilities(const Tensor& z, int64_t dim) {
  const Tensor any_target = at::zeros_like(z.select(dim, 0), z.options().dtype(at::kLong));
  return z - std::get<1>(row_stats(z, any_target, std::nullopt, /*ignore_index=*/-100, 0)).unsqueeze(dim);
}

}  // namespace

Tensor lse(const Tensor& logits) {
  return at::logsumexp(logits.to(accumulator_of(logits.scalar_type())), class_dim(logits));
}

Tensor loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Options& options) {
  const Operands o(logits, target, weight, options);
  const Tensor log_p = o.z - at::logsumexp(o.z, o.dim, /*keepdim=*/true);
  Tensor rows = -(o.background * log_p).sum(o.dim);
  if (o.index.defined()) {
    rows = rows - (o.target_part * log_p.gather(o.dim, o.index)).squeeze(o.dim);
  }
  if (options.reduction != at::Reduction::None) {
    rows = o.divisor.defined() ? rows.sum() / o.divisor : rows.sum();
  }
  return rows.to(options.dtype.value_or(logits.scalar_type()));
}

std::array<Tensor, 3> gradients(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& logits,
                                const Tensor& target, const OptionalTensor& weight, const Options& options) {
  const Operands o(logits, target, weight, options);
  const Tensor log_p = log_probabilities(o.z, o.dim);
  const Tensor g = o.upstream(grad_loss, options);

  Tensor logits_grad = g * (o.coefficients * log_p.exp() - o.background);
  if (o.index.defined()) {
    logits_grad = logits_grad.scatter_add(o.dim, o.index, -(g * o.target_part).expand_as(o.index)) * o.kept;
  }
  if (grad_lse.defined()) {
    logits_grad =
        logits_grad + grad_lse.unsqueeze(o.dim) * log_probabilities(logits.to(o.z.scalar_type()), o.dim).exp();
  }
  std::array<Tensor, 3> result{logits_grad.to(logits.scalar_type())};
  if (!o.index.defined()) {
    result[1] = (-g * o.keep * o.w * log_p).to(target.scalar_type());
    if (weight && weight->defined()) {
      const Tensor terms = -g * (o.keep * target.to(o.z.scalar_type()) + o.uniform) * log_p;
      result[2] = terms.transpose(0, o.dim).reshape({logits.size(o.dim), -1}).sum(1).to(weight->scalar_type());
    }
  }
  return result;
}

}  // namespace ce::formulas
