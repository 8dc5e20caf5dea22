// Autograd above the operators: the backward node, and the cases that are written from differentiable operators.

#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <pybind11/pybind11.h>

#include <array>
#include <utility>

#include "arguments.h"
#include "checks.h"
#include "formulas.h"
#include "problem.h"

namespace ce {
namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Nodes are held by std::shared_ptr up to torch 2.12 and by c10::intrusive_ptr since.
using NodePtr = decltype(torch::autograd::Edge::function);

template <typename T>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

bool requires_grad(const Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}
bool requires_grad(const OptionalTensor& tensor) {
  return tensor && requires_grad(*tensor);
}

bool has_tangent(const Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
bool has_tangent(const OptionalTensor& tensor) {
  return tensor && has_tangent(*tensor);
}

template <typename... Tensors>
bool needs_graph(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}
template <typename... Tensors>
bool is_differentiated(const Tensors&... tensors) {
  return needs_graph(tensors...) || (has_tangent(tensors) || ...);
}

bool any_has_tangent(const Inputs& in) {
  return has_tangent(in.logits) || has_tangent(in.target) || has_tangent(in.weight) || has_tangent(in.row_weight) ||
         has_tangent(in.logit_scale);
}
bool needs_graph(const Inputs& in) {
  return needs_graph(in.logits, in.target, in.weight, in.row_weight, in.logit_scale);
}

// Inside a transform of torch.func, which may differentiate what is computed from the tensor any number of times.
bool is_transformed(const Tensor& tensor) {
  return tensor.key_set().has_any(c10::DispatchKeySet(
      {c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}
bool is_transformed(const OptionalTensor& tensor) {
  return tensor && is_transformed(*tensor);
}
bool is_transformed(const Inputs& in) {
  return is_transformed(in.logits) || is_transformed(in.target) || is_transformed(in.weight) ||
         is_transformed(in.row_weight) || is_transformed(in.logit_scale) || is_transformed(in.picked);
}

// Not where only the factor is batched, a subclass, or has a tangent.
bool scales_in_place(const Tensor& scaled, const Tensor& factor) {
  return !is_transformed(factor) && !has_tangent(factor) &&
         (scaled.key_set().has(c10::DispatchKey::Python) || !factor.key_set().has(c10::DispatchKey::Python));
}

Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor ? *tensor : Tensor();
}
OptionalTensor if_defined(Tensor tensor) {
  return tensor.defined() ? OptionalTensor(std::move(tensor)) : std::nullopt;
}

// The inputs of a call, kept for its backward pass.
struct SavedInputs {
  Options options{};
  bool is_plain = true;
  SavedVariable logits, target, weight, row_weight, logit_scale, divisor, picked;

  auto variables() { return std::array{&logits, &target, &weight, &row_weight, &logit_scale, &divisor, &picked}; }

  void save(const Inputs& in) {
    options = in.options;
    logits = SavedVariable(in.logits, /*is_output=*/false);
    target = SavedVariable(in.target, false);
    weight = SavedVariable(or_undefined(in.weight), false);
    is_plain = in.is_plain();
    if (!is_plain) {
      row_weight = SavedVariable(or_undefined(in.row_weight), false);
      logit_scale = SavedVariable(or_undefined(in.logit_scale), false);
      divisor = SavedVariable(or_undefined(in.divisor), false);
      picked = SavedVariable(or_undefined(in.picked), false);
    }
  }
};

struct UnpackedInputs {
  Options options;
  Tensor logits, target;
  OptionalTensor weight, row_weight, logit_scale, divisor, picked;

  explicit UnpackedInputs(const SavedInputs& saved)
      : options(saved.options),
        logits(saved.logits.unpack()),
        target(saved.target.unpack()),
        weight(if_defined(saved.weight.unpack())),
        row_weight(if_defined(saved.row_weight.unpack())),
        logit_scale(if_defined(saved.logit_scale.unpack())),
        divisor(if_defined(saved.divisor.unpack())),
        picked(if_defined(saved.picked.unpack())) {}

  Inputs inputs() const { return {logits, target, weight, options, row_weight, logit_scale, divisor, picked}; }
};

// Of the gradient of the logits.
struct GradientBackward : Node {
  SavedInputs saved;
  SavedVariable grad_loss, grad_lse;

  std::string name() const override { return "CrossEntropyBackwardBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : saved.variables()) {
      variable->reset_data();
    }
    grad_loss.reset_data();
    grad_lse.reset_data();
  }

  variable_list apply(variable_list&& inputs) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list outputs(num_outputs());
    if (inputs[0].defined()) {
      const UnpackedInputs in(saved);
      auto grads = formulas::gradients_of_gradient(inputs[0], grad_loss.unpack(), grad_lse.unpack(), in.inputs());
      for (const auto i : c10::irange(num_outputs())) {
        if (task_should_compute_output(i)) {
          outputs[i] = std::move(grads[i]);
        }
      }
    }
    return outputs;
  }
};

// Gives the gradient of the logits that a kernel has computed its own backward pass.
Tensor with_graph(Tensor grad, const Tensor& grad_loss, const OptionalTensor& grad_lse, const Inputs& in) {
  if (needs_graph(grad_loss, grad_lse, in.logits, in.target, in.weight)) {
    auto node = make_node<GradientBackward>();
    const Tensor g_lse = or_undefined(grad_lse);
    node->set_next_edges(
        torch::autograd::collect_next_edges(grad_loss, g_lse, in.logits, in.target, or_undefined(in.weight)));
    node->grad_loss = SavedVariable(grad_loss, /*is_output=*/false);
    node->grad_lse = SavedVariable(g_lse, false);
    node->saved.save(in);
    torch::autograd::set_history(grad, node);
  }
  return grad;
}

// The gradients of `wanted` by torch's own derivatives of the formulas, with a graph; undefined where there is none.
variable_list differentiate(const Inputs& in, const BackwardInputs& b, const variable_list& wanted) {
  TORCH_CHECK_NOT_IMPLEMENTED(!in.is_shard(), "cross_entropy: the gradient of a shard of the classes has no gradient");
  const at::AutoGradMode grad_mode(true);
  variable_list results, grads;
  const auto add = [&](const Tensor& result, const OptionalTensor& grad) {
    if (grad && grad->defined()) {
      results.push_back(result);
      grads.push_back(*grad);
    }
  };
  if (b.grad_lse || b.grad_log_prob || b.grad_entropy) {
    const int64_t outputs = (b.grad_log_prob ? int64_t{kLogProb} : 0) | (b.grad_entropy ? int64_t{kEntropy} : 0);
    const auto [loss, max, sum, lse, log_prob, entropy, argmax, rank] = formulas::stats(outputs, in);
    add(loss, b.grad_loss);
    add(lse, b.grad_lse);
    add(log_prob, b.grad_log_prob);
    add(entropy, b.grad_entropy);
  } else {
    add(formulas::loss(in), b.grad_loss);
  }
  std::optional<pybind11::gil_scoped_release> no_gil;  // the engine wants nobody to hold it
  if (PyGILState_Check()) {
    no_gil.emplace();
  }
  return torch::autograd::grad(results, wanted, grads, /*retain_graph=*/true, /*create_graph=*/true,
                               /*allow_unused=*/true);
}

// That of the logits.
Tensor differentiable_gradient(const BackwardInputs& b, const Inputs& in) {
  const Tensor logits = in.logits.requires_grad() ? in.logits : in.logits.detach().requires_grad_();
  return differentiate(in.of(logits), b, {logits})[0];
}

// Of the loss (input 0 of the node) and, for what is asked of rows, of each row's lse, log_prob and entropy.
struct LossBackward : Node {
  enum Output { kLogits, kTarget, kWeight, kLogitScale };

  SavedInputs saved;
  SavedVariable max, sum;  // where the gradient is left to the backward pass
  SavedVariable entropy;   // where it has a gradient
  SavedVariable teacher_max, teacher_sum, mean;
  Tensor grad;                     // where the forward pass has computed it, for an upstream gradient of 1
  bool replaces_logits = false;    // that gradient is in their memory; or
  bool overwrites_logits = false;  // the backward pass writes it there

  std::string name() const override { return "CrossEntropyBackward"; }

  template <typename F>
  void for_each_variable(F&& f) {
    for (SavedVariable* variable : saved.variables()) {
      f(*variable);
    }
    f(max);
    f(sum);
    f(entropy);
    f(teacher_max);
    f(teacher_sum);
    f(mean);
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for_each_variable([](SavedVariable& variable) { variable.reset_data(); });
    grad.reset();
  }

  // Compiled autograd traces the backward pass with stand-ins for what was saved.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const Options& options = saved.options;
    const auto collect_optional = [&](const auto& option, auto value) {
      args.collect(option.has_value());
      args.collect(value);
    };
    args.collect(options.reduction);
    args.collect(options.ignore_index.guard_int(__FILE__, __LINE__));
    args.collect(options.label_smoothing);
    args.collect(options.z_loss);
    collect_optional(options.softcap, options.softcap.value_or(0));
    args.collect(options.logit_scale);
    collect_optional(options.divisor, options.divisor.value_or(0));
    collect_optional(options.valid_classes, options.valid_classes.value_or(0).guard_int(__FILE__, __LINE__));
    args.collect(options.zero_if_empty);
    args.collect(options.divergence);
    args.collect(options.reverse);
    args.collect(options.teacher_scale);
    args.collect(options.spreads);
    args.collect(overwrites_logits);
    const_cast<LossBackward*>(this)->for_each_variable(
        [&](SavedVariable& variable) { args.collect(variable, /*is_output=*/false); });
  }

  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& stand_ins) override {
    TORCH_CHECK_NOT_IMPLEMENTED(!replaces_logits, "cross_entropy: inplace=True does not work with compiled autograd");
    for_each_variable([&](SavedVariable& variable) { stand_ins.before(variable); });
    const Tensor kept = std::exchange(grad, {});  // the inputs of the trace have no shape that it could be scaled by
    variable_list grads(inputs);
    for (const auto i : c10::irange(grads.size())) {
      if (grads[i].defined()) {  // torch has its stand-ins for gradients on the CPU, wherever they will be
        grads[i] = grads[i].to(input_metadata(i).device());
      }
    }
    variable_list outputs = apply(std::move(grads));
    grad = kept;
    for_each_variable([&](SavedVariable& variable) { stand_ins.after(variable); });
    return outputs;
  }

