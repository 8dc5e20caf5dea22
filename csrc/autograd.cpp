// Autograd above the operators: the backward node, and the cases that are written from differentiable operators.

#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "checks.h"
#include "formulas.h"
#include "ops.h"
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
bool any_has_tangent(const Tensors&... tensors) {
  return (has_tangent(tensors) || ...);
}
template <typename... Tensors>
bool needs_graph(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}
template <typename... Tensors>
bool is_differentiated(const Tensors&... tensors) {
  return needs_graph(tensors...) || any_has_tangent(tensors...);
}

// Inside a transform of torch.func, which may differentiate what is computed from the tensor any number of times.
bool is_transformed(const Tensor& tensor) {
  return tensor.key_set().has_any(c10::DispatchKeySet(
      {c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

// Not where only the factor is batched, a subclass, or has a tangent.
bool scales_in_place(const Tensor& scaled, const Tensor& factor) {
  return !is_transformed(factor) && !has_tangent(factor) &&
         (scaled.key_set().has(c10::DispatchKey::Python) || !factor.key_set().has(c10::DispatchKey::Python));
}

Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor ? *tensor : Tensor();
}

// Of the gradient of the logits.
struct GradientBackward : Node {
  Options options{};
  SavedVariable grad_loss, grad_lse, logits, target, weight;

  std::string name() const override { return "CrossEntropyBackwardBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&grad_loss, &grad_lse, &logits, &target, &weight}) {
      variable->reset_data();
    }
  }

  variable_list apply(variable_list&& inputs) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list outputs(num_outputs());
    if (inputs[0].defined()) {
      const OptionalTensor w = weight.unpack();
      auto grads = formulas::gradients_of_gradient(inputs[0], grad_loss.unpack(), grad_lse.unpack(), logits.unpack(),
                                                   target.unpack(), w, options);
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
Tensor with_graph(Tensor grad, const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& logits,
                  const Tensor& target, const OptionalTensor& weight, const Options& options) {
  if (needs_graph(grad_loss, grad_lse, logits, target, weight)) {
    auto node = make_node<GradientBackward>();
    const Tensor g_lse = or_undefined(grad_lse), w = or_undefined(weight);
    node->options = options;
    node->set_next_edges(torch::autograd::collect_next_edges(grad_loss, g_lse, logits, target, w));
    node->grad_loss = SavedVariable(grad_loss, /*is_output=*/false);
    node->grad_lse = SavedVariable(g_lse, false);
    node->logits = SavedVariable(logits, false);
    node->target = SavedVariable(target, false);
    node->weight = SavedVariable(w, false);
    torch::autograd::set_history(grad, node);
  }
  return grad;
}

// Of the loss (input 0 of the node) and, for row_stats, of each row's lse (input 1).
struct LossBackward : Node {
  enum Output { kLogits, kTarget, kWeight };

  Options options{};
  SavedVariable logits, target, weight;
  SavedVariable max, sum;          // where the gradient is left to the backward pass
  Tensor grad;                     // where the forward pass has computed it, for an upstream gradient of 1
  bool replaces_logits = false;    // that gradient is in their memory; or
  bool overwrites_logits = false;  // the backward pass writes it there

  std::string name() const override { return "CrossEntropyBackward"; }

  auto saved_variables() { return std::array{&logits, &target, &weight, &max, &sum}; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : saved_variables()) {
      variable->reset_data();
    }
    grad.reset();
  }

  // Compiled autograd traces the backward pass with stand-ins for what was saved.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(options.reduction);
    args.collect(options.ignore_index.guard_int(__FILE__, __LINE__));
    args.collect(options.label_smoothing);
    args.collect(overwrites_logits);
    for (const SavedVariable* variable : const_cast<LossBackward*>(this)->saved_variables()) {
      args.collect(*variable, /*is_output=*/false);
    }
  }

  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    TORCH_CHECK_NOT_IMPLEMENTED(!replaces_logits, "cross_entropy: inplace=True does not work with compiled autograd");
    for (SavedVariable* variable : saved_variables()) {
      saved.before(*variable);
    }
    const Tensor kept = std::exchange(grad, {});  // the inputs of the trace have no shape that it could be scaled by
    variable_list outputs = apply(variable_list(inputs));
    grad = kept;
    for (SavedVariable* variable : saved_variables()) {
      saved.after(*variable);
    }
    return outputs;
  }

  variable_list apply(variable_list&& inputs) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list outputs(num_outputs());
    const Tensor grad_loss = inputs[0];
    const Tensor grad_lse = inputs.size() > 1 ? inputs[1] : Tensor();
    if (!grad_loss.defined() && !grad_lse.defined()) {
      return outputs;
    }
    const bool create_graph = at::GradMode::is_enabled();
    if (grad.defined() && !(create_graph && (replaces_logits || has_tangent(grad_loss)))) {
      outputs[kLogits] = take_grad(grad_loss, create_graph);
      return outputs;
    }
    TORCH_CHECK(
        !replaces_logits,
        "cross_entropy: after inplace=True there are no logits from which a gradient could be computed a second "
        "time, or differentiated");
    TORCH_CHECK(!create_graph || !overwrites_logits, "cross_entropy: inplace=True has no double backward");
    const Tensor x = logits.unpack();
    const Tensor q = target.unpack();
    const OptionalTensor w = weight.unpack();
    Tensor row_max = max.unpack();
    Tensor row_sum = sum.unpack();
    if (!row_max.defined()) {
      const at::NoGradGuard no_graph;
      std::tie(std::ignore, row_max, row_sum, std::ignore) = op::forward(x, q, w, options);
    }
    const Tensor upstream = grad_loss.defined() ? grad_loss : at::zeros({}, row_max.options());
    if (task_should_compute_output(kTarget)) {
      outputs[kTarget] = op::target_backward(upstream, x, q, w, row_max, row_sum, options);
    }
    if (task_should_compute_output(kWeight)) {
      outputs[kWeight] = op::weight_backward(upstream, x, q, *w, row_max, row_sum, options);
    }
    if (task_should_compute_output(kLogits)) {
      if (overwrites_logits) {
        const Tensor overwritten = x.detach();
        op::backward_(overwritten, upstream, q, w, row_max, row_sum, options);
        torch::autograd::impl::bump_version(x);
        outputs[kLogits] = overwritten;
      } else {
        outputs[kLogits] = op::backward(upstream, grad_lse, x, q, w, row_max, row_sum, options);
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
    return create_graph ? with_graph(result, grad_loss, std::nullopt, logits.unpack(), target.unpack(),
                                     OptionalTensor(weight.unpack()), options)
                        : result;
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
bool computes_grad_in_forward(const Tensor& logits, const Options& options) {
  return options.reduction != at::Reduction::None && logits.scalar_type() != at::kHalf;
}

auto make_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Options& options) {
  auto node = make_node<LossBackward>();
  node->options = options;
  node->set_next_edges(torch::autograd::collect_next_edges(logits, target, or_undefined(weight)));
  return node;
}

template <typename NodeType>
void save_inputs(NodeType& node, const Tensor& logits, const Tensor& target, const OptionalTensor& weight) {
  node->logits = SavedVariable(logits, /*is_output=*/false);
  node->target = SavedVariable(target, false);
  node->weight = SavedVariable(or_undefined(weight), false);
}

template <typename NodeType>
void save_rows(NodeType& node, const Tensor& max, const Tensor& sum) {
  node->max = SavedVariable(max, /*is_output=*/false);
  node->sum = SavedVariable(sum, false);
}

void check_index_weight(const Tensor& logits, const Tensor& target, const OptionalTensor& weight) {
  TORCH_CHECK(is_probabilities(logits, target) || !requires_grad(weight) || !at::GradMode::is_enabled(),
              "The function 'cross_entropy' is not differentiable with respect to argument 'weight' for class indices. "
              "This input cannot have requires_grad True.");
}

// The forward pass that leaves the gradient to the backward pass, and all of its results.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with_graph(const Tensor& logits, const Tensor& target,
                                                              const OptionalTensor& weight, const Options& options) {
  Tensor loss, max, sum, lse;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, max, sum, lse) = op::forward(logits, target, weight, options);
  }
  if (needs_graph(logits, target, weight)) {
    auto node = make_backward(logits, target, weight, options);
    save_rows(node, max, sum);
    save_inputs(node, logits, target, weight);
    torch::autograd::set_history(loss, node);
    torch::autograd::set_history(lse, node);
  }
  return {loss, max, sum, lse};
}

