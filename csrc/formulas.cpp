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

c10::SymInt classes_of(const Inputs& in) {
  return in.options.valid_classes.value_or(in.logits.sym_size(class_dim(in.logits)));
}

// Without the columns of padding.
Tensor valid(const Tensor& tensor, int64_t dim, const Inputs& in) {
  return in.options.valid_classes ? tensor.narrow_symint(dim, 0, *in.options.valid_classes) : tensor;
}

// With them, as zeros.
Tensor padded(const Tensor& grad, int64_t dim, const Tensor& like) {
  if (grad.sym_size(dim) == like.sym_size(dim)) {
    return grad;
  }
  c10::SymDimVector sizes(grad.sym_sizes().begin(), grad.sym_sizes().end());
  sizes[dim] = like.sym_size(dim) - grad.sym_size(dim);
  return at::cat({grad, at::zeros_symint(sizes, grad.options())}, dim);
}

// Compared as int64: an ignore_index of -100 is no uint8.
Tensor is_ignored(const Inputs& in) {
  return in.target.to(at::kLong) == at::Scalar(in.options.ignore_index);
}

// 0 in ignored rows, and a class in those that are out of bounds: a kernel of this project reports them.
Tensor index_of(const Inputs& in) {
  const c10::SymInt classes = in.options.all_classes ? c10::SymInt(*in.options.all_classes) : classes_of(in);
  return in.target.to(at::kLong).masked_fill(is_ignored(in), 0).clamp(0, classes - 1);
}

// From logits as they are given to those that the loss is of.
Tensor transformed(const Tensor& logits, const Inputs& in) {
  Tensor z = logits;
  if (in.options.logit_scale != 1) {
    z = z * in.options.logit_scale;
  }
  if (in.logit_scale) {
    z = z * in.logit_scale->to(z.scalar_type());
  }
  if (in.options.softcap) {
    z = *in.options.softcap * at::tanh(z / *in.options.softcap);
  }
  return z;
}

// The operands of one call in the accumulator's dtype, the class dimension kept in all of them.
struct Operands {
  int64_t dim;
  Tensor z;             // the loss's logits, with 0 in ignored rows
  Tensor w;             // class weights, shaped to broadcast
  Tensor q;             // probabilities
  Tensor index;         // of class-index targets
  Tensor kept;          // of class-index targets: 1, or 0 in ignored rows
  Tensor background;    // the coefficients of row_loss.h, but for that of an index target; undefined if they are 0
  Tensor target_part;   // that one, per row
  Tensor coefficients;  // the sum of all coefficients, per row
  double keep, uniform;

