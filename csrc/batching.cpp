// torch.vmap: its batch becomes a further dimension of the rows, so that the kernels are called once for all of it.

#include <ATen/Functions.h>
#include <ATen/core/Reduction.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include "arguments.h"
#include "checks.h"
#include "formulas.h"
#include "problem.h"

namespace ce {
namespace {

using at::ScalarType;
using at::Tensor;

// The batch of the innermost vmap: of the tensors that it hands to an operator, some carry it. To the operator they
// look as if they did not; `outer` tensors are those below, of which the batch is an ordinary dimension.
class Batch {
 public:
  explicit Batch(at::ArrayRef<OptionalTensor> tensors) {
    for (const auto& tensor : tensors) {
      const auto* batched = as_batched(tensor);
      if (batched && batched->level() > level_) {
        level_ = batched->level();
        size_ = batched->value().sym_size(batched->bdim());
      }
    }
  }

  bool has(const OptionalTensor& tensor) const {
    const auto* batched = as_batched(tensor);
    return batched && batched->level() == level_;
  }

  // With the batch first.
  Tensor outer(const Tensor& tensor) const {
    if (has(tensor)) {
      return as_batched(tensor)->value().movedim(as_batched(tensor)->bdim(), 0);
    }
    c10::SymDimVector sizes(tensor.sym_sizes().begin(), tensor.sym_sizes().end());
    sizes.insert(sizes.begin(), size_);
    return tensor.expand_symint(sizes);
  }
  Tensor inner(const Tensor& outer) const { return at::functorch::makeBatched(outer, 0, level_); }

  // Of logits and what has their shape, (C) or (N, C, …): (batch, C) or (batch, C, N, …).
  Tensor outer_logits(const Tensor& logits) const { return outer(logits).movedim(class_dim(logits) + 1, 1); }
  Tensor inner_logits(const Tensor& outer, const Tensor& like) const {
    return inner(outer.movedim(1, class_dim(like) + 1));
  }

  Tensor outer_target(const Tensor& logits, const Tensor& target) const {
    if (is_probabilities(logits, target)) {
      return outer_logits(target);
    }
    const Tensor rows = logits.dim() == 1 ? target.reshape({}) : target;
    return outer(rows.scalar_type() == at::kByte ? rows.to(at::kLong) : rows);  // uint8 is for logits of two dimensions
  }

 private:
  static const at::functorch::BatchedTensorImpl* as_batched(const OptionalTensor& tensor) {
    return tensor && tensor->defined() ? at::functorch::maybeGetBatchedImpl(*tensor) : nullptr;
  }