// With the tangent that its logits give the loss: the gradient of each row's loss times the row's tangent.
Tensor loss_with_tangent(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                         const Options& options) {
  const auto [loss, max, sum, lse] = forward_with_graph(logits, target, weight, options);
  const Tensor x = logits._fw_primal(/*level=*/0);
  Options of_rows = options;
  of_rows.reduction = at::Reduction::None;
  const Tensor grad = op::backward(at::ones_like(max), std::nullopt, x, target, weight, max, sum, of_rows);
  const Tensor tangents = (grad * logits._fw_grad(0)).sum(class_dim(logits), /*keepdim=*/false, max.scalar_type());
  loss._set_fw_grad(formulas::reduce(tangents, x, target, weight, options), /*level=*/0, /*is_inplace_op=*/false);
  return loss;
}

Tensor loss_autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  check_index_weight(logits, target, weight);
  if (any_has_tangent(target, weight)) {
    check(logits, target, weight, options);
    return formulas::loss(logits, target, weight, options);
  }
  if (has_tangent(logits)) {
    return loss_with_tangent(logits, target, weight, options);
  }
  if (!needs_graph(logits, target, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op::loss(logits, target, weight, options);
  }
  auto node = make_backward(logits, target, weight, options);
  Tensor loss, max, sum;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (computes_grad_in_forward(logits, options) && !target.requires_grad() && !requires_grad(weight)) {
      std::tie(loss, node->grad) = op::forward_grad(logits, target, weight, options);
    } else {
      std::tie(loss, max, sum, std::ignore) = op::forward(logits, target, weight, options);
      save_rows(node, max, sum);
    }
  }
  save_inputs(node, logits, target, weight);
  torch::autograd::set_history(loss, node);
  return loss;
}

