#include "ops.h"

#include <ATen/core/Reduction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <cmath>

#include "backends.h"
#include "checks.h"
#include "formulas.h"
#include "problem.h"

namespace ce {
namespace {

using at::ScalarType;
using at::Tensor;

// The kernels of the operators, for any backend of backends.h.
template <typename Backend>
struct Kernels {
  // The one way into the forward kernel: the loss in its dtype; the caller has asked `builder` for the other results.
  static Tensor run_forward(Backend& backend, ProblemBuilder& builder, const Tensor& logits, const Options& options) {
    const ScalarType dtype = loss_dtype(logits, options);
    Tensor loss = builder.add_row_result(&Problem::loss);
    Problem& problem = builder.problem();
    backend.prepare(problem, options.reduction);
    if (builder.is_empty()) {
      const double total = options.reduction == at::Reduction::Mean ? NAN : 0;
      return options.reduction == at::Reduction::None ? loss.zero_().to(dtype)
                                                      : at::full({}, total, logits.options().dtype(dtype));
    }
    if (options.reduction == at::Reduction::None) {
      backend.forward(problem);
      return loss.to(dtype);
    }
    return backend.forward_total(problem, logits.options().dtype(dtype));
  }

  static Tensor loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
    const Options options{reduction, ignore_index, label_smoothing, full_precision};
    check(logits, target, weight, options);
    Backend backend(logits);
    ProblemBuilder builder(logits, target, weight, options);
    return run_forward(backend, builder, logits, options);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                                            const OptionalTensor& weight, int64_t reduction,
                                                            c10::SymInt ignore_index, double label_smoothing,
                                                            bool full_precision) {
    const Options options{reduction, ignore_index, label_smoothing, full_precision};
    check(logits, target, weight, options);
    Backend backend(logits);
    ProblemBuilder builder(logits, target, weight, options);
    Tensor max = builder.add_row_result(&Problem::max);
    Tensor sum = builder.add_row_result(&Problem::sum);
    Tensor lse = builder.add_row_result(&Problem::lse);
    Tensor loss = run_forward(backend, builder, logits, options);
    if (builder.is_empty()) {
      max.fill_(-INFINITY);
      sum.zero_();
      lse.fill_(-INFINITY);
    }
    return {loss, max, sum, lse};
  }

  static Tensor forward_into(Backend& backend, const NewGrad& grad, const Tensor& logits, const Tensor& target,
                             const OptionalTensor& weight, const Options& options) {
    ProblemBuilder builder(logits, target, weight, options);
    builder.add_grad(grad.tensor, grad.streams);
    return run_forward(backend, builder, logits, options);
  }

  static std::tuple<Tensor, Tensor> forward_grad(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction,
                                                 c10::SymInt ignore_index, double label_smoothing,
                                                 bool full_precision) {
    const Options options{reduction, ignore_index, label_smoothing, full_precision};
    check(logits, target, weight, options);
    Backend backend(logits);
    const NewGrad grad = backend.empty_grad(logits);
    Tensor loss = forward_into(backend, grad, logits, target, weight, options);
    return {loss, grad.tensor};
  }

  static Tensor forward_grad_(Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                              c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
    const Options options{reduction, ignore_index, label_smoothing, full_precision};
    check(logits, target, weight, options);
    Backend backend(logits);
    return forward_into(backend, {logits}, logits, target, weight, options);
  }

  // The one way into the backward kernels.
  static void run_backward(Backend& backend, void (Backend::*kernel)(Problem&), const NewGrad& out,
                           const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& logits,
                           const Tensor& target, const OptionalTensor& weight, const Tensor& max, const Tensor& sum,
                           const Options& options) {
    if (logits.numel() == 0) {
      out.tensor.zero_();
      return;
    }
    ProblemBuilder builder(logits, target, weight, options);
    builder.add_row_input(&Problem::max, max);
    builder.add_row_input(&Problem::sum, sum);
    builder.add_grad_loss(grad_loss);
    if (grad_lse && grad_lse->defined()) {
      builder.add_grad_lse(*grad_lse);
    }
    if (out.tensor.sizes() == logits.sizes()) {
      builder.add_grad(out.tensor, out.streams);
    }
    Problem& problem = builder.problem();
    problem.grad.data = out.tensor.data_ptr();
    backend.prepare(problem, options.reduction);
    (backend.*kernel)(problem);
  }