  variable_list apply(variable_list&& inputs) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list outputs(num_outputs());
    const Tensor grad_loss = inputs[0];
    const auto of_rows = [&](size_t i) { return inputs.size() > i ? if_defined(inputs[i]) : std::nullopt; };
    const OptionalTensor grad_lse = of_rows(1), grad_log_prob = of_rows(2), grad_entropy = of_rows(3);
    if (!grad_loss.defined() && !grad_lse && !grad_log_prob && !grad_entropy) {
      return outputs;
    }
    const bool create_graph = at::GradMode::is_enabled();
    if (grad.defined() && !(create_graph && (replaces_logits || has_tangent(grad_loss) || !saved.is_plain))) {
      outputs[kLogits] = take_grad(grad_loss, create_graph);
      return outputs;
    }
    TORCH_CHECK(
        !replaces_logits,
        "cross_entropy: after inplace=True there are no logits from which a gradient could be computed a second "
        "time, or differentiated");
    TORCH_CHECK(!create_graph || !overwrites_logits, "cross_entropy: inplace=True has no double backward");
    const UnpackedInputs unpacked(saved);
    const Inputs in = unpacked.inputs();
    Tensor row_max = max.unpack();
    Tensor row_sum = sum.unpack();
    const bool is_differentiated = create_graph || has_tangent(grad_loss) || has_tangent(grad_lse) ||
                                   has_tangent(grad_log_prob) || has_tangent(grad_entropy);
    if ((is_differentiated && (!in.is_plain() || grad_log_prob || grad_entropy)) ||
        ((in.has_teacher() || in.picked) && task_should_compute_output(kLogitScale))) {
      return differentiable_gradients(in, {grad_loss, grad_lse, row_max, row_sum, grad_log_prob, grad_entropy});
    }
    Tensor row_teacher_max = teacher_max.unpack(), row_teacher_sum = teacher_sum.unpack(), row_mean = mean.unpack();
    if (!row_max.defined()) {
      const at::NoGradGuard no_graph;
      if (in.has_teacher()) {
        std::tie(std::ignore, row_max, row_sum, row_teacher_max, row_teacher_sum, row_mean) = op::diverge(in);
      } else {
        std::tie(std::ignore, row_max, row_sum, std::ignore) = op::forward(in);
      }
    }
    const Tensor upstream = grad_loss.defined() ? grad_loss : at::zeros({}, row_max.options());
    const OptionalTensor row_entropy = if_defined(entropy.unpack());
    const OptionalTensor of_teacher_max = if_defined(row_teacher_max), of_teacher_sum = if_defined(row_teacher_sum);
    const OptionalTensor of_mean = if_defined(row_mean);
    const BackwardInputs b{upstream,     grad_lse,    row_max,        row_sum,        grad_log_prob,
                           grad_entropy, row_entropy, of_teacher_max, of_teacher_sum, of_mean};
    if (task_should_compute_output(kTarget)) {
      outputs[kTarget] = op::target_backward(b, in);
    }
    if (task_should_compute_output(kWeight)) {
      outputs[kWeight] = op::weight_backward(b, in);
    }
    if (task_should_compute_output(kLogitScale)) {
      outputs[kLogitScale] = op::logit_scale_backward(b, in);
    }
    if (task_should_compute_output(kLogits)) {
      if (overwrites_logits) {
        const Tensor overwritten = in.logits.detach();
        op::backward_(b, in.of(overwritten));
        torch::autograd::impl::bump_version(in.logits);
        outputs[kLogits] = overwritten;
      } else {
        outputs[kLogits] = op::backward(b, in);
      }
    }
    return outputs;
  }

 private:
  // What the forward pass has computed. Handed out once: what the engine has got is never written to again.
  Tensor take_grad(const Tensor& grad_loss, bool create_graph) {
    Tensor result = std::move(grad);
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (create_graph) {
      guard.emplace();
    }
    if (scales_in_place(result, grad_loss)) {
      op::scale_(result, grad_loss);
    } else {
      result = (result * grad_loss).to(result.scalar_type());
    }
    guard.reset();
    return create_graph ? with_graph(result, grad_loss, std::nullopt, UnpackedInputs(saved).inputs()) : result;
  }

  variable_list differentiable_gradients(const Inputs& in, const BackwardInputs& b) {
    variable_list outputs(num_outputs()), wanted;
    const std::array<Tensor, 4> operands{in.logits, in.target, or_undefined(in.weight), or_undefined(in.logit_scale)};
    for (const auto i : c10::irange(num_outputs())) {
      if (task_should_compute_output(i)) {
        wanted.push_back(operands[i]);
      }
    }
    variable_list grads = differentiate(in, b, wanted);
    size_t next = 0;
    for (const auto i : c10::irange(num_outputs())) {
      if (task_should_compute_output(i)) {
        outputs[i] = std::move(grads[next++]);
      }
    }
    return outputs;
  }
};