Tensor loss_autograd_(Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                      c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  if (is_transformed(logits)) {
    return op::loss(logits, target, weight, options);
  }
  check(logits, target, weight, options);
  check_index_weight(logits, target, weight);
  TORCH_CHECK(!target.requires_grad() && !requires_grad(weight),
              "cross_entropy: inplace=True overwrites the logits that the gradients of target and weight need");
  TORCH_CHECK(!any_has_tangent(logits, target, weight), "cross_entropy: inplace=True has no forward-mode gradient");
  if (!needs_graph(logits, target, weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op::loss(logits, target, weight, options);
  }
  torch::autograd::check_inplace(logits, /*requires_grad=*/true);
  TORCH_CHECK(logits.is_non_overlapping_and_dense(),
              "cross_entropy: inplace=True needs logits that are dense in memory and do not overlap");
  auto node = make_backward(logits, target, weight, options);
  Tensor loss, max, sum;
  if (computes_grad_in_forward(logits, options)) {
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      node->replaces_logits = true;
      node->grad = logits.detach();
      loss = op::forward_grad_(node->grad, target, weight, options);
    }
    torch::autograd::impl::bump_version(logits);
    auto overwritten = make_node<OverwrittenLogits>();
    overwritten->set_next_edges(torch::autograd::collect_next_edges(logits));
    torch::autograd::rebase_history(logits, overwritten);
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, max, sum, std::ignore) = op::forward(logits, target, weight, options);
    save_rows(node, max, sum);
    node->overwrites_logits = true;
    save_inputs(node, logits, target, weight);
  }
  torch::autograd::set_history(loss, node);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_autograd(const Tensor& logits, const Tensor& target,
                                                            const OptionalTensor& weight, int64_t reduction,
                                                            c10::SymInt ignore_index, double label_smoothing,
                                                            bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  check_index_weight(logits, target, weight);
  const auto [loss, max, sum, lse] = forward_with_graph(logits, target, weight, options);
  if (any_has_tangent(logits, target, weight)) {
    return {formulas::loss(logits, target, weight, options), max, sum, formulas::lse(logits)};
  }
  return {loss, max, sum, lse};
}

Tensor loss_not_replaced(Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                         c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  return op::loss(logits, target, weight, {reduction, ignore_index, label_smoothing, full_precision});
}

// The steps are differentiated where transforms of torch.func are nested, each level of which has an autograd of its
// own: what is below the autograd of one is differentiated by the next.

