#include "formulas.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <c10/util/irange.h>

#include "checks.h"
#include "problem.h"
#include "row_loss.h"

namespace ce::formulas {
namespace {

using at::Tensor;

c10::SymInt rows_of(const Tensor& logits) {
  c10::SymInt rows = 1;
  for (const auto d : c10::irange(logits.dim())) {
    rows *= d == class_dim(logits) ? c10::SymInt(1) : logits.sym_size(d);
  }
  return rows;
}

// Compared as int64: an ignore_index of -100 is no uint8.
Tensor is_ignored(const Tensor& target, const Options& options) {
  return target.to(at::kLong) == at::Scalar(options.ignore_index);
}

// 0 in ignored rows, and a class in those that are out of bounds: a kernel of this project reports them.
Tensor index_of(const Tensor& target, const Tensor& logits, const Options& options) {
  const Tensor index = target.to(at::kLong).masked_fill(is_ignored(target, options), 0);
  return index.clamp(0, logits.sym_size(class_dim(logits)) - 1);
}

// The operands of one call in the accumulator's dtype, the class dimension kept in all of them.
struct Operands {
  int64_t dim;
  Tensor z;             // logits, with 0 in ignored rows
  Tensor w;             // class weights, shaped to broadcast
  Tensor index;         // of class-index targets
  Tensor kept;          // of class-index targets: 1, or 0 in ignored rows
  Tensor background;    // the coefficients of row_loss.h, but for that of an index target; undefined if they are 0
  Tensor target_part;   // that one, per row
  Tensor coefficients;  // the sum of all coefficients, per row
  double keep, uniform;

  Operands(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Options& options)
      : dim(class_dim(logits)) {
    const auto acc = accumulator_of(logits.scalar_type());
    const auto smoothing =
        make_smoothing<double>(options.label_smoothing, logits.sym_size(dim).guard_int(__FILE__, __LINE__));
    keep = smoothing.keep;
    uniform = smoothing.uniform;
    z = logits.to(acc);
    c10::SymDimVector broadcast(logits.dim(), 1);
    broadcast[dim] = logits.sym_size(dim);
    w = weight && weight->defined() ? weight->to(acc).view_symint(broadcast) : at::ones_symint(broadcast, z.options());
    if (is_probabilities(logits, target)) {
      background = w * (keep * target.to(acc) + uniform);
      coefficients = background.sum(dim, /*keepdim=*/true);
      return;
    }
    c10::SymDimVector column(logits.sym_sizes().begin(), logits.sym_sizes().end());
    column[dim] = 1;
    const Tensor ignored = is_ignored(target, options).reshape_symint(column);
    kept = ignored.logical_not().to(acc);
    index = index_of(target, logits, options).reshape_symint(column);
    z = z.masked_fill(ignored, 0);
    target_part = keep * w.expand_as(z).gather(dim, index) * kept;
    coefficients = target_part;
    if (uniform != 0) {
      background = w * uniform * kept;
      coefficients = coefficients + background.sum(dim, true);
    }
  }
};

// The log-sum-exp comes from row_stats, whose backward pass is this project's own again.
Tensor log_probabilities(const Tensor& z, int64_t dim) {
  const Tensor any_target = at::zeros_like(z.select(dim, 0), z.options().dtype(at::kLong));
  return z - std::get<1>(row_stats(z, any_target, std::nullopt, /*ignore_index=*/-100, 0)).unsqueeze(dim);
}

Tensor sum_to_classes(const Tensor& terms, const Tensor& weight, int64_t dim) {
  return terms.transpose(0, dim).reshape_symint({terms.sym_size(dim), -1}).sum(1).to(weight.scalar_type());
}

// The gradient of each row's loss, to be broadcast over its classes.
Tensor upstream_column(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                       const OptionalTensor& weight, const Options& options) {
  const Tensor g = upstream_of_rows(grad_loss, logits, target, weight, options);
  return options.reduction == at::Reduction::None && grad_loss.defined() ? g.unsqueeze(class_dim(logits)) : g;
}

}  // namespace

Tensor lse(const Tensor& logits) {
  return at::logsumexp(logits.to(accumulator_of(logits.scalar_type())), class_dim(logits));
}

Tensor divisor(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Options& options) {
  if (options.reduction != at::Reduction::Mean) {
    return {};
  }
  const auto acc = accumulator_of(logits.scalar_type());
  if (is_probabilities(logits, target)) {
    return at::full_symint({}, rows_of(logits), logits.options().dtype(acc));
  }
  const Tensor kept = is_ignored(target, options).logical_not().to(acc);
  if (!weight || !weight->defined()) {
    return kept.sum();
  }
  return (at::index(weight->to(acc), {index_of(target, logits, options)}) * kept).sum();
}

Tensor reduce(const Tensor& rows, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
              const Options& options) {
  Tensor result = rows;
  if (options.reduction != at::Reduction::None) {
    const Tensor by = divisor(logits, target, weight, options);
    result = by.defined() ? rows.sum() / by : rows.sum();
  }
  return result.to(loss_dtype(logits, options));
}

Tensor upstream_of_rows(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                        const OptionalTensor& weight, const Options& options) {
  const auto acc = accumulator_of(logits.scalar_type());
  if (!grad_loss.defined()) {
    return at::zeros({}, logits.options().dtype(acc));
  }
  const Tensor by = divisor(logits, target, weight, options);
  return by.defined() ? grad_loss.to(acc) / by : grad_loss.to(acc);
}

Tensor loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Options& options) {
  const Operands o(logits, target, weight, options);
  const Tensor lse = at::logsumexp(o.z, o.dim, /*keepdim=*/true);
  Tensor rows;
  if (o.index.defined()) {
    rows = o.target_part * (lse - o.z.gather(o.dim, o.index));
  }
  if (o.background.defined()) {
    const Tensor others = (o.background * (lse - o.z)).sum(o.dim, true);
    rows = rows.defined() ? rows + others : others;
  }
  return reduce(rows.squeeze(o.dim), logits, target, weight, options);
}