// Stands for logits that hold their gradient: whoever needs them in a backward pass gets an error, not garbage.
struct OverwrittenLogits : Node {
  std::string name() const override { return "OverwrittenLogits"; }
  variable_list apply(variable_list&&) override {
    TORCH_CHECK(false,
                "the logits were overwritten with their gradient by cross_entropy(..., inplace=True); what was "
                "computed from them afterwards has no gradient");
  }
};

// The forward pass has to leave the gradient in a dtype that holds it before the upstream gradient is known. Float16
// does not: gradients of 1e-8 that a loss scale of 65536 is about to rescue would be lost.
bool computes_grad_in_forward(const Inputs& in) {
  return in.options.reduction != at::Reduction::None && in.logits.scalar_type() != at::kHalf &&
         !in.target.requires_grad() && !requires_grad(in.weight) && !requires_grad(in.logit_scale);
}

auto make_backward(const Inputs& in) {
  auto node = make_node<LossBackward>();
  node->saved.options = in.options;
  node->set_next_edges(
      torch::autograd::collect_next_edges(in.logits, in.target, or_undefined(in.weight), or_undefined(in.logit_scale)));
  return node;
}

template <typename NodeType>
void save_rows(NodeType& node, const Tensor& max, const Tensor& sum) {
  node->max = SavedVariable(max, /*is_output=*/false);
  node->sum = SavedVariable(sum, false);
}