  static Tensor backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& logits,
                         const Tensor& target, const OptionalTensor& weight, const Tensor& max, const Tensor& sum,
                         int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
    Backend backend(logits);
    const NewGrad grad = backend.empty_grad(logits);
    run_backward(backend, &Backend::backward, grad, grad_loss, grad_lse, logits, target, weight, max, sum,
                 {reduction, ignore_index, label_smoothing});
    return grad.tensor;
  }

  static void backward_(Tensor& logits, const Tensor& grad_loss, const Tensor& target, const OptionalTensor& weight,
                        const Tensor& max, const Tensor& sum, int64_t reduction, c10::SymInt ignore_index,
                        double label_smoothing) {
    Backend backend(logits);
    run_backward(backend, &Backend::backward, {logits}, grad_loss, std::nullopt, logits, target, weight, max, sum,
                 {reduction, ignore_index, label_smoothing});
  }

  static Tensor target_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const OptionalTensor& weight, const Tensor& max, const Tensor& sum, int64_t reduction,
                                double label_smoothing) {
    Backend backend(logits);
    const NewGrad grad = backend.empty_grad(target);
    run_backward(backend, &Backend::target_backward, grad, grad_loss, std::nullopt, logits, target, weight, max, sum,
                 {reduction, -100, label_smoothing});
    return grad.tensor;
  }

  static Tensor weight_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const Tensor& weight, const Tensor& max, const Tensor& sum, int64_t reduction,
                                double label_smoothing) {
    Backend backend(logits);
    Tensor grad = at::empty(weight.sizes(), weight.options().dtype(accumulator_of(logits.scalar_type())));
    run_backward(backend, &Backend::weight_backward, {grad}, grad_loss, std::nullopt, logits, target, weight, max, sum,
                 {reduction, -100, label_smoothing});
    return grad.to(weight.scalar_type());
  }

  static void scale_(Tensor& grad, const Tensor& factor) {
    TORCH_CHECK(grad.is_non_overlapping_and_dense(), "scale_ expects a dense gradient");
    Backend(grad).scale(grad, factor);
  }

  static void add_to(torch::Library& m) {
    m.impl("loss", &loss);
    m.impl("forward", &forward);
    m.impl("forward_grad", &forward_grad);
    m.impl("forward_grad_", &forward_grad_);
    m.impl("backward", &backward);
    m.impl("backward_", &backward_);
    m.impl("target_backward", &target_backward);
    m.impl("weight_backward", &weight_backward);
    m.impl("scale_", &scale_);
  }
};

using OnCpu = Kernels<CpuBackend>;

// The same on meta tensors: what is checked without data, and the results' shapes and dtypes.

c10::SymDimVector row_sizes(const Tensor& logits) {
  c10::SymDimVector sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
  sizes.erase(sizes.begin() + class_dim(logits));
  return sizes;
}

Tensor empty_loss(const Tensor& logits, const Options& options) {
  const c10::SymDimVector sizes = options.reduction == at::Reduction::None ? row_sizes(logits) : c10::SymDimVector();
  return at::empty_symint(sizes, logits.options().dtype(loss_dtype(logits, options)));
}