  int64_t level_ = 0;
  c10::SymInt size_;
};

// While it lives, operators take outer tensors.
struct BelowVmap {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKey::FuncTorchBatched};
};

// Each row's results, in the accumulator's dtype. Class weights that differ within the batch only matter to the loss.
std::tuple<Tensor, Tensor, Tensor, Tensor> rows_batched(const Inputs& in) {
  const Batch batch({in.logits, in.target, in.weight});
  const bool same_weight = !batch.has(in.weight);
  const Tensor z = batch.outer_logits(in.logits), t = batch.outer_target(in.logits, in.target);
  Tensor loss, max, sum, lse;
  {
    const BelowVmap guard;
    std::tie(loss, max, sum, lse) = op::forward({z, t, same_weight ? in.weight : kNoTensor, in.options.of_rows()});
  }
  loss = same_weight ? batch.inner(loss) : formulas::loss({in.logits, in.target, in.weight, in.options.of_rows()});
  return {loss, batch.inner(max), batch.inner(sum), batch.inner(lse)};
}

Tensor loss_batched(const Inputs& in) {
  check(in);
  const Batch batch({in.logits, in.target, in.weight, in.row_weight, in.logit_scale, in.divisor});
  if (!in.is_plain() || batch.has(in.weight)) {
    return formulas::loss(in);
  }
  const Tensor z = batch.outer_logits(in.logits), t = batch.outer_target(in.logits, in.target);
  Tensor rows;
  {
    const BelowVmap guard;
    rows = op::loss({z, t, in.weight, in.options.of_rows()});
  }
  return formulas::reduce(batch.inner(rows), in);
}

// The gradient of the batch is not written over its logits: a transform outside of this one may still need them.
Tensor loss_batched_(const Inputs& in) {
  return op::loss(in);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_batched(const Inputs& in) {
  check(in);
  const auto [rows, max, sum, lse] = rows_batched(in);
  return {formulas::reduce(rows, in), max, sum, lse};
}

// What the backward kernels read, with the batch in it.
struct OuterOperands {
  Tensor grad_loss, logits, target, max, sum;
  OptionalTensor grad_lse, grad_log_prob, grad_entropy, entropy, teacher_max, teacher_sum, mean;

  OuterOperands(const Batch& batch, const BackwardInputs& b, const Inputs& in)
      : grad_loss(batch.outer(formulas::upstream_of_rows(b.grad_loss, in).expand_as(b.max))),
        logits(batch.outer_logits(in.logits)),
        target(batch.outer_target(in.logits, in.target)),
        max(batch.outer(b.max)),
        sum(batch.outer(b.sum)),
        grad_lse(outer_if_given(batch, b.grad_lse)),
        grad_log_prob(outer_if_given(batch, b.grad_log_prob)),
        grad_entropy(outer_if_given(batch, b.grad_entropy)),
        entropy(outer_if_given(batch, b.entropy)),
        teacher_max(outer_if_given(batch, b.teacher_max)),
        teacher_sum(outer_if_given(batch, b.teacher_sum)),
        mean(outer_if_given(batch, b.mean)) {}

  BackwardInputs backward() const {
    return {grad_loss, grad_lse, max, sum, grad_log_prob, grad_entropy, entropy, teacher_max, teacher_sum, mean};
  }

 private:
  static OptionalTensor outer_if_given(const Batch& batch, const OptionalTensor& rows) {
    return rows && rows->defined() ? OptionalTensor(batch.outer(*rows)) : std::nullopt;
  }
};

Batch batch_of(const BackwardInputs& b, const Inputs& in) {
  return Batch({b.grad_loss, b.grad_lse, b.max, b.sum, b.grad_log_prob, b.grad_entropy, b.entropy, b.teacher_max,
                b.teacher_sum, b.mean, in.logits, in.target, in.weight, in.row_weight});
}

Tensor backward_batched(const BackwardInputs& b, const Inputs& in) {
  const Batch batch = batch_of(b, in);
  if (batch.has(in.weight)) {
    return formulas::logits_gradient(b.grad_loss, b.grad_lse.value_or(Tensor()), in);
  }
  const OuterOperands o(batch, b, in);
  Tensor grad;
  {
    const BelowVmap guard;
    grad = op::backward(o.backward(), {o.logits, o.target, in.weight, in.options.of_rows(), kNoTensor, in.logit_scale});
  }
  return batch.inner_logits(grad, in.logits);
}

Stats stats_batched(int64_t outputs, const Inputs& in) {
  check(in);
  return formulas::stats(outputs, in);
}

Diverged diverge_batched(const Inputs& in) {
  check(in);
  return formulas::diverge(in);
}

std::tuple<Tensor, Tensor> forward_grad_batched(const Inputs& in) {
  if (in.has_teacher()) {
    const auto [loss, max, sum, teacher_max, teacher_sum, mean] = op::diverge(in);
    const Tensor one = at::ones({}, max.options());
    return {loss, op::backward(
                      {one, kNoTensor, max, sum, kNoTensor, kNoTensor, kNoTensor, teacher_max, teacher_sum, mean}, in)};
  }
  const auto [loss, max, sum, lse] = op::forward(in);
  const Tensor one = at::ones({}, max.options());
  return {loss, op::backward({one, kNoTensor, max, sum}, in)};
}

Tensor target_backward_batched(const BackwardInputs& b, const Inputs& in) {
  const Batch batch = batch_of(b, in);
  if (batch.has(in.weight)) {
    return formulas::target_gradient(b.grad_loss, in);
  }
  const OuterOperands o(batch, b, in);
  Tensor grad;
  {
    const BelowVmap guard;
    grad = op::target_backward(o.backward(),
                               {o.logits, o.target, in.weight, in.options.of_rows(), kNoTensor, in.logit_scale});
  }
  return batch.inner_logits(grad, in.target);
}

// The kernel sums over all rows; here the sum is over those of one member of the batch.
Tensor weight_backward_batched(const BackwardInputs& b, const Inputs& in) {
  return formulas::weight_gradient(b.grad_loss, in);
}

Tensor logit_scale_backward_batched(const BackwardInputs& b, const Inputs& in) {
  return formulas::logit_scale_gradient(b.grad_loss, in);
}

void scale__batched(Tensor& grad, const Tensor& factor) {
  grad.mul_(factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy, FuncTorchBatched, m) {
  m.impl("loss", &unpacked<&loss_batched>);
  m.impl("cross_entropy_", &unpacked<&loss_batched_>);
  m.impl("forward", &unpacked<&forward_batched>);
  m.impl("stats", &unpacked_after<int64_t, &stats_batched>);
  m.impl("diverge", &unpacked<&diverge_batched>);
  m.impl("forward_grad", &unpacked<&forward_grad_batched>);
  m.impl("backward", &unpacked_backward<&backward_batched>);
  m.impl("target_backward", &unpacked_backward<&target_backward_batched>);
  m.impl("weight_backward", &unpacked_backward<&weight_backward_batched>);
  m.impl("logit_scale_backward", &unpacked_backward<&logit_scale_backward_batched>);
  m.impl("scale_", &scale__batched);
}

}  // namespace ce