void check_index_weight(const Inputs& in) {
  TORCH_CHECK(is_probabilities(in) || !requires_grad(in.weight) || !at::GradMode::is_enabled(),
              "The function 'cross_entropy' is not differentiable with respect to argument 'weight' for class indices. "
              "This input cannot have requires_grad True.");
}

// The forward pass that leaves the gradient to the backward pass, and all of its results.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with_graph(const Inputs& in) {
  Tensor loss, max, sum, lse;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, max, sum, lse) = op::forward(in);
  }
  if (needs_graph(in)) {
    auto node = make_backward(in);
    save_rows(node, max, sum);
    node->saved.save(in);
    torch::autograd::set_history(loss, node);
    torch::autograd::set_history(lse, node);
  }
  return {loss, max, sum, lse};
}

// The loss, and in the node what the backward pass computes the gradient from.
template <typename NodeType>
Tensor forward_for(NodeType& node, const Inputs& in) {
  if (in.has_teacher()) {
    const auto [loss, max, sum, teacher_max, teacher_sum, mean] = op::diverge(in);
    save_rows(node, max, sum);
    node->teacher_max = SavedVariable(teacher_max, /*is_output=*/false);
    node->teacher_sum = SavedVariable(teacher_sum, false);
    node->mean = SavedVariable(mean, false);
    return loss;
  }
  const auto [loss, max, sum, lse] = op::forward(in);
  save_rows(node, max, sum);
  return loss;
}