Tensor loss_meta(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                 c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  check(logits, target, weight, options);
  return empty_loss(logits, options);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_meta(const Tensor& logits, const Tensor& target,
                                                        const OptionalTensor& weight, int64_t reduction,
                                                        c10::SymInt ignore_index, double label_smoothing,
                                                        bool full_precision) {
  Tensor loss = loss_meta(logits, target, weight, reduction, ignore_index, label_smoothing, full_precision);
  const auto rows = [&] {
    return at::empty_symint(row_sizes(logits), logits.options().dtype(accumulator_of(logits.scalar_type())));
  };
  return {loss, rows(), rows(), rows()};
}

std::tuple<Tensor, Tensor> forward_grad_meta(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                             int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                             bool full_precision) {
  return {loss_meta(logits, target, weight, reduction, ignore_index, label_smoothing, full_precision),
          at::empty_like(logits)};
}

Tensor forward_grad__meta(Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                          c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  return loss_meta(logits, target, weight, reduction, ignore_index, label_smoothing, full_precision);
}

Tensor backward_meta(const Tensor&, const OptionalTensor&, const Tensor& logits, const Tensor&, const OptionalTensor&,
                     const Tensor&, const Tensor&, int64_t, int64_t, double) {
  return at::empty_like(logits);
}

void backward__meta(Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, int64_t,
                    int64_t, double) {}

Tensor target_backward_meta(const Tensor&, const Tensor&, const Tensor& target, const OptionalTensor&, const Tensor&,
                            const Tensor&, int64_t, double) {
  return at::empty_like(target);
}

Tensor weight_backward_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor& weight, const Tensor&,
                            const Tensor&, int64_t, double) {
  return at::empty_like(weight);
}

void scale__meta(Tensor&, const Tensor&) {}

// Calls the operator `name`, whose schema has this C++ signature, through the dispatcher.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

namespace op {

Tensor loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Options& o) {
  static const auto call = find<decltype(OnCpu::loss)>("cross_entropy::loss");
  return call.call(logits, target, weight, o.reduction, o.ignore_index, o.label_smoothing, o.full_precision);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                                   const OptionalTensor& weight, const Options& o) {
  static const auto call = find<decltype(OnCpu::forward)>("cross_entropy::forward");
  return call.call(logits, target, weight, o.reduction, o.ignore_index, o.label_smoothing, o.full_precision);
}

std::tuple<Tensor, Tensor> forward_grad(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                        const Options& o) {
  static const auto call = find<decltype(OnCpu::forward_grad)>("cross_entropy::forward_grad");
  return call.call(logits, target, weight, o.reduction, o.ignore_index, o.label_smoothing, o.full_precision);
}

Tensor forward_grad_(Tensor logits, const Tensor& target, const OptionalTensor& weight, const Options& o) {
  static const auto call = find<decltype(OnCpu::forward_grad_)>("cross_entropy::forward_grad_");
  return call.call(logits, target, weight, o.reduction, o.ignore_index, o.label_smoothing, o.full_precision);
}

Tensor backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& logits, const Tensor& target,
                const OptionalTensor& weight, const Tensor& max, const Tensor& sum, const Options& o) {
  static const auto call = find<decltype(OnCpu::backward)>("cross_entropy::backward");
  return call.call(grad_loss, grad_lse, logits, target, weight, max, sum, o.reduction, o.ignore_index,
                   o.label_smoothing);
}

void backward_(Tensor logits, const Tensor& grad_loss, const Tensor& target, const OptionalTensor& weight,
               const Tensor& max, const Tensor& sum, const Options& o) {
  static const auto call = find<decltype(OnCpu::backward_)>("cross_entropy::backward_");
  call.call(logits, grad_loss, target, weight, max, sum, o.reduction, o.ignore_index, o.label_smoothing);
}

Tensor target_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                       const OptionalTensor& weight, const Tensor& max, const Tensor& sum, const Options& o) {
  static const auto call = find<decltype(OnCpu::target_backward)>("cross_entropy::target_backward");
  return call.call(grad_loss, logits, target, weight, max, sum, o.reduction, o.label_smoothing);
}