Tensor logits_gradient(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& logits, const Tensor& target,
                       const OptionalTensor& weight, const Options& options) {
  const Operands o(logits, target, weight, options);
  const Tensor g = upstream_column(grad_loss, logits, target, weight, options);
  Tensor grad = o.coefficients * log_probabilities(o.z, o.dim).exp();
  grad = g * (o.background.defined() ? grad - o.background : grad);
  if (o.index.defined()) {
    grad = grad.scatter_add(o.dim, o.index, -(g * o.target_part).expand_as(o.index)) * o.kept;
  }
  if (grad_lse.defined()) {
    grad = grad + grad_lse.unsqueeze(o.dim) * log_probabilities(logits.to(o.z.scalar_type()), o.dim).exp();
  }
  return grad.to(logits.scalar_type());
}

Tensor target_gradient(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                       const OptionalTensor& weight, const Options& options) {
  const Operands o(logits, target, weight, options);
  const Tensor g = upstream_column(grad_loss, logits, target, weight, options);
  return (-g * o.keep * o.w * log_probabilities(o.z, o.dim)).to(target.scalar_type());
}

Tensor weight_gradient(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& weight,
                       const Options& options) {
  const Operands o(logits, target, weight, options);
  const Tensor g = upstream_column(grad_loss, logits, target, weight, options);
  const Tensor smoothed = o.keep * target.to(o.z.scalar_type()) + o.uniform;
  return sum_to_classes(-g * smoothed * log_probabilities(o.z, o.dim), weight, o.dim);
}

// With logits_gradient() G_c = g (A p_c − a_c) + h p_c, a the coefficients and A their sum, and v its upstream
// gradient.
std::array<Tensor, 5> gradients_of_gradient(const Tensor& upstream, const Tensor& grad_loss, const Tensor& grad_lse,
                                            const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                            const Options& options) {
  const Operands o(logits, target, weight, options);
  const auto acc = o.z.scalar_type();
  const Tensor v = upstream.to(acc);
  const Tensor g = upstream_column(grad_loss, logits, target, weight, options);
  const Tensor p = log_probabilities(o.z, o.dim).exp();
  const Tensor vp = (v * p).sum(o.dim, /*keepdim=*/true);

  std::array<Tensor, 5> result;
  result[2] = g * o.coefficients * p * (v - vp);
  if (grad_lse.defined()) {
    const Tensor q = log_probabilities(logits.to(acc), o.dim).exp();  // also of ignored rows
    const Tensor vq = (v * q).sum(o.dim, true);
    result[1] = vq.squeeze(o.dim).to(grad_lse.scalar_type());
    result[2] = result[2] + grad_lse.to(acc).unsqueeze(o.dim) * q * (v - vq);
  }
  result[2] = result[2].to(logits.scalar_type());
  if (grad_loss.defined()) {
    Tensor of_rows = o.coefficients * vp;
    if (o.index.defined()) {
      of_rows = of_rows - o.target_part * v.gather(o.dim, o.index);
    }
    if (o.background.defined()) {
      of_rows = of_rows - (o.background * v).sum(o.dim, true);
    }
    Options in_dtype_of_sum = options;
    in_dtype_of_sum.full_precision = true;
    result[0] = reduce(of_rows.squeeze(o.dim), logits, target, weight, in_dtype_of_sum).to(grad_loss.scalar_type());
  }
  if (!o.index.defined()) {
    const Tensor of_coefficients = g * (vp - v);
    result[3] = (o.keep * o.w * of_coefficients).to(target.scalar_type());
    if (weight && weight->defined()) {
      result[4] = sum_to_classes((o.keep * target.to(acc) + o.uniform) * of_coefficients, *weight, o.dim);
    }
  }
  return result;
}

}  // namespace ce::formulas
