// The registered operators, each as a C++ function that calls it through torch's dispatcher.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

namespace ce {

using OptionalTensor = std::optional<at::Tensor>;
inline const OptionalTensor kNoTensor;

// What a loss is whose target is a teacher's logits; row_divergence.h has the formulas.
enum Divergence : int64_t { kNoDivergence, kCrossEntropy, kKullbackLeibler };

// `reduction` is at::Reduction's number; the loss has the dtype of the logits, with `full_precision` that of the
// accumulator: float32 for half types. The formulas are in row_loss.h.
struct Options {
  int64_t reduction;
  c10::SymInt ignore_index = -100;
  double label_smoothing = 0;
  bool full_precision = false;
  double z_loss = 0;
  std::optional<double> softcap = std::nullopt;
  double logit_scale = 1;
  std::optional<double> divisor = std::nullopt;             // of the mean, instead of its own
  std::optional<c10::SymInt> valid_classes = std::nullopt;  // the logits' first ones; the others are padding
  bool zero_if_empty = false;                               // the mean of nothing, instead of NaN
  int64_t divergence = kNoDivergence;                       // of a teacher's logits, which are the target, or
  bool reverse = false;                                     // reversed
  double teacher_scale = 1;                                 // of the teacher's logits
  int64_t first_class = 0;                                  // of `all_classes`, of which the logits are a shard:
  std::optional<int64_t> all_classes = std::nullopt;        // targets name any of them, the smoothing is over all
  bool spreads = false;                                     // the rest of the picks' probabilities

  // Of each row by itself, in full precision: without what a reduction does.
  Options of_rows() const {
    Options options = *this;
    options.reduction = at::Reduction::None;
    options.full_precision = true;
    options.divisor.reset();
    options.zero_if_empty = false;
    return options;
  }
};

// What every operator takes. It refers to the tensors of the call that it belongs to.
struct Inputs {
  const at::Tensor& logits;
  const at::Tensor& target;
  const OptionalTensor& weight;
  Options options;
  const OptionalTensor& row_weight = kNoTensor;   // (rows)
  const OptionalTensor& logit_scale = kNoTensor;  // (), a further factor
  const OptionalTensor& divisor = kNoTensor;      // (), a further factor
  const OptionalTensor& picked = kNoTensor;       // (rows, picks) probabilities of the classes that the target names

  Inputs with(Options other) const {
    return {logits, target, weight, std::move(other), row_weight, logit_scale, divisor, picked};
  }
  Inputs of(const at::Tensor& other_logits) const {
    return {other_logits, target, weight, options, row_weight, logit_scale, divisor, picked};
  }
  // Of each row's loss, before its weight.
  Inputs of_rows() const {
    return {logits, target, weight, options.of_rows(), kNoTensor, logit_scale, kNoTensor, picked};
  }
  // Whether the call asks for nothing that torch's own loss does not have.
  bool is_plain() const {
    const Options& o = options;
    return o.z_loss == 0 && !o.softcap && o.logit_scale == 1 && !o.divisor && !o.valid_classes && !o.zero_if_empty &&
           !row_weight && !logit_scale && !divisor && !has_teacher() && !is_shard() && !picked;
  }
  bool is_shard() const { return options.all_classes.has_value(); }
  bool has_teacher() const { return options.divergence != kNoDivergence && !picked; }
  bool divides_by_given() const { return options.divisor || divisor; }
};

// What the backward operators take besides: the upstream gradients, and of each row max z and Σ exp(z − max z).
struct BackwardInputs {
  const at::Tensor& grad_loss;
  const OptionalTensor& grad_lse;
  const at::Tensor& max;
  const at::Tensor& sum;
  const OptionalTensor& grad_log_prob = kNoTensor;
  const OptionalTensor& grad_entropy = kNoTensor;
  const OptionalTensor& entropy = kNoTensor;  // with grad_entropy
  // With a teacher: the same of its logits, and M of row_divergence.h.
  const OptionalTensor& teacher_max = kNoTensor;
  const OptionalTensor& teacher_sum = kNoTensor;
  const OptionalTensor& mean = kNoTensor;
  const OptionalTensor& coefficients = kNoTensor;  // Σ a_c of each row, where the logits are a shard
};

// What stats() gives besides what the loss needs, as a set of bits.
enum Outputs : int64_t { kLogProb = 1, kEntropy = 2, kArgmax = 4, kRank = 8 };

// (loss, max, sum, lse, log_prob, entropy, argmax, rank) of each row, in the accumulator's dtype, the last two int64;
// without elements where it was not asked for.
using Stats =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What the forward pass leaves of each row and its teacher's for the backward pass: (loss, max, sum, teacher_max,
// teacher_sum, mean), the last five in the accumulator's dtype.
using Diverged = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Loss with autograd, as torch.nn.functional.cross_entropy; operands of different dtypes are promoted.
at::Tensor cross_entropy(const Inputs&);
// The same whose gradient replaces the logits.
at::Tensor cross_entropy_(const Inputs&);
// Raises where autograd or their memory forbids to replace these logits, whose gradient is needed.
void check_overwritable(const at::Tensor& logits);
// Each row's (maximum, logsumexp, loss) with autograd through the last two.
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_stats(const at::Tensor& logits, const at::Tensor& target,
                                                         const OptionalTensor& weight, c10::SymInt ignore_index,
                                                         double label_smoothing);

namespace op {

// The differentiable loss of operands of one dtype; the others are its steps below autograd.
at::Tensor loss(const Inputs&);
// (loss, max, sum, lse), the last three per row in the accumulator's dtype: max z, Σ exp(z − max z), ln Σ exp(z).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const Inputs&);
// Without a reduction, with those of the outputs that are asked for.
Stats stats(int64_t outputs, const Inputs&);
// Of a teacher.
Diverged diverge(const Inputs&);
// (loss, its gradient with respect to the logits); for a reduction.
std::tuple<at::Tensor, at::Tensor> forward_grad(const Inputs&);
// The same with the gradient written over the logits.
at::Tensor forward_grad_(const Inputs&);
// The gradient of the logits.
at::Tensor backward(const BackwardInputs&, const Inputs&);
// The same written over the logits.
void backward_(const BackwardInputs&, const Inputs&);
// The gradients of probability targets or a teacher's logits, and of the class weights under probabilities.
at::Tensor target_backward(const BackwardInputs&, const Inputs&);
at::Tensor weight_backward(const BackwardInputs&, const Inputs&);
// The gradient of the tensor among the logits' scales.
at::Tensor logit_scale_backward(const BackwardInputs&, const Inputs&);
// grad *= factor, a no-op where the factor is 1.
void scale_(at::Tensor grad, const at::Tensor& factor);

}  // namespace op
}  // namespace ce