Tensor weight_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& weight,
                       const Tensor& max, const Tensor& sum, const Options& o) {
  static const auto call = find<decltype(OnCpu::weight_backward)>("cross_entropy::weight_backward");
  return call.call(grad_loss, logits, target, weight, max, sum, o.reduction, o.label_smoothing);
}

void scale_(Tensor grad, const Tensor& factor) {
  static const auto call = find<decltype(OnCpu::scale_)>("cross_entropy::scale_");
  call.call(grad, factor);
}

}  // namespace op

#define CE_LOSS_OPTIONS "int reduction, SymInt ignore_index, float label_smoothing"

TORCH_LIBRARY(cross_entropy, m) {
  m.def("cross_entropy(Tensor logits, Tensor target, Tensor? weight, " CE_LOSS_OPTIONS
        ", bool full_precision=False) -> Tensor",
        &cross_entropy);
  m.def("cross_entropy_(Tensor(a!) logits, Tensor target, Tensor? weight, " CE_LOSS_OPTIONS
        ", bool full_precision=False) -> Tensor");
  m.def(
      "row_stats(Tensor logits, Tensor target, Tensor? weight, SymInt ignore_index, float label_smoothing)"
      " -> (Tensor maximum, Tensor logsumexp, Tensor loss)",
      &row_stats);

  m.def("divisor(Tensor logits, Tensor target, Tensor? weight, SymInt ignore_index) -> Tensor",
        [](const Tensor& logits, const Tensor& target, const OptionalTensor& weight, c10::SymInt ignore_index) {
          return formulas::divisor(logits, target, weight, {at::Reduction::Mean, ignore_index, 0});
        });

  m.def("loss(Tensor logits, Tensor target, Tensor? weight, " CE_LOSS_OPTIONS ", bool full_precision) -> Tensor");
  m.def("forward(Tensor logits, Tensor target, Tensor? weight, " CE_LOSS_OPTIONS
        ", bool full_precision) -> (Tensor loss, Tensor max, Tensor sum, Tensor lse)");
  m.def("forward_grad(Tensor logits, Tensor target, Tensor? weight, " CE_LOSS_OPTIONS
        ", bool full_precision) -> (Tensor loss, Tensor grad)");
  m.def("forward_grad_(Tensor(a!) logits, Tensor target, Tensor? weight, " CE_LOSS_OPTIONS
        ", bool full_precision) -> Tensor");
  m.def(
      "backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, Tensor? weight, Tensor max,"
      " Tensor sum, " CE_LOSS_OPTIONS ") -> Tensor");
  m.def(
      "backward_(Tensor(a!) logits, Tensor grad_loss, Tensor target, Tensor? weight, Tensor max, Tensor "
      "sum, " CE_LOSS_OPTIONS ") -> ()");
  m.def(
      "target_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor max, Tensor sum,"
      " int reduction, float label_smoothing) -> Tensor");
  m.def(
      "weight_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor weight, Tensor max, Tensor sum,"
      " int reduction, float label_smoothing) -> Tensor");
  m.def("scale_(Tensor(a!) grad, Tensor factor) -> ()");
}

TORCH_LIBRARY_IMPL(cross_entropy, CPU, m) {
  OnCpu::add_to(m);
}

TORCH_LIBRARY_IMPL(cross_entropy, CUDA, m) {
  Kernels<CudaBackend>::add_to(m);
}

TORCH_LIBRARY_IMPL(cross_entropy, Meta, m) {
  m.impl("loss", &loss_meta);
  m.impl("forward", &forward_meta);
  m.impl("forward_grad", &forward_grad_meta);
  m.impl("forward_grad_", &forward_grad__meta);
  m.impl("backward", &backward_meta);
  m.impl("backward_", &backward__meta);
  m.impl("target_backward", &target_backward_meta);
  m.impl("weight_backward", &weight_backward_meta);
  m.impl("scale_", &scale__meta);
}

}  // namespace ce
