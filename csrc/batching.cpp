// torch.vmap: its batch becomes a further dimension of the rows, so that the kernels are called once for all of it.

#include <ATen/Functions.h>
#include <ATen/core/Reduction.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include "checks.h"
#include "formulas.h"
#include "ops.h"
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

Options of_rows(const Options& options) {
  return {at::Reduction::None, options.ignore_index, options.label_smoothing, /*full_precision=*/true};
}

// Each row's results, in the accumulator's dtype. Class weights that differ within the batch only matter to the loss.
std::tuple<Tensor, Tensor, Tensor, Tensor> rows_batched(const Tensor& logits, const Tensor& target,
                                                        const OptionalTensor& weight, const Options& options) {
  const Batch batch({logits, target, weight});
  const bool same_weight = !batch.has(weight);
  const Tensor z = batch.outer_logits(logits), t = batch.outer_target(logits, target);
  Tensor loss, max, sum, lse;
  {
    const BelowVmap guard;
    std::tie(loss, max, sum, lse) = op::forward(z, t, same_weight ? weight : std::nullopt, of_rows(options));
  }
  loss = same_weight ? batch.inner(loss) : formulas::loss(logits, target, weight, of_rows(options));
  return {loss, batch.inner(max), batch.inner(sum), batch.inner(lse)};
}

Tensor loss_batched(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                    c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  check(logits, target, weight, options);
  const Batch batch({logits, target, weight});
  if (batch.has(weight)) {
    return formulas::loss(logits, target, weight, options);
  }
  const Tensor z = batch.outer_logits(logits), t = batch.outer_target(logits, target);
  Tensor rows;
  {
    const BelowVmap guard;
    rows = op::loss(z, t, weight, of_rows(options));
  }
  return formulas::reduce(batch.inner(rows), logits, target, weight, options);
}

// The gradient of the batch is not written over its logits: a transform outside of this one may still need them.
Tensor loss_batched_(Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  return op::loss(logits, target, weight, {reduction, ignore_index, label_smoothing, full_precision});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_batched(const Tensor& logits, const Tensor& target,
                                                           const OptionalTensor& weight, int64_t reduction,
                                                           c10::SymInt ignore_index, double label_smoothing,
                                                           bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  check(logits, target, weight, options);
  const auto [rows, max, sum, lse] = rows_batched(logits, target, weight, options);
  return {formulas::reduce(rows, logits, target, weight, options), max, sum, lse};
}

// What the backward kernels read, with the batch in it.
struct OuterOperands {
  Tensor grad_loss, logits, target, max, sum;

  OuterOperands(const Batch& batch, const Tensor& grad_loss_, const Tensor& logits_, const Tensor& target_,
                const OptionalTensor& weight, const Tensor& max_, const Tensor& sum_, const Options& options)
      : grad_loss(
            batch.outer(formulas::upstream_of_rows(grad_loss_, logits_, target_, weight, options).expand_as(max_))),
        logits(batch.outer_logits(logits_)),
        target(batch.outer_target(logits_, target_)),
        max(batch.outer(max_)),
        sum(batch.outer(sum_)) {}
};

Tensor backward_batched(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& logits,
                        const Tensor& target, const OptionalTensor& weight, const Tensor& max, const Tensor& sum,
                        int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  const Options options{reduction, ignore_index, label_smoothing};
  const Batch batch({grad_loss, grad_lse, logits, target, weight, max, sum});
  if (batch.has(weight)) {
    return formulas::logits_gradient(grad_loss, grad_lse.value_or(Tensor()), logits, target, weight, options);
  }
  const OuterOperands o(batch, grad_loss, logits, target, weight, max, sum, options);
  const OptionalTensor g_lse = grad_lse && grad_lse->defined() ? OptionalTensor(batch.outer(*grad_lse)) : std::nullopt;
  Tensor grad;
  {
    const BelowVmap guard;
    grad = op::backward(o.grad_loss, g_lse, o.logits, o.target, weight, o.max, o.sum, of_rows(options));
  }
  return batch.inner_logits(grad, logits);
}

std::tuple<Tensor, Tensor> forward_grad_batched(const Tensor& logits, const Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction,
                                                c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  const auto [loss, max, sum, lse] = op::forward(logits, target, weight, options);
  const Tensor one = at::ones({}, max.options());
  return {loss, op::backward(one, std::nullopt, logits, target, weight, max, sum, options)};
}

Tensor target_backward_batched(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& weight, const Tensor& max, const Tensor& sum, int64_t reduction,
                               double label_smoothing) {
  const Options options{reduction, /*ignore_index=*/-100, label_smoothing};
  const Batch batch({grad_loss, logits, target, weight, max, sum});
  if (batch.has(weight)) {
    return formulas::target_gradient(grad_loss, logits, target, weight, options);
  }
  const OuterOperands o(batch, grad_loss, logits, target, weight, max, sum, options);
  Tensor grad;
  {
    const BelowVmap guard;
    grad = op::target_backward(o.grad_loss, o.logits, o.target, weight, o.max, o.sum, of_rows(options));
  }
  return batch.inner_logits(grad, target);
}

// The kernel sums over all rows; here the sum is over those of one member of the batch.
Tensor weight_backward_batched(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                               const Tensor& weight, const Tensor&, const Tensor&, int64_t reduction,
                               double label_smoothing) {
  return formulas::weight_gradient(grad_loss, logits, target, weight, {reduction, -100, label_smoothing});
}

void scale__batched(Tensor& grad, const Tensor& factor) {
  grad.mul_(factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy, FuncTorchBatched, m) {
  m.impl("loss", &loss_batched);
  m.impl("cross_entropy_", &loss_batched_);
  m.impl("forward", &forward_batched);
  m.impl("forward_grad", &forward_grad_batched);
  m.impl("backward", &backward_batched);
  m.impl("target_backward", &target_backward_batched);
  m.impl("weight_backward", &weight_backward_batched);
  m.impl("scale_", &scale__batched);
}

}  // namespace ce
