#include "backends.h"

#include <ATen/core/Reduction.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "operands.h"
#include "problem.h"

namespace ce {

bool is_own_mean(const Inputs& in) {
  return in.options.reduction == at::Reduction::Mean && !in.divides_by_given();
}

bool divides_by_weight(const Problem& problem, const Inputs& in) {
  return is_own_mean(in) && (has_indices(problem) || problem.row_weight.data);
}

#ifdef CE_CUDA
namespace {

void raise(const BadTarget& bad, c10::DeviceIndex device) {
  TORCH_CHECK_INDEX(bad.row == INT64_MAX, "Target ", bad.target, " is out of bounds. It belongs to row ", bad.row,
                    " of a call of cross_entropy on cuda:", static_cast<int>(device),
                    " that has run before; the loss of that row is NaN.");
}

// Tensors of the emulated device have no index.
c10::DeviceIndex index_of(c10::Device device) {
  return device.has_index() ? device.index() : c10::DeviceIndex(0);
}

}  // namespace

DeviceBackend::DeviceBackend(const at::Tensor& logits)
    : options_(logits.options())
#ifndef CE_EMULATE
      ,
      guard_(logits.device()),
      stream_(c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(logits.device()).native_handle())
#endif
{
  const c10::DeviceIndex device = index_of(logits.device());
  raise(cuda::take_bad_target(device), device);
}

NewGrad DeviceBackend::empty_grad(const at::Tensor& like) {
  return {at::empty_like(like)};
}

void DeviceBackend::prepare(Problem& problem, const Inputs& in) {
  problem.divides_by_weight = divides_by_weight(problem, in);
  if (is_own_mean(in)) {
    problem.divisor.value = static_cast<double>(problem.rows);
  }
  problem.bad_target = cuda::bad_target(index_of(options_.device()));
  workspace_ = at::empty({cuda::workspace_size(problem)}, options_.dtype(at::kByte));
  problem.workspace = workspace_.data_ptr();
}

void DeviceBackend::forward(Problem& problem) {
  cuda::forward(problem, stream_);
}

at::Tensor DeviceBackend::forward_total(Problem& problem, const at::TensorOptions& options) {
  at::Tensor total = at::empty({}, options);
  const at::Tensor loss =
      at::empty({problem.rows}, options.dtype(accumulator_of(c10::typeMetaToScalarType(options_.dtype()))));
  problem.loss = loss.data_ptr();
  problem.total = total.data_ptr();
  problem.total_type = dtype_of(total);
  cuda::forward(problem, stream_);
  return total;
}

void DeviceBackend::backward(Problem& problem) {
  cuda::backward(problem, stream_);
}

void DeviceBackend::target_backward(Problem& problem) {
  cuda::target_backward(problem, stream_);
}

void DeviceBackend::weight_backward(Problem& problem) {
  const at::Tensor sums = at::empty({cuda::weight_backward_sums(problem)}, options_.dtype(at::kDouble));
  problem.partial_sums = sums.data_ptr<double>();
  cuda::weight_backward(problem, stream_);
}

void DeviceBackend::logit_scale_backward(Problem& problem) {
  const at::Tensor sums = at::empty({cuda::logit_scale_backward_sums()}, options_.dtype(at::kDouble));
  problem.partial_sums = sums.data_ptr<double>();
  cuda::logit_scale_backward(problem, stream_);
}

void DeviceBackend::merge_shards(const Shards& shards) {
  if (shards.rows > 0) {
    cuda::merge_shards(shards, stream_);
  }
}

void DeviceBackend::scale(const at::Tensor& grad, const at::Tensor& factor) {
  if (grad.numel() > 0) {
    cuda::scale(dtype_of(grad), grad.data_ptr(), grad.numel(), factor.const_data_ptr(), dtype_of(factor), stream_);
  }
}

void check_errors() {
  for (const int device : cuda::reporting_devices()) {
#ifndef CE_EMULATE
    const c10::DeviceGuard guard(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
#endif
    cuda::synchronize();
    raise(cuda::take_bad_target(device), static_cast<c10::DeviceIndex>(device));
  }
}

#else

DeviceBackend::DeviceBackend(const at::Tensor& logits) : HostBackend(logits) {
  TORCH_CHECK(false,
              "cross_entropy was built without its CUDA kernels; build it where nvcc is found. "
              "cross_entropy.build_info() tells what was built");
}

void check_errors() {}

#endif

}  // namespace ce
