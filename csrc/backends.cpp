#include "backends.h"

#include <ATen/core/Reduction.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <memory>

#include "cpu/large_memory.h"
#include "operands.h"
#include "problem.h"

namespace ce {
namespace {

bool is_own_mean(const Inputs& in) {
  return in.options.reduction == at::Reduction::Mean && !in.divides_by_given();
}

// Whether it is the sum of weights, and not the number of rows, that a mean divides by.
bool divides_by_weight(const Problem& problem, const Inputs& in) {
  return is_own_mean(in) && (has_indices(problem) || problem.row_weight.data);
}

}  // namespace

NewGrad HostBackend::empty_grad(const at::Tensor& like) {
  if (like.nbytes() >= cpu::kLargeMemory && like.is_non_overlapping_and_dense()) {
    const cpu::LargeBlock block = cpu::allocate_large(like.nbytes());
    if (block.data) {
      return {at::for_blob(block.data, like.sizes())
                  .strides(like.strides())
                  .deleter([block](void*) { cpu::free_large(block); })
                  .options(like.options())
                  .allocator(c10::GetAllocator(c10::kCPU))
                  .resizeable_storage()
                  .make_tensor(),
              block.is_reused};
    }
  }
  return {at::empty_like(like)};
}

void HostBackend::prepare(Problem& problem, const Inputs& in) {
  const bool by_weight = divides_by_weight(problem, in);
  if (has_indices(problem) || problem.picks > 0 || by_weight) {
    const TargetSummary summary = cpu::summarize_targets(problem);
    TORCH_CHECK_INDEX(summary.bad_row < 0, "Target ", summary.bad_target, " is out of bounds.");
    if (by_weight) {
      problem.divisor.value = divisor_of_mean(summary.weight, problem);
    }
  }
  if (is_own_mean(in) && !by_weight) {
    problem.divisor.value = static_cast<double>(problem.rows);
  }
}

void HostBackend::forward(Problem& problem) {
  cpu::forward(problem);
}

at::Tensor HostBackend::forward_total(Problem& problem, const at::TensorOptions& total) {
  double total_double = 0;
  float total_float = 0;
  const bool is_double = problem.dtype == DType::kFloat64;
  problem.total = is_double ? static_cast<void*>(&total_double) : &total_float;
  constexpr int64_t kFew = 1 << 10;
  alignas(double) char few[kFew];
  const int64_t bytes = problem.rows * (is_double ? sizeof(double) : sizeof(float));
  const std::unique_ptr<char[]> many(bytes > kFew ? new char[bytes] : nullptr);
  problem.loss = many ? many.get() : few;
  cpu::forward(problem);
  return make_scalar(is_double ? total_double : total_float, total);
}

void HostBackend::backward(Problem& problem) {
  cpu::backward(problem);
}

void HostBackend::target_backward(Problem& problem) {
  cpu::target_backward(problem);
}

void HostBackend::weight_backward(Problem& problem) {
  cpu::weight_backward(problem);
}

void HostBackend::logit_scale_backward(Problem& problem) {
  cpu::logit_scale_backward(problem);
}

void HostBackend::merge_shards(const Shards& shards) {
  cpu::merge_shards(shards);
}

void HostBackend::scale(const at::Tensor& grad, const at::Tensor& factor) {
  const at::Tensor scalar = to_accumulator(factor, accumulator_of(grad.scalar_type()));
  cpu::scale(dtype_of(grad), grad.data_ptr(), grad.numel(), scalar.const_data_ptr());
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