// With the tangent that its logits give the loss: the gradient of each row's loss times the row's tangent.
Tensor loss_with_tangent(const Inputs& in) {
  const auto [loss, max, sum, lse] = forward_with_graph(in);
  const Tensor x = in.logits._fw_primal(/*level=*/0);
  const Inputs primal = in.of(x);
  const Tensor grad = op::backward({at::ones_like(max), kNoTensor, max, sum}, primal.of_rows());
  const Tensor tangents =
      (grad * in.logits._fw_grad(0)).sum(class_dim(in.logits), /*keepdim=*/false, max.scalar_type());
  loss._set_fw_grad(formulas::reduce(tangents, primal), /*level=*/0, /*is_inplace_op=*/false);
  return loss;
}

// The loss of rows by themselves, weighted and reduced by torch's operators, which know the row weights' gradient.
template <typename Loss>
Tensor loss_of_weighted_rows(const Inputs& in, Loss&& loss) {
  return formulas::reduce(loss(in.of_rows()), in);
}

Tensor loss_autograd(const Inputs& in) {
  check_index_weight(in);
  if (!in.is_plain() && (any_has_tangent(in) || is_transformed(in))) {
    check(in);
    return formulas::loss(in);
  }
  if (has_tangent(in.target) || has_tangent(in.weight)) {
    check(in);
    return formulas::loss(in);
  }
  if (has_tangent(in.logits)) {
    return loss_with_tangent(in);
  }
  if (!needs_graph(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op::loss(in);
  }
  if (requires_grad(in.row_weight)) {
    check(in);
    return loss_of_weighted_rows(in, op::loss);
  }
  auto node = make_backward(in);
  Tensor loss;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (computes_grad_in_forward(in)) {
      std::tie(loss, node->grad) = op::forward_grad(in);
    } else {
      loss = forward_for(node, in);
    }
  }
  node->saved.save(in);
  torch::autograd::set_history(loss, node);
  return loss;
}

