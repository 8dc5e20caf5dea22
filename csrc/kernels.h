// The contract between the operators and the kernels: raw pointers, sizes and strides in elements, nothing of torch.
#pragma once

#include <cstdint>

namespace ce {

constexpr int kMaxDims = 8;

enum class DType : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class TargetType : int8_t { kInt64, kInt32, kUInt8, kProbabilities };

// An operand of shape (rows, classes) or (rows). The rows lie on a grid of up to kMaxDims dimensions.
template <typename Pointer>
struct Operand {
  Pointer data = nullptr;
  int64_t class_stride = 0;
  int64_t strides[kMaxDims] = {};
};
using Input = Operand<const void*>;
using Output = Operand<void*>;

// One call. "acc" is the accumulator's type: float64 for float64 logits, float32 for all others. A null pointer
// stands for an option that was not given or a result that is not wanted.
struct Problem {
  DType dtype = DType::kFloat32;  // of logits, probabilities and their gradients
  TargetType target_type = TargetType::kInt64;
  int64_t rows = 0;
  int64_t classes = 0;
  int dims = 0;  // of the grid of rows, outermost first
  int64_t sizes[kMaxDims] = {};

  Input logits;                  // (rows, classes)
  Input target;                  // (rows) indices, or (rows, classes) probabilities
  const void* weight = nullptr;  // (classes), acc
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  const void* divisor = nullptr;  // (), acc: what `total` and the gradients are divided by

  int64_t row_strides[kMaxDims] = {};  // of loss, max, sum and lse
  void* loss = nullptr;                // (rows), acc
  void* max = nullptr;                 // (rows), acc: max z; an input of the backward kernels
  void* sum = nullptr;                 // (rows), acc: Σ exp(z − max z); an input of the backward kernels
  void* lse = nullptr;                 // (rows), acc: ln Σ exp(z), also of ignored rows
  void* total = nullptr;               // (), acc: Σ loss / divisor; needs `loss`

  Input grad_loss;            // (rows), acc; 1 where null
  Input grad_lse;             // (rows), acc; 0 where null
  Output grad;                // (rows, classes); the forward pass writes it too if it is given
  bool streams_grad = false;  // whether it may be stored past the caches
};

// What the targets tell before any logit is read.
struct TargetSummary {
  int64_t bad_row = -1;  // the first row whose target is out of bounds, or −1
  int64_t bad_target = 0;
  double weight = 0;  // Σ of the kept rows' class weights: the divisor of the mean
};

namespace cpu {

TargetSummary summarize_targets(const Problem&);

// Each row's maximum, log-sum-exp and loss, and if `grad` is given the logits' gradient, in one read of the logits.
void forward(const Problem&);
// The logits' gradient from `max` and `sum`.
void backward(const Problem&);
// The gradient of the probabilities, written to `grad`.
void target_backward(const Problem&);
// The gradient of the class weights under probability targets, (classes) of acc, written to `grad`.
void weight_backward(const Problem&);
// Multiplies `count` dense elements of type `dtype` by *factor (acc); does nothing where it is 1.
void scale(DType dtype, void* data, int64_t count, const void* factor);

}  // namespace cpu
}  // namespace ce
