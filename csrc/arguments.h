// The operators' arguments: in their schemas, as parameters of the functions that torch's dispatcher calls, and in the
// structs that this project's functions take. Here an option is added to all operators.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

#include "ops.h"

namespace ce {

#define CE_INPUTS_BESIDES_LOGITS                                                                  \
  "Tensor target, Tensor? weight, int reduction, SymInt ignore_index, float label_smoothing, "    \
  "bool full_precision=False, *, Tensor? row_weight=None, Tensor? logit_scale_tensor=None, "      \
  "Tensor? divisor_tensor=None, float z_loss=0.0, float? softcap=None, float logit_scale=1.0, "   \
  "float? divisor=None, SymInt? valid_classes=None, bool zero_if_empty=False, int divergence=0, " \
  "bool reverse=False, float teacher_scale=1.0, int first_class=0, int? all_classes=None, "       \
  "Tensor? picked=None, bool spreads=False"
#define CE_INPUTS "Tensor logits, " CE_INPUTS_BESIDES_LOGITS
#define CE_INPUTS_TO_WRITE_TO "Tensor(a!) logits, " CE_INPUTS_BESIDES_LOGITS
#define CE_BACKWARD_INPUTS                                                                          \
  "Tensor grad_loss, Tensor? grad_lse, Tensor max, Tensor sum, Tensor? grad_log_prob, "             \
  "Tensor? grad_entropy, Tensor? entropy, Tensor? teacher_max, Tensor? teacher_sum, Tensor? mean, " \
  "Tensor? coefficients, "

#define CE_INPUT_PARAMETERS                                                                                        \
  const at::Tensor &logits, const at::Tensor &target, const OptionalTensor &weight, int64_t reduction,             \
      c10::SymInt ignore_index, double label_smoothing, bool full_precision, const OptionalTensor &row_weight,     \
      const OptionalTensor &logit_scale_tensor, const OptionalTensor &divisor_tensor, double z_loss,               \
      std::optional<double> softcap, double logit_scale, std::optional<double> divisor,                            \
      std::optional<c10::SymInt> valid_classes, bool zero_if_empty, int64_t divergence, bool reverse,              \
      double teacher_scale, int64_t first_class, std::optional<int64_t> all_classes, const OptionalTensor &picked, \
      bool spreads
#define CE_INPUTS_FROM_PARAMETERS                              \
  Inputs {                                                     \
    logits, target, weight,                                    \
        Options{reduction,                                     \
                std::move(ignore_index),                       \
                label_smoothing,                               \
                full_precision,                                \
                z_loss,                                        \
                softcap,                                       \
                logit_scale,                                   \
                divisor,                                       \
                std::move(valid_classes),                      \
                zero_if_empty,                                 \
                divergence,                                    \
                reverse,                                       \
                teacher_scale,                                 \
                first_class,                                   \
                all_classes,                                   \
                spreads},                                      \
        row_weight, logit_scale_tensor, divisor_tensor, picked \
  }
#define CE_ARGUMENTS_OF(in)                                                                                        \
  in.logits, in.target, in.weight, in.options.reduction, in.options.ignore_index, in.options.label_smoothing,      \
      in.options.full_precision, in.row_weight, in.logit_scale, in.divisor, in.options.z_loss, in.options.softcap, \
      in.options.logit_scale, in.options.divisor, in.options.valid_classes, in.options.zero_if_empty,              \
      in.options.divergence, in.options.reverse, in.options.teacher_scale, in.options.first_class,                 \
      in.options.all_classes, in.picked, in.options.spreads

#define CE_BACKWARD_PARAMETERS                                                                                \
  const at::Tensor &grad_loss, const OptionalTensor &grad_lse, const at::Tensor &max, const at::Tensor &sum,  \
      const OptionalTensor &grad_log_prob, const OptionalTensor &grad_entropy, const OptionalTensor &entropy, \
      const OptionalTensor &teacher_max, const OptionalTensor &teacher_sum, const OptionalTensor &mean,       \
      const OptionalTensor &coefficients

// What the dispatcher calls for a kernel of Inputs, and of others before them.
template <auto kKernel>
auto unpacked(CE_INPUT_PARAMETERS) {
  return kKernel(CE_INPUTS_FROM_PARAMETERS);
}
template <auto kKernel>
auto unpacked_backward(CE_BACKWARD_PARAMETERS, CE_INPUT_PARAMETERS) {
  return kKernel(BackwardInputs{grad_loss, grad_lse, max, sum, grad_log_prob, grad_entropy, entropy, teacher_max,
                                teacher_sum, mean, coefficients},
                 CE_INPUTS_FROM_PARAMETERS);
}
template <typename First, auto kKernel>
auto unpacked_after(First first, CE_INPUT_PARAMETERS) {
  return kKernel(first, CE_INPUTS_FROM_PARAMETERS);
}

// An operator of them, as a function.
template <typename Result>
class Operator {
 public:
  explicit Operator(const char* name)
      : call_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>()) {}
  Result operator()(const Inputs& in) const { return call_.call(CE_ARGUMENTS_OF(in)); }

 private:
  using Signature = Result(CE_INPUT_PARAMETERS);
  c10::TypedOperatorHandle<Signature> call_;
};

template <typename Result>
class BackwardOperator {
 public:
  explicit BackwardOperator(const char* name)
      : call_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>()) {}
  Result operator()(const BackwardInputs& b, const Inputs& in) const {
    return call_.call(b.grad_loss, b.grad_lse, b.max, b.sum, b.grad_log_prob, b.grad_entropy, b.entropy, b.teacher_max,
                      b.teacher_sum, b.mean, b.coefficients, CE_ARGUMENTS_OF(in));
  }

 private:
  using Signature = Result(CE_BACKWARD_PARAMETERS, CE_INPUT_PARAMETERS);
  c10::TypedOperatorHandle<Signature> call_;
};

class StatsOperator {
 public:
  explicit StatsOperator(const char* name)
      : call_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>()) {}
  Stats operator()(int64_t outputs, const Inputs& in) const { return call_.call(outputs, CE_ARGUMENTS_OF(in)); }

 private:
  using Signature = Stats(int64_t outputs, CE_INPUT_PARAMETERS);
  c10::TypedOperatorHandle<Signature> call_;
};

}  // namespace ce