Tensor loss_autograd_(const Inputs& in) {
  if (is_transformed(in.logits)) {
    return op::loss(in);
  }
  Tensor logits = in.logits;
  check(in);
  check_index_weight(in);
  TORCH_CHECK(!in.target.requires_grad() && !requires_grad(in.weight),
              "cross_entropy: inplace=True overwrites the logits that the gradients of target and weight need");
  TORCH_CHECK(!any_has_tangent(in), "cross_entropy: inplace=True has no forward-mode gradient");
  if (!needs_graph(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op::loss(in);
  }
  if (requires_grad(in.row_weight)) {
    return loss_of_weighted_rows(in, cross_entropy_);
  }
  check_overwritable(logits);
  auto node = make_backward(in);
  Tensor loss;
  if (computes_grad_in_forward(in)) {
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      node->replaces_logits = true;
      node->grad = logits.detach();
      loss = op::forward_grad_(in.of(node->grad));
    }
    torch::autograd::impl::bump_version(logits);
    auto overwritten = make_node<OverwrittenLogits>();
    overwritten->set_next_edges(torch::autograd::collect_next_edges(logits));
    torch::autograd::rebase_history(logits, overwritten);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    loss = forward_for(node, in);
    node->overwrites_logits = true;
    node->saved.save(in);
  }
  torch::autograd::set_history(loss, node);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_autograd(const Inputs& in) {
  check_index_weight(in);
  const auto [loss, max, sum, lse] = forward_with_graph(in);
  if (any_has_tangent(in)) {
    const Stats stats = formulas::stats(/*outputs=*/0, in);
    return {std::get<0>(stats), max, sum, std::get<3>(stats)};
  }
  return {loss, max, sum, lse};
}

Stats stats_autograd(int64_t outputs, const Inputs& in) {
  check_index_weight(in);
  if (any_has_tangent(in) || is_transformed(in)) {
    check(in);
    return formulas::stats(outputs, in);
  }
  Stats stats;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    stats = op::stats(outputs, in);
  }
  if (needs_graph(in)) {
    const auto& [loss, max, sum, lse, log_prob, entropy, argmax, rank] = stats;
    auto node = make_backward(in);
    save_rows(node, max, sum);
    node->saved.save(in);
    for (const Tensor& result : {loss, lse, log_prob, entropy}) {
      torch::autograd::set_history(result, node);
    }
    node->entropy = SavedVariable(entropy.detach(), /*is_output=*/false);
  }
  return stats;
}

Diverged diverge_autograd(const Inputs& in) {
  if (any_has_tangent(in) || is_transformed(in)) {
    check(in);
    return formulas::diverge(in);
  }
  Diverged diverged;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    diverged = op::diverge(in);
  }
  if (needs_graph(in)) {
    auto node = make_backward(in);  // which finds the rows' results again
    node->saved.save(in);
    torch::autograd::set_history(std::get<0>(diverged), node);
  }
  return diverged;
}

Tensor loss_not_replaced(const Inputs& in) {
  return op::loss(in);
}

// The steps are differentiated where transforms of torch.func are nested, each level of which has an autograd of its
// own: what is below the autograd of one is differentiated by the next.

std::tuple<Tensor, Tensor> forward_grad_autograd(const Inputs& in) {
  const Tensor one = at::ones({}, in.logits.options().dtype(accumulator_of(in.logits.scalar_type())));
  if (!in.is_plain() && (any_has_tangent(in) || needs_graph(in))) {
    return {formulas::loss(in), differentiable_gradient({one, kNoTensor, one, one}, in)};
  }
  if (any_has_tangent(in)) {
    return {formulas::loss(in), formulas::logits_gradient(one, {}, in)};
  }
  Tensor loss, grad;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, grad) = op::forward_grad(in);
  }
  if (needs_graph(in)) {
    auto node = make_backward(in);
    node->saved.save(in);
    torch::autograd::set_history(loss, node);
    grad = with_graph(grad, one, std::nullopt, in);
  }
  return {loss, grad};
}

Tensor backward_autograd(const BackwardInputs& b, const Inputs& in) {
  const bool has_tangents = has_tangent(b.grad_loss) || has_tangent(b.grad_lse) || has_tangent(b.grad_log_prob) ||
                            has_tangent(b.grad_entropy) || any_has_tangent(in);
  if (!in.is_plain() || b.grad_log_prob || b.grad_entropy) {
    if (has_tangents || needs_graph(b.grad_loss, b.grad_lse, b.grad_log_prob, b.grad_entropy) || needs_graph(in)) {
      return differentiable_gradient(b, in);
    }
  } else if (has_tangents) {
    return formulas::logits_gradient(b.grad_loss, or_undefined(b.grad_lse), in);
  }
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    grad = op::backward(b, in);
  }
  return with_graph(grad, b.grad_loss, b.grad_lse, in);
}

