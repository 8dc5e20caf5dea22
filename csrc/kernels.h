// The contract between the operators and the kernels: raw pointers, sizes and strides in elements, nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

namespace ce {

constexpr int kMaxDims = 8;

enum class DType : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class TargetType : int8_t { kInt64, kInt32, kUInt8, kProbabilities, kTeacher };

// Divides by one number again and again: n / d as the upper half of a product, exact for n < 2^63.
struct Divider {
  uint64_t multiplier = 0;
  int shift = 0;

  Divider() = default;
  explicit Divider(uint64_t d) {  // d ≥ 2
    while (((d - 1) >> shift) > 1) {
      ++shift;
    }
    multiplier = static_cast<uint64_t>(((static_cast<unsigned __int128>(1) << (64 + shift)) / d) + 1);
  }
};

// An operand of shape (rows, classes) or (rows). The rows lie on a grid of up to kMaxDims dimensions.
template <typename Pointer>
struct Operand {
  Pointer data = nullptr;
  int64_t class_stride = 0;
  int64_t strides[kMaxDims] = {};
};
using Input = Operand<const void*>;
using Output = Operand<void*>;

// A number, times one that only the device knows where `data` (acc) is given.
struct Scalar {
  double value = 1;
  const void* data = nullptr;
};

// The first target out of bounds that kernels have met.
struct BadTarget {
  int64_t row = INT64_MAX;  // of the target's own shape, counted through
  int64_t target = 0;
  int lock = 0;
};

// One call. "acc" is the accumulator's type: float64 for float64 logits, float32 for all others. A null pointer
// stands for an option that was not given or a result that is not wanted.
struct Problem {
  DType dtype = DType::kFloat32;  // of logits, probabilities and their gradients
  TargetType target_type = TargetType::kInt64;
  int64_t rows = 0;
  int64_t classes = 0;
  int dims = 0;  // of the grid of rows, outermost first
  int64_t sizes[kMaxDims] = {};
  Divider dividers[kMaxDims];  // by the sizes of all dimensions but the first

  Input logits;                  // (rows, classes)
  Input target;                  // (rows) indices, or (rows, classes) probabilities or logits of a teacher
  int64_t picks = 0;             // > 0: `target` is (rows, picks) indices, with
  Input probabilities;           // (rows, picks), acc
  bool spreads = false;          // the rest of their mass over the other classes
  void* picked_rows = nullptr;   // (rows) PickedRow, and
  void* picked = nullptr;        // (rows, 2, picks), acc: memory for the kernels' own use, see picks.h
  int64_t first_class = 0;       // of all classes, whose indices targets are; the others are other shards' logits
  int64_t all_classes = 0;       // 0: there are no others
  const void* weight = nullptr;  // (classes), acc
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  double z_loss = 0;
  double softcap = 0;  // 0: none
  Scalar logit_scale;
  Input row_weight;                // (rows), acc; 1 where null. `loss` is without it, `total` and the gradients with it
  Scalar divisor;                  // what `total` and the gradients are divided by, unless
  bool divides_by_weight = false;  // CUDA: it is the sum of the kept rows' weights, which the kernels find
  bool zero_if_empty = false;      // a sum of weights of 0 makes them 0, not NaN
  double teacher_scale = 1;        // of a teacher's logits
  bool reverse = false;            // the divergence is of the teacher's softmax from the logits', or reverse
  double kappa = 1;                // of row_divergence.h; of picks 1: the divergence, 0: the cross-entropy

  int64_t row_strides[kMaxDims] = {};  // of loss, max, sum and lse
  void* loss = nullptr;                // (rows), acc
  void* max = nullptr;                 // (rows), acc: max z; an input of the backward kernels
  void* sum = nullptr;                 // (rows), acc: Σ exp(z − max z); an input of the backward kernels
  void* lse = nullptr;                 // (rows), acc: ln Σ exp(z), also of ignored rows
  void* log_prob = nullptr;            // (rows), acc: ln p of the target's index, 0 in ignored rows
  void* entropy = nullptr;             // (rows), acc: also of ignored rows; an input of backward() with `grad_entropy`
  int64_t* argmax = nullptr;           // (rows), also of ignored rows
  int64_t* rank = nullptr;             // (rows): classes before the target's; −1 in ignored rows
  void* teacher_max = nullptr;         // (rows), acc: as max, of a teacher's logits
  void* teacher_sum = nullptr;         // (rows), acc
  void* mean = nullptr;                // (rows), acc: M of row_divergence.h; all three are inputs of backward kernels
  void* linear = nullptr;              // (rows), acc: RowState::linear, for other shards to be merged with
  void* coefficients = nullptr;        // (rows), acc: Σ a_c; an input of backward(), which else finds it
  void* total = nullptr;               // (), Σ loss / divisor; needs `loss`
  DType total_type = DType::kFloat32;  // CPU: acc

