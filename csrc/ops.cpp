#include "ops.h"

#include <ATen/core/Reduction.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <cmath>

#include "arguments.h"
#include "backends.h"
#include "checks.h"
#include "formulas.h"
#include "problem.h"

namespace ce {
namespace {

using at::ScalarType;
using at::Tensor;

void check_is_whole(const Inputs& in) {
  TORCH_CHECK_VALUE(!in.has_teacher(), "cross_entropy: with a teacher there is only the loss");
  TORCH_CHECK_VALUE(!in.is_shard(), "cross_entropy: a shard of the classes has no loss of its own");
}

void set_of_no_classes(Tensor& max, Tensor& sum) {
  max.fill_(-INFINITY);
  sum.zero_();
}

// The kernels of the operators, for any backend of backends.h.
template <typename Backend>
struct Kernels {
  // The one way into the forward kernel: the loss in its dtype; the caller has asked `builder` for the other results.
  static Tensor run_forward(Backend& backend, ProblemBuilder& builder, const Inputs& in) {
    const ScalarType dtype = loss_dtype(in);
    if (in.options.reduction == at::Reduction::None) {
      Tensor loss = builder.add_row_result(&Problem::loss);
      Problem& problem = builder.problem();
      backend.prepare(problem, in);
      if (builder.is_empty()) {
        return loss.zero_().to(dtype);
      }
      backend.forward(problem);
      return (in.row_weight ? loss.mul_(formulas::row_weight_of(in).detach()) : loss).to(dtype);
    }
    Problem& problem = builder.problem();
    backend.prepare(problem, in);
    if (builder.is_empty()) {
      const bool is_zero =
          in.options.reduction != at::Reduction::Mean || in.divides_by_given() || in.options.zero_if_empty;
      return at::full({}, is_zero ? 0 : NAN, in.logits.options().dtype(dtype));
    }
    return backend.forward_total(problem, in.logits.options().dtype(dtype));
  }

  static Tensor loss(const Inputs& in) {
    check(in);
    Backend backend(in.logits);
    ProblemBuilder builder(in);
    return run_forward(backend, builder, in);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& in) {
    check(in);
    check_is_whole(in);
    Backend backend(in.logits);
    ProblemBuilder builder(in);
    Tensor max = builder.add_row_result(&Problem::max);
    Tensor sum = builder.add_row_result(&Problem::sum);
    Tensor lse = builder.add_row_result(&Problem::lse);
    Tensor loss = run_forward(backend, builder, in);
    if (builder.is_empty()) {
      set_of_no_classes(max, sum);
      lse.fill_(-INFINITY);
    }
    return {loss, max, sum, lse};
  }

  static Stats stats(int64_t outputs, const Inputs& in) {
    check(in);
    check_is_whole(in);
    TORCH_CHECK_VALUE(!in.picked, "cross_entropy: with picked classes there is only the loss");
    Backend backend(in.logits);
    ProblemBuilder builder(in);
    const auto if_asked = [&](Outputs output, auto Problem::* result, ScalarType dtype) {
      return outputs & output ? builder.add_row_result(result) : at::empty({0}, in.logits.options().dtype(dtype));
    };
    const ScalarType acc = builder.accumulator();
    Tensor max = builder.add_row_result(&Problem::max);
    Tensor sum = builder.add_row_result(&Problem::sum);
    Tensor lse = builder.add_row_result(&Problem::lse);
    Tensor log_prob = if_asked(kLogProb, &Problem::log_prob, acc);
    Tensor entropy = if_asked(kEntropy, &Problem::entropy, acc);
    Tensor argmax = if_asked(kArgmax, &Problem::argmax, at::kLong);
    Tensor rank = if_asked(kRank, &Problem::rank, at::kLong);
    Tensor loss = run_forward(backend, builder, in);
    if (builder.is_empty()) {
      set_of_no_classes(max, sum);
      lse.fill_(-INFINITY);
      for (Tensor* result : {&log_prob, &entropy, &argmax, &rank}) {
        result->zero_();
      }
    }
    return {loss, max, sum, lse, log_prob, entropy, argmax, rank};
  }