Tensor target_backward_autograd(const BackwardInputs& b, const Inputs& in) {
  if (is_differentiated(b.grad_loss, in.logits, in.target, in.weight)) {
    if (in.has_teacher()) {
      const Tensor teacher = in.target.requires_grad() ? in.target : in.target.detach().requires_grad_();
      return differentiate({in.logits, teacher, in.weight, in.options, in.row_weight, in.logit_scale, in.divisor}, b,
                           {teacher})[0];
    }
    return formulas::target_gradient(b.grad_loss, in);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return op::target_backward(b, in);
}

Tensor weight_backward_autograd(const BackwardInputs& b, const Inputs& in) {
  if (is_differentiated(b.grad_loss, in.logits, in.target, in.weight)) {
    return formulas::weight_gradient(b.grad_loss, in);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return op::weight_backward(b, in);
}

Tensor logit_scale_backward_autograd(const BackwardInputs& b, const Inputs& in) {
  if (is_differentiated(b.grad_loss, in.logits, in.target, in.weight, in.row_weight, in.logit_scale)) {
    return formulas::logit_scale_gradient(b.grad_loss, in);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return op::logit_scale_backward(b, in);
}

void scale__autograd(Tensor& grad, const Tensor& factor) {
  if (is_differentiated(grad, factor)) {
    grad.mul_(factor);
    return;
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  op::scale_(grad, factor);
}

}  // namespace

void check_overwritable(const Tensor& logits) {
  torch::autograd::check_inplace(logits, /*requires_grad=*/true);
  TORCH_CHECK(logits.is_non_overlapping_and_dense(),
              "cross_entropy: inplace=True needs logits that are dense in memory and do not overlap");
}

Tensor cross_entropy(const Inputs& in) {
  if (at::isFloatingType(in.target.scalar_type()) && at::isFloatingType(in.logits.scalar_type()) &&
      is_probabilities(in)) {
    ScalarType promoted = c10::promoteTypes(in.logits.scalar_type(), in.target.scalar_type());
    if (in.weight && in.weight->defined()) {
      promoted = c10::promoteTypes(promoted, in.weight->scalar_type());
    }
    if (promoted != in.logits.scalar_type() || promoted != in.target.scalar_type()) {
      const Tensor logits = in.logits.to(promoted), target = in.target.to(promoted);
      return op::loss(Inputs{logits, target, in.weight, in.options, in.row_weight, in.logit_scale, in.divisor});
    }
  }
  return op::loss(in);
}

Tensor cross_entropy_(const Inputs& in) {
  static const Operator<Tensor> call("cross_entropy::cross_entropy_");
  return call(in);
}

std::tuple<Tensor, Tensor, Tensor> row_stats(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                             c10::SymInt ignore_index, double label_smoothing) {
  const Options options{at::Reduction::None, std::move(ignore_index), label_smoothing, /*full_precision=*/true};
  const auto [loss, max, sum, lse] = op::forward({logits, target, weight, options});
  return {max, lse, loss};
}

TORCH_LIBRARY_IMPL(cross_entropy, Autograd, m) {
  m.impl("loss", &unpacked<&loss_autograd>);
  m.impl("forward", &unpacked<&forward_autograd>);
  m.impl("stats", &unpacked_after<int64_t, &stats_autograd>);
  m.impl("diverge", &unpacked<&diverge_autograd>);
  m.impl("forward_grad", &unpacked<&forward_grad_autograd>);
  m.impl("backward", &unpacked_backward<&backward_autograd>);
  m.impl("target_backward", &unpacked_backward<&target_backward_autograd>);
  m.impl("weight_backward", &unpacked_backward<&weight_backward_autograd>);
  m.impl("logit_scale_backward", &unpacked_backward<&logit_scale_backward_autograd>);
  m.impl("scale_", &scale__autograd);
  m.impl("cross_entropy_", &unpacked<&loss_autograd_>);
}

// Where there is no autograd: of tensors made in inference mode.
TORCH_LIBRARY_IMPL(cross_entropy, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy_", &unpacked<&loss_not_replaced>);
}

}  // namespace ce