  Input grad_loss;                         // (rows); 1 where null
  Input grad_lse;                          // (rows), acc; 0 where null, as of those that follow
  Input grad_log_prob;                     // (rows), acc
  Input grad_entropy;                      // (rows), acc
  DType grad_loss_type = DType::kFloat32;  // CPU: acc
  Output grad;                             // (rows, classes); the forward pass writes it too if it is given
  bool streams_grad = false;               // CPU: whether it may be stored past the caches

  void* workspace = nullptr;        // CUDA: memory of the device for the kernels' own use, see workspace_size()
  double* partial_sums = nullptr;   // CUDA: the same, see weight_backward_sums()
  BadTarget* bad_target = nullptr;  // CUDA: where kernels report a target that is out of bounds
};

// The rows of logits whose classes lie in shards, each of which has been a problem of its own.
struct Shards {
  bool is_double = false;  // acc
  int64_t rows = 0;
  int64_t shards = 0;
  double z_loss = 0;
  const void* states = nullptr;  // (shards, 4, rows), acc: max, sum, linear, coefficients
  void* loss = nullptr;          // (rows), acc, as all that follow: of all classes
  void* max = nullptr;
  void* sum = nullptr;
  void* coefficients = nullptr;
};

// What the targets tell before any logit is read.
struct TargetSummary {
  int64_t bad_row = -1;  // the first row whose target is out of bounds, or −1
  int64_t bad_target = 0;
  double weight = 0;  // Σ of the kept rows' class weights times their own: the divisor of the mean
};

namespace cpu {

TargetSummary summarize_targets(const Problem&);

// Each row's maximum, log-sum-exp and loss, and if `grad` is given the logits' gradient, in one read of the logits.
void forward(const Problem&);
// The logits' gradient from `max` and `sum`.
void backward(const Problem&);
// The gradient of the probabilities or of the teacher's logits, written to `grad`.
void target_backward(const Problem&);
// The gradient of the class weights under probability targets, (classes) of acc, written to `grad`.
void weight_backward(const Problem&);
// The gradient of the logits' scale, () of acc, written to `grad`.
void logit_scale_backward(const Problem&);
// The results of rows from those of their shards.
void merge_shards(const Shards&);
// Multiplies `count` dense elements of type `dtype` by *factor (acc); does nothing where it is 1.
void scale(DType dtype, void* data, int64_t count, const void* factor);

}  // namespace cpu

// The same on the current device, in the order of `stream` and without waiting for it. A row whose target is out of
// bounds gets NaN for its loss and gradient.
namespace cuda {

using Stream = void*;  // cudaStream_t

// Bytes of device memory that a call needs.
int64_t workspace_size(const Problem&);
// Partial sums that these need besides.
int64_t weight_backward_sums(const Problem&);
int64_t logit_scale_backward_sums();

void forward(const Problem&, Stream);
void backward(const Problem&, Stream);
void target_backward(const Problem&, Stream);
void weight_backward(const Problem&, Stream);
void logit_scale_backward(const Problem&, Stream);
void merge_shards(const Shards&, Stream);
void scale(DType dtype, void* data, int64_t count, const void* factor, DType factor_type, Stream);

// The record that kernels on `device` report to, in memory that the host reads too.
BadTarget* bad_target(int device);
// What it holds by now, and empties it; row INT64_MAX where there is nothing.
BadTarget take_bad_target(int device);
// The devices whose record has been asked for.
std::vector<int> reporting_devices();
// Waits for all work on the current device.
void synchronize();

}  // namespace cuda
}  // namespace ce