  static Tensor shard_state(bool all_rows, const Inputs& in) {
    check(in);
    Backend backend(in.logits);
    ProblemBuilder builder(in);
    const Tensor loss = builder.add_row_result(&Problem::loss);
    const Tensor max = builder.add_row_result(&Problem::max), sum = builder.add_row_result(&Problem::sum);
    const Tensor linear = builder.add_row_result(&Problem::linear);
    const Tensor coefficients = builder.add_row_result(&Problem::coefficients);
    const Tensor lse = all_rows ? builder.add_row_result(&Problem::lse) : Tensor();  // for which ignored rows are read
    Problem& problem = builder.problem();
    backend.prepare(problem, in);
    if (!builder.is_empty()) {
      backend.forward(problem);
    }
    return at::stack({max, sum, linear, coefficients});
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> merge_shards(const Tensor& given, double z_loss) {
    const Tensor states = given.contiguous();
    TORCH_CHECK_VALUE(states.dim() >= 2 && states.size(1) == 4, "cross_entropy: states are of shape (shards, 4, rows)");
    const auto rows = [&] { return at::empty(states.sizes().slice(2), states.options()); };
    const Tensor loss = rows(), max = rows(), sum = rows(), coefficients = rows();
    Backend(states).merge_shards({states.scalar_type() == at::kDouble, loss.numel(), states.size(0), z_loss,
                                  states.const_data_ptr(), loss.data_ptr(), max.data_ptr(), sum.data_ptr(),
                                  coefficients.data_ptr()});
    return {loss, max, sum, coefficients};
  }

  static Diverged diverge(const Inputs& in) {
    check(in);
    Backend backend(in.logits);
    ProblemBuilder builder(in);
    Tensor max = builder.add_row_result(&Problem::max);
    Tensor sum = builder.add_row_result(&Problem::sum);
    Tensor teacher_max = builder.add_row_result(&Problem::teacher_max);
    Tensor teacher_sum = builder.add_row_result(&Problem::teacher_sum);
    Tensor mean = builder.add_row_result(&Problem::mean);
    Tensor loss = run_forward(backend, builder, in);
    if (builder.is_empty()) {
      set_of_no_classes(max, sum);
      set_of_no_classes(teacher_max, teacher_sum);
      mean.zero_();
    }
    return {loss, max, sum, teacher_max, teacher_sum, mean};
  }

  // The kernels leave the columns of padding alone.
  static void clear_padding(const Tensor& grad, const Inputs& in) {
    if (in.options.valid_classes) {
      const int64_t dim = class_dim(in.logits);
      const int64_t valid = in.options.valid_classes->guard_int(__FILE__, __LINE__);
      grad.narrow(dim, valid, grad.size(dim) - valid).zero_();
    }
  }

  static Tensor forward_into(Backend& backend, const NewGrad& grad, const Inputs& in) {
    ProblemBuilder builder(in);
    builder.add_grad(grad.tensor, grad.streams);
    if (in.picked) {  // their gradient is written last
      builder.add_row_result(&Problem::max);
      builder.add_row_result(&Problem::sum);
    }
    Tensor loss = run_forward(backend, builder, in);
    clear_padding(grad.tensor, in);
    return loss;
  }

  static std::tuple<Tensor, Tensor> forward_grad(const Inputs& in) {
    check(in);
    Backend backend(in.logits);
    const NewGrad grad = backend.empty_grad(in.logits);
    Tensor loss = forward_into(backend, grad, in);
    return {loss, grad.tensor};
  }

  static Tensor forward_grad_(const Inputs& in) {
    check(in);
    Backend backend(in.logits);
    return forward_into(backend, {in.logits}, in);
  }

  // The one way into the backward kernels.
  static void run_backward(Backend& backend, void (Backend::*kernel)(Problem&), const NewGrad& out,
                           const BackwardInputs& b, const Inputs& in) {
    if (in.logits.numel() == 0) {
      out.tensor.zero_();
      return;
    }
    ProblemBuilder builder(in);
    builder.add_row_input(&Problem::max, b.max);
    builder.add_row_input(&Problem::sum, b.sum);
    builder.add_grad_loss(b.grad_loss);
    builder.add_row_upstream(&Problem::grad_lse, b.grad_lse);
    builder.add_row_upstream(&Problem::grad_log_prob, b.grad_log_prob);
    builder.add_row_upstream(&Problem::grad_entropy, b.grad_entropy);
    if (b.grad_entropy && b.grad_entropy->defined()) {
      builder.add_row_input(&Problem::entropy, *b.entropy);
    }
    if (in.has_teacher()) {
      builder.add_row_input(&Problem::teacher_max, *b.teacher_max);
      builder.add_row_input(&Problem::teacher_sum, *b.teacher_sum);
      builder.add_row_input(&Problem::mean, *b.mean);
    }
    const bool is_of_logits_shape = out.tensor.sizes() == in.logits.sizes();
    if (is_of_logits_shape) {
      builder.add_grad(out.tensor, out.streams);
    }
    if (b.coefficients) {
      builder.add_row_input(&Problem::coefficients, *b.coefficients);
    }
    Problem& problem = builder.problem();
    problem.grad.data = out.tensor.data_ptr();
    backend.prepare(problem, in);
    (backend.*kernel)(problem);
    if (is_of_logits_shape) {
      clear_padding(out.tensor, in);
    }
  }

  static Tensor backward(const BackwardInputs& b, const Inputs& in) {
    Backend backend(in.logits);
    const NewGrad grad = backend.empty_grad(in.logits);
    run_backward(backend, &Backend::backward, grad, b, in);
    return grad.tensor;
  }

  static void backward_(const BackwardInputs& b, const Inputs& in) {
    Backend backend(in.logits);
    run_backward(backend, &Backend::backward, {in.logits}, b, in);
  }

  static Tensor target_backward(const BackwardInputs& b, const Inputs& in) {
    Backend backend(in.logits);
    const NewGrad grad = backend.empty_grad(in.target);
    run_backward(backend, &Backend::target_backward, grad, b, in);
    return grad.tensor;
  }

  static Tensor weight_backward(const BackwardInputs& b, const Inputs& in) {
    Backend backend(in.logits);
    const Tensor& weight = *in.weight;
    Tensor grad = at::empty(weight.sizes(), weight.options().dtype(accumulator_of(in.logits.scalar_type())));
    if (in.options.valid_classes) {
      grad.zero_();
    }
    run_backward(backend, &Backend::weight_backward, {grad}, b, in);
    return grad.to(weight.scalar_type());
  }

  static Tensor logit_scale_backward(const BackwardInputs& b, const Inputs& in) {
    Backend backend(in.logits);
    Tensor grad = at::empty({}, in.logits.options().dtype(accumulator_of(in.logits.scalar_type())));
    run_backward(backend, &Backend::logit_scale_backward, {grad}, b, in);
    if (in.options.logit_scale != 1) {
      grad.mul_(in.options.logit_scale);
    }
    return grad.to(in.logit_scale->options());
  }

  static void scale_(Tensor& grad, const Tensor& factor) {
    TORCH_CHECK(grad.is_non_overlapping_and_dense(), "scale_ expects a dense gradient");
    Backend(grad).scale(grad, factor);
  }

  static void add_to(torch::Library& m) {
    m.impl("loss", &unpacked<&loss>);
    m.impl("forward", &unpacked<&forward>);
    m.impl("stats", &unpacked_after<int64_t, &stats>);
    m.impl("diverge", &unpacked<&diverge>);
    m.impl("shard_state", &unpacked_after<bool, &shard_state>);
    m.impl("merge_shards", &merge_shards);
    m.impl("forward_grad", &unpacked<&forward_grad>);
    m.impl("forward_grad_", &unpacked<&forward_grad_>);
    m.impl("backward", &unpacked_backward<&backward>);
    m.impl("backward_", &unpacked_backward<&backward_>);
    m.impl("target_backward", &unpacked_backward<&target_backward>);
    m.impl("weight_backward", &unpacked_backward<&weight_backward>);
    m.impl("logit_scale_backward", &unpacked_backward<&logit_scale_backward>);
    m.impl("scale_", &scale_);
  }
};

// The same on meta tensors: what is checked without data, and the results' shapes and dtypes.
namespace meta {

c10::SymDimVector row_sizes(const Tensor& logits) {
  c10::SymDimVector sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
  sizes.erase(sizes.begin() + class_dim(logits));
  return sizes;
}

Tensor loss(const Inputs& in) {
  check(in);
  const c10::SymDimVector sizes =
      in.options.reduction == at::Reduction::None ? row_sizes(in.logits) : c10::SymDimVector();
  return at::empty_symint(sizes, in.logits.options().dtype(loss_dtype(in)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& in) {
  Tensor of_loss = loss(in);
  const auto rows = [&] {
    const auto accumulator = accumulator_of(in.logits.scalar_type());
    return at::empty_symint(row_sizes(in.logits), in.logits.options().dtype(accumulator));
  };
  return {of_loss, rows(), rows(), rows()};
}

Stats stats(int64_t outputs, const Inputs& in) {
  auto [loss, max, sum, lse] = forward(in);
  const auto if_asked = [&](Outputs output, ScalarType dtype) {
    return at::empty_symint(outputs & output ? row_sizes(in.logits) : c10::SymDimVector{0},
                            in.logits.options().dtype(dtype));
  };
  const ScalarType acc = accumulator_of(in.logits.scalar_type());
  return {loss,
          max,
          sum,
          lse,
          if_asked(kLogProb, acc),
          if_asked(kEntropy, acc),
          if_asked(kArgmax, at::kLong),
          if_asked(kRank, at::kLong)};
}

Diverged diverge(const Inputs& in) {
  const auto [loss, max, sum, lse] = forward(in);
  const auto rows = [&] { return at::empty_like(max); };
  return {loss, max, sum, lse, rows(), rows()};
}

Tensor shard_state(bool, const Inputs& in) {
  check(in);
  c10::SymDimVector sizes = row_sizes(in.logits);
  sizes.insert(sizes.begin(), 4);
  return at::empty_symint(sizes, in.logits.options().dtype(accumulator_of(in.logits.scalar_type())));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_shards(const Tensor& states, double) {
  const auto rows = [&] { return at::empty_symint(states.sym_sizes().slice(2), states.options()); };
  return {rows(), rows(), rows(), rows()};
}

std::tuple<Tensor, Tensor> forward_grad(const Inputs& in) {
  return {loss(in), at::empty_like(in.logits)};
}

Tensor forward_grad_(const Inputs& in) {
  return loss(in);
}

Tensor backward(const BackwardInputs&, const Inputs& in) {
  return at::empty_like(in.logits);
}

void backward_(const BackwardInputs&, const Inputs&) {}

Tensor target_backward(const BackwardInputs&, const Inputs& in) {
  return at::empty_like(in.target);
}

Tensor weight_backward(const BackwardInputs&, const Inputs& in) {
  return at::empty_like(*in.weight);
}

Tensor logit_scale_backward(const BackwardInputs&, const Inputs& in) {
  return at::empty_like(*in.logit_scale);
}

void scale_(Tensor&, const Tensor&) {}

}  // namespace meta

}  // namespace

namespace op {

Tensor loss(const Inputs& in) {
  static const Operator<Tensor> call("cross_entropy::loss");
  return call(in);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& in) {
  static const Operator<std::tuple<Tensor, Tensor, Tensor, Tensor>> call("cross_entropy::forward");
  return call(in);
}

Stats stats(int64_t outputs, const Inputs& in) {
  static const StatsOperator call("cross_entropy::stats");
  return call(outputs, in);
}

Diverged diverge(const Inputs& in) {
  static const Operator<Diverged> call("cross_entropy::diverge");
  return call(in);
}

std::tuple<Tensor, Tensor> forward_grad(const Inputs& in) {
  static const Operator<std::tuple<Tensor, Tensor>> call("cross_entropy::forward_grad");
  return call(in);
}

Tensor forward_grad_(const Inputs& in) {
  static const Operator<Tensor> call("cross_entropy::forward_grad_");
  return call(in);
}

Tensor backward(const BackwardInputs& b, const Inputs& in) {
  static const BackwardOperator<Tensor> call("cross_entropy::backward");
  return call(b, in);
}

void backward_(const BackwardInputs& b, const Inputs& in) {
  static const BackwardOperator<void> call("cross_entropy::backward_");
  call(b, in);
}

Tensor target_backward(const BackwardInputs& b, const Inputs& in) {
  static const BackwardOperator<Tensor> call("cross_entropy::target_backward");
  return call(b, in);
}

Tensor weight_backward(const BackwardInputs& b, const Inputs& in) {
  static const BackwardOperator<Tensor> call("cross_entropy::weight_backward");
  return call(b, in);
}

Tensor logit_scale_backward(const BackwardInputs& b, const Inputs& in) {
  static const BackwardOperator<Tensor> call("cross_entropy::logit_scale_backward");
  return call(b, in);
}

void scale_(Tensor grad, const Tensor& factor) {
  static const auto call =
      c10::Dispatcher::singleton().findSchemaOrThrow("cross_entropy::scale_", "").typed<void(Tensor&, const Tensor&)>();
  call.call(grad, factor);
}

}  // namespace op

TORCH_LIBRARY(cross_entropy, m) {
  m.def("cross_entropy(" CE_INPUTS ") -> Tensor", &unpacked<&cross_entropy>);
  m.def("cross_entropy_(" CE_INPUTS_TO_WRITE_TO ") -> Tensor");
  m.def(
      "row_stats(Tensor logits, Tensor target, Tensor? weight, SymInt ignore_index, float label_smoothing)"
      " -> (Tensor maximum, Tensor logsumexp, Tensor loss)",
      &row_stats);
  m.def("divisor(" CE_INPUTS ") -> Tensor", &unpacked<&formulas::divisor>);
  m.def("reduce(Tensor rows, " CE_INPUTS ") -> Tensor", &unpacked_after<const Tensor&, &formulas::reduce>);

  m.def("loss(" CE_INPUTS ") -> Tensor");
  m.def("forward(" CE_INPUTS ") -> (Tensor loss, Tensor max, Tensor sum, Tensor lse)");
  m.def("stats(int outputs, " CE_INPUTS
        ") -> (Tensor loss, Tensor max, Tensor sum, Tensor lse, Tensor log_prob, Tensor entropy, Tensor argmax, "
        "Tensor rank)");
  m.def("diverge(" CE_INPUTS
        ") -> (Tensor loss, Tensor max, Tensor sum, Tensor teacher_max, Tensor teacher_sum, Tensor mean)");
  m.def("shard_state(bool all_rows, " CE_INPUTS ") -> Tensor");
  m.def("merge_shards(Tensor states, float z_loss) -> (Tensor loss, Tensor max, Tensor sum, Tensor coefficients)");
  m.def("forward_grad(" CE_INPUTS ") -> (Tensor loss, Tensor grad)");
  m.def("forward_grad_(" CE_INPUTS_TO_WRITE_TO ") -> Tensor");
  m.def("backward(" CE_BACKWARD_INPUTS CE_INPUTS ") -> Tensor");
  m.def("backward_(" CE_BACKWARD_INPUTS CE_INPUTS_TO_WRITE_TO ") -> ()");
  m.def("target_backward(" CE_BACKWARD_INPUTS CE_INPUTS ") -> Tensor");
  m.def("weight_backward(" CE_BACKWARD_INPUTS CE_INPUTS ") -> Tensor");
  m.def("logit_scale_backward(" CE_BACKWARD_INPUTS CE_INPUTS ") -> Tensor");
  m.def("scale_(Tensor(a!) grad, Tensor factor) -> ()");
}

TORCH_LIBRARY_IMPL(cross_entropy, CPU, m) {
  Kernels<CpuBackend>::add_to(m);
}

TORCH_LIBRARY_IMPL(cross_entropy, CUDA, m) {
  Kernels<CudaBackend>::add_to(m);
}

TORCH_LIBRARY_IMPL(cross_entropy, Meta, m) {
  m.impl("loss", &unpacked<&meta::loss>);
  m.impl("forward", &unpacked<&meta::forward>);
  m.impl("stats", &unpacked_after<int64_t, &meta::stats>);
  m.impl("diverge", &unpacked<&meta::diverge>);
  m.impl("shard_state", &unpacked_after<bool, &meta::shard_state>);
  m.impl("merge_shards", &meta::merge_shards);
  m.impl("forward_grad", &unpacked<&meta::forward_grad>);
  m.impl("forward_grad_", &unpacked<&meta::forward_grad_>);
  m.impl("backward", &unpacked_backward<&meta::backward>);
  m.impl("backward_", &unpacked_backward<&meta::backward_>);
  m.impl("target_backward", &unpacked_backward<&meta::target_backward>);
  m.impl("weight_backward", &unpacked_backward<&meta::weight_backward>);
  m.impl("logit_scale_backward", &unpacked_backward<&meta::logit_scale_backward>);
  m.impl("scale_", &meta::scale_);
}

}  // namespace ce