  explicit Operands(const Inputs& in) : dim(class_dim(in.logits)) {
    TORCH_CHECK_NOT_IMPLEMENTED(!in.is_shard(), "cross_entropy: a shard of the classes has kernels only");
    const auto acc = accumulator_of(in.logits.scalar_type());
    const auto smoothing =
        make_smoothing<double>(in.options.label_smoothing, classes_of(in).guard_int(__FILE__, __LINE__));
    keep = smoothing.keep;
    uniform = smoothing.uniform;
    const Tensor x = valid(in.logits, dim, in).to(acc);
    c10::SymDimVector broadcast(x.dim(), 1);
    broadcast[dim] = x.sym_size(dim);
    w = in.weight && in.weight->defined() ? valid(in.weight->to(acc), 0, in).view_symint(broadcast)
                                          : at::ones_symint(broadcast, x.options());
    if (is_probabilities(in)) {
      z = transformed(x, in);
      q = valid(in.target, dim, in).to(acc);
      background = w * (keep * q + uniform);
      coefficients = background.sum(dim, /*keepdim=*/true);
      return;
    }
    c10::SymDimVector column(x.sym_sizes().begin(), x.sym_sizes().end());
    column[dim] = 1;
    const Tensor ignored = is_ignored(in).reshape_symint(column);
    kept = ignored.logical_not().to(acc);
    index = index_of(in).reshape_symint(column);
    z = transformed(x.masked_fill(ignored, 0), in);
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
Tensor upstream_column(const Tensor& grad_loss, const Inputs& in) {
  const Tensor g = upstream_of_rows(grad_loss, in);
  return g.dim() == in.logits.dim() - 1 ? g.unsqueeze(class_dim(in.logits)) : g;
}

}  // namespace

Tensor row_weight_of(const Inputs& in) {
  Tensor weight = in.row_weight->to(accumulator_of(in.logits.scalar_type()));
  weight = is_index(in) ? weight.masked_fill(is_ignored(in), 0) : weight;
  return in.logits.dim() == 1 ? weight.reshape({}) : weight;
}

Tensor divisor(const Inputs& in) {
  if (in.options.reduction != at::Reduction::Mean) {
    return {};
  }
  const auto acc = in.logits.options().dtype(accumulator_of(in.logits.scalar_type()));
  if (in.divides_by_given()) {
    const Tensor by = at::full({}, in.options.divisor.value_or(1), acc);
    return in.divisor ? by * in.divisor->to(acc) : by;
  }
  Tensor of_rows;
  if (is_index(in)) {
    of_rows = is_ignored(in).logical_not().to(acc.dtype());
    if (in.weight && in.weight->defined()) {
      of_rows = at::index(in.weight->to(acc.dtype()), {index_of(in)}) * of_rows;
    }
    of_rows = in.logits.dim() == 1 ? of_rows.reshape({}) : of_rows;
  }
  if (in.row_weight) {
    of_rows = of_rows.defined() ? of_rows * row_weight_of(in) : row_weight_of(in);
  }
  const Tensor by = of_rows.defined() ? of_rows.sum() : at::full_symint({}, rows_of(in.logits), acc);
  return in.options.zero_if_empty ? by.masked_fill(by == 0, INFINITY) : by;
}

Tensor reduce(const Tensor& rows, const Inputs& in) {
  // Converted once, so that its gradients are added up before they are rounded.
  const OptionalTensor weight = in.row_weight ? OptionalTensor(row_weight_of(in)) : std::nullopt;
  Tensor result = weight ? rows * *weight : rows;
  if (in.options.reduction != at::Reduction::None) {
    const Tensor by =
        divisor({in.logits, in.target, in.weight, in.options, weight, in.logit_scale, in.divisor, in.picked});
    result = by.defined() ? result.sum() / by : result.sum();
  }
  return result.to(loss_dtype(in));
}

Tensor upstream_of_rows(const Tensor& grad_loss, const Inputs& in) {
  const auto acc = accumulator_of(in.logits.scalar_type());
  if (!grad_loss.defined()) {
    return at::zeros({}, in.logits.options().dtype(acc));
  }
  const Tensor by = divisor(in);
  const Tensor g = by.defined() ? grad_loss.to(acc) / by : grad_loss.to(acc);
  return in.row_weight ? g * row_weight_of(in) : g;
}

// Of classes that are picked, as row_picks.h has it.
Tensor loss_of_picks(const Inputs& in) {
  const auto acc = accumulator_of(in.logits.scalar_type());
  const int64_t dim = class_dim(in.logits);
  const Tensor z = transformed(valid(in.logits, dim, in).to(acc), in);
  const Tensor q = in.picked->to(acc), index = in.target.to(at::kLong).clamp(0, z.sym_size(dim) - 1);
  const Tensor lse = at::logsumexp(z, dim, /*keepdim=*/true), distances = lse - z;
  const c10::SymInt others = z.sym_size(dim) - index.sym_size(dim);
  Tensor rows = distances.gather(dim, index), background;
  if (in.options.spreads && others > 0) {
    background = (1 - q.sum(dim, true)).clamp_min(0) / at::Scalar(others);
    rows = ((q - background) * rows).sum(dim) + (background * distances).sum(dim);
  } else {
    rows = (q * rows).sum(dim);
  }
  if (in.options.divergence == kKullbackLeibler) {
    rows = rows + at::xlogy(q, q).sum(dim);
    rows = background.defined() ? rows + (at::xlogy(background, background) * at::Scalar(others)).squeeze(dim) : rows;
  }
  rows = in.options.z_loss == 0 ? rows : rows + in.options.z_loss * lse.squeeze(dim).square();
  return reduce(rows, in);
}

Tensor loss(const Inputs& in) {
  if (in.picked) {
    return loss_of_picks(in);
  }
  if (in.has_teacher()) {
    return std::get<0>(diverge(in));
  }
  const Operands o(in);
  const Tensor lse = at::logsumexp(o.z, o.dim, /*keepdim=*/true);
  Tensor rows;
  if (o.index.defined()) {
    rows = o.target_part * (lse - o.z.gather(o.dim, o.index));
  }
  if (o.background.defined()) {
    const Tensor others = (o.background * (lse - o.z)).sum(o.dim, true);
    rows = rows.defined() ? rows + others : others;
  }
  if (in.options.z_loss != 0) {
    const Tensor z_loss = in.options.z_loss * lse * lse;
    rows = rows + (o.kept.defined() ? z_loss * o.kept : z_loss);
  }
  return reduce(rows.squeeze(o.dim), in);
}

Stats stats(int64_t outputs, const Inputs& in) {
  const auto acc = accumulator_of(in.logits.scalar_type());
  const int64_t dim = class_dim(in.logits);
  const Tensor x = valid(in.logits, dim, in).to(acc);
  const Tensor z = transformed(x, in);
  const Tensor max = z.amax(dim, /*keepdim=*/true).detach();
  const Tensor sum = (z - max).exp().sum(dim).detach();
  const Tensor lse = at::logsumexp(z, dim, true);
  const Tensor none = at::empty({0}, x.options());
  Tensor log_prob = none, entropy = none, argmax = none.to(at::kLong), rank = argmax;
  if (outputs & kEntropy) {
    const Tensor log_p = z - lse;
    const Tensor p = log_p.exp();
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(dim);
  }
  if (outputs & kLogProb) {
    const Operands o(in);
    log_prob = (o.kept * (o.z.gather(dim, o.index) - at::logsumexp(o.z, dim, true))).squeeze(dim);
  }
  Tensor y = x.detach() * in.options.logit_scale;
  y = in.logit_scale ? y * in.logit_scale->detach().to(acc) : y;
  if (outputs & kArgmax) {
    argmax = y.argmax(dim);
  }
  if (outputs & kRank) {
    c10::SymDimVector column(x.sym_sizes().begin(), x.sym_sizes().end());
    column[dim] = 1;
    const Tensor index = index_of(in).reshape_symint(column);
    column[dim] = x.sym_size(dim);
    c10::SymDimVector broadcast(x.dim(), 1);
    broadcast[dim] = x.sym_size(dim);
    const Tensor classes = at::arange(x.sym_size(dim), index.options()).view_symint(broadcast);
    const Tensor target = y.gather(dim, index);
    const Tensor before = (y < target).logical_not().logical_and((classes < index).logical_or(y != target));
    rank = before.sum(dim).masked_fill(is_ignored(in).reshape(lse.squeeze(dim).sizes()), -1);
  }
  return {loss(in), max.squeeze(dim), sum, lse.squeeze(dim), log_prob, entropy, argmax, rank};
}

Diverged diverge(const Inputs& in) {
  const auto acc = accumulator_of(in.logits.scalar_type());
  const int64_t dim = class_dim(in.logits);
  const Tensor z = transformed(valid(in.logits, dim, in).to(acc), in);
  const Tensor t = valid(in.target, dim, in).to(acc) * in.options.teacher_scale;
  const Tensor lse = at::logsumexp(z, dim, /*keepdim=*/true);
  const Tensor log_p = z - lse, log_q = t - at::logsumexp(t, dim, true);
  const Tensor &log_a = in.options.reverse ? log_p : log_q, &log_b = in.options.reverse ? log_q : log_p;
  const Tensor a = log_a.exp();
  const Tensor nothing = a == 0;
  Tensor ratio = -log_b.masked_fill(nothing, 0);
  if (in.options.divergence == kKullbackLeibler) {
    ratio = ratio + log_a.masked_fill(nothing, 0);
  }
  const Tensor divergence = (a * ratio).sum(dim);
  const Tensor rows = in.options.z_loss == 0 ? divergence : divergence + in.options.z_loss * lse.squeeze(dim).square();

  const auto max_sum = [&](const Tensor& logits) {
    const Tensor max = logits.detach().amax(dim, true);
    return std::pair(max.squeeze(dim), (logits.detach() - max).exp().sum(dim));
  };
  const auto [max, sum] = max_sum(z);
  const auto [teacher_max, teacher_sum] = max_sum(t);
  const Tensor &sum_a = in.options.reverse ? sum : teacher_sum, &sum_b = in.options.reverse ? teacher_sum : sum;
  Tensor mean = divergence.detach() - sum_b.log();
  if (in.options.divergence == kKullbackLeibler) {
    mean = mean + sum_a.log();
  }
  return {reduce(rows, in), max, sum, teacher_max, teacher_sum, mean};
}

Tensor logit_scale_gradient(const Tensor& grad_loss, const Inputs& in) {
  const Operands o(in);
  const Tensor log_p = log_probabilities(o.z, o.dim);
  Tensor grad = o.coefficients;
  if (in.options.z_loss != 0) {
    const Tensor lse = o.z.narrow(o.dim, 0, 1) - log_p.narrow(o.dim, 0, 1);
    grad = grad + 2 * in.options.z_loss * (o.kept.defined() ? lse * o.kept : lse);
  }
  grad = grad * log_p.exp();
  grad = o.background.defined() ? grad - o.background : grad;
  if (o.index.defined()) {
    grad = grad.scatter_add(o.dim, o.index, -o.target_part);
  }
  if (in.options.softcap) {
    grad = grad * (1 - (o.z / *in.options.softcap).square());
  }
  const Tensor x = valid(in.logits, o.dim, in).to(o.z.scalar_type());
  const Tensor terms = upstream_column(grad_loss, in) * grad * (o.kept.defined() ? x.masked_fill(o.kept == 0, 0) : x);
  return (terms.sum() * in.options.logit_scale).to(in.logit_scale->options());
}

Tensor logits_gradient(const Tensor& grad_loss, const Tensor& grad_lse, const Inputs& in) {
  const Operands o(in);
  const Tensor g = upstream_column(grad_loss, in);
  Tensor grad = o.coefficients * log_probabilities(o.z, o.dim).exp();
  grad = g * (o.background.defined() ? grad - o.background : grad);
  if (o.index.defined()) {
    grad = grad.scatter_add(o.dim, o.index, -(g * o.target_part).expand_as(o.index)) * o.kept;
  }
  if (grad_lse.defined()) {
    grad = grad + grad_lse.unsqueeze(o.dim) * log_probabilities(in.logits.to(o.z.scalar_type()), o.dim).exp();
  }
  return grad.to(in.logits.scalar_type());
}

Tensor target_gradient(const Tensor& grad_loss, const Inputs& in) {
  const Operands o(in);
  const Tensor g = upstream_column(grad_loss, in);
  const Tensor grad = -g * o.keep * o.w * log_probabilities(o.z, o.dim);
  return padded(grad, o.dim, in.target).to(in.target.scalar_type());
}

Tensor weight_gradient(const Tensor& grad_loss, const Inputs& in) {
  const Operands o(in);
  const Tensor g = upstream_column(grad_loss, in);
  const Tensor grad = -g * (o.keep * o.q + o.uniform) * log_probabilities(o.z, o.dim);
  return padded(sum_to_classes(grad, *in.weight, o.dim), 0, *in.weight);
}

// With logits_gradient() G_c = g (A p_c − a_c) + h p_c, a the coefficients and A their sum, and v its upstream
// gradient.
std::array<Tensor, 5> gradients_of_gradient(const Tensor& upstream, const Tensor& grad_loss, const Tensor& grad_lse,
                                            const Inputs& in) {
  const Operands o(in);
  const auto acc = o.z.scalar_type();
  const Tensor v = upstream.to(acc);
  const Tensor g = upstream_column(grad_loss, in);
  const Tensor p = log_probabilities(o.z, o.dim).exp();
  const Tensor vp = (v * p).sum(o.dim, /*keepdim=*/true);

  std::array<Tensor, 5> result;
  result[2] = g * o.coefficients * p * (v - vp);
  if (grad_lse.defined()) {
    const Tensor of_all_rows = log_probabilities(in.logits.to(acc), o.dim).exp();  // also of ignored rows
    const Tensor vp_of_all = (v * of_all_rows).sum(o.dim, true);
    result[1] = vp_of_all.squeeze(o.dim).to(grad_lse.scalar_type());
    result[2] = result[2] + grad_lse.to(acc).unsqueeze(o.dim) * of_all_rows * (v - vp_of_all);
  }
  result[2] = result[2].to(in.logits.scalar_type());
  if (grad_loss.defined()) {
    Tensor of_rows = o.coefficients * vp;
    if (o.index.defined()) {
      of_rows = of_rows - o.target_part * v.gather(o.dim, o.index);
    }
    if (o.background.defined()) {
      of_rows = of_rows - (o.background * v).sum(o.dim, true);
    }
    Options in_dtype_of_sum = in.options;
    in_dtype_of_sum.full_precision = true;
    result[0] = reduce(of_rows.squeeze(o.dim), in.with(in_dtype_of_sum)).to(grad_loss.scalar_type());
  }
  if (!o.index.defined()) {
    const Tensor of_coefficients = g * (vp - v);
    result[3] = (o.keep * o.w * of_coefficients).to(in.target.scalar_type());
    if (in.weight && in.weight->defined()) {
      result[4] = sum_to_classes((o.keep * o.q + o.uniform) * of_coefficients, *in.weight, o.dim);
    }
  }
  return result;
}

}  // namespace ce::formulas