std::tuple<Tensor, Tensor> forward_grad_autograd(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction,
                                                 c10::SymInt ignore_index, double label_smoothing,
                                                 bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  const Tensor one = at::ones({}, logits.options().dtype(accumulator_of(logits.scalar_type())));
  if (any_has_tangent(logits, target, weight)) {
    return {formulas::loss(logits, target, weight, options),
            formulas::logits_gradient(one, {}, logits, target, weight, options)};
  }
  Tensor loss, grad;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, grad) = op::forward_grad(logits, target, weight, options);
  }
  if (needs_graph(logits, target, weight)) {
    auto node = make_backward(logits, target, weight, options);
    save_inputs(node, logits, target, weight);
    torch::autograd::set_history(loss, node);
    grad = with_graph(grad, one, std::nullopt, logits, target, weight, options);
  }
  return {loss, grad};
}

Tensor backward_autograd(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& logits,
                         const Tensor& target, const OptionalTensor& weight, const Tensor& max, const Tensor& sum,
                         int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  const Options options{reduction, ignore_index, label_smoothing};
  if (any_has_tangent(grad_loss, grad_lse, logits, target, weight)) {
    return formulas::logits_gradient(grad_loss, or_undefined(grad_lse), logits, target, weight, options);
  }
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    grad = op::backward(grad_loss, grad_lse, logits, target, weight, max, sum, options);
  }
  return with_graph(grad, grad_loss, grad_lse, logits, target, weight, options);
}

Tensor target_backward_autograd(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const OptionalTensor& weight, const Tensor& max, const Tensor& sum, int64_t reduction,
                                double label_smoothing) {
  const Options options{reduction, /*ignore_index=*/-100, label_smoothing};
  if (is_differentiated(grad_loss, logits, target, weight)) {
    return formulas::target_gradient(grad_loss, logits, target, weight, options);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return op::target_backward(grad_loss, logits, target, weight, max, sum, options);
}

Tensor weight_backward_autograd(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const Tensor& weight, const Tensor& max, const Tensor& sum, int64_t reduction,
                                double label_smoothing) {
  const Options options{reduction, /*ignore_index=*/-100, label_smoothing};
  if (is_differentiated(grad_loss, logits, target, weight)) {
    return formulas::weight_gradient(grad_loss, logits, target, weight, options);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return op::weight_backward(grad_loss, logits, target, weight, max, sum, options);
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

Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  const Options options{reduction, ignore_index, label_smoothing, full_precision};
  if (at::isFloatingType(target.scalar_type()) && at::isFloatingType(logits.scalar_type()) &&
      is_probabilities(logits, target)) {
    ScalarType promoted = c10::promoteTypes(logits.scalar_type(), target.scalar_type());
    if (weight && weight->defined()) {
      promoted = c10::promoteTypes(promoted, weight->scalar_type());
    }
    if (promoted != logits.scalar_type() || promoted != target.scalar_type()) {
      return op::loss(logits.to(promoted), target.to(promoted), weight, options);
    }
  }
  return op::loss(logits, target, weight, options);
}

Tensor cross_entropy_(Tensor logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                      c10::SymInt ignore_index, double label_smoothing, bool full_precision) {
  static const auto call = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("cross_entropy::cross_entropy_", "")
                               .typed<decltype(loss_autograd_)>();
  return call.call(logits, target, weight, reduction, ignore_index, label_smoothing, full_precision);
}

std::tuple<Tensor, Tensor, Tensor> row_stats(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                             c10::SymInt ignore_index, double label_smoothing) {
  const auto [loss, max, sum, lse] = op::forward(
      logits, target, weight, {at::Reduction::None, ignore_index, label_smoothing, /*full_precision=*/true});
  return {max, lse, loss};
}

TORCH_LIBRARY_IMPL(cross_entropy, Autograd, m) {
  m.impl("loss", &loss_autograd);
  m.impl("forward", &forward_autograd);
  m.impl("forward_grad", &forward_grad_autograd);
  m.impl("backward", &backward_autograd);
  m.impl("target_backward", &target_backward_autograd);
  m.impl("weight_backward", &weight_backward_autograd);
  m.impl("scale_", &scale__autograd);
  m.impl("cross_entropy_", &loss_autograd_);
}

// Where there is no autograd: of tensors made in inference mode.
TORCH_LIBRARY_IMPL(cross_entropy, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy_", &loss_not_replaced);
}

}  // namespace ce
