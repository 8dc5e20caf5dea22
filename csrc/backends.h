// What the operators ask of a device: memory, the reduction's divisor, the kernels. One object lives for one call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "kernels.h"
#include "ops.h"

namespace ce {

// A gradient to be written. Stores into memory whose pages have been touched before need not go through the caches.
struct NewGrad {
  at::Tensor tensor;
  bool streams = false;
};

// Whether the reduction is a mean whose divisor is not given.
bool is_own_mean(const Inputs& in);
// Whether it is the sum of weights, and not the number of rows, that such a mean divides by.
bool divides_by_weight(const Problem& problem, const Inputs& in);

class HostBackend {
 public:
  explicit HostBackend(const at::Tensor&) {}

  NewGrad empty_grad(const at::Tensor& like);

  // Validates the targets and sets what the reduction divides by.
  void prepare(Problem&, const Inputs&);
  void forward(Problem&);
  // The same with the total, which it returns.
  at::Tensor forward_total(Problem&, const at::TensorOptions& total);
  void backward(Problem&);
  void target_backward(Problem&);
  void weight_backward(Problem&);
  void logit_scale_backward(Problem&);
  void merge_shards(const Shards&);
  void scale(const at::Tensor& grad, const at::Tensor& factor);
};

#ifdef CE_CUDA

// Targets are validated by the kernels: what they have found out of bounds is raised by the next call, as is documented
// at cross_entropy.check_errors.
class DeviceBackend {
 public:
  explicit DeviceBackend(const at::Tensor& logits);

  NewGrad empty_grad(const at::Tensor& like);

  void prepare(Problem&, const Inputs&);
  void forward(Problem&);
  at::Tensor forward_total(Problem&, const at::TensorOptions& total);
  void backward(Problem&);
  void target_backward(Problem&);
  void weight_backward(Problem&);
  void logit_scale_backward(Problem&);
  void merge_shards(const Shards&);
  void scale(const at::Tensor& grad, const at::Tensor& factor);

 private:
  at::TensorOptions options_;
  at::Tensor workspace_;
#ifndef CE_EMULATE
  c10::DeviceGuard guard_;
#endif
  cuda::Stream stream_ = nullptr;
};

#else

class DeviceBackend : public HostBackend {
 public:
  explicit DeviceBackend(const at::Tensor& logits);  // raises
};

#endif

// The emulator stands in for a device on tensors of the CPU.
#ifdef CE_EMULATE
using CpuBackend = DeviceBackend;
#else
using CpuBackend = HostBackend;
#endif
using CudaBackend = DeviceBackend;

// Waits for the devices and raises what kernels have reported on any of them.
void check_errors();

}  // namespace ce
