#include "../backends.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <memory>

#include "../operands.h"
#include "../problem.h"
#include "large_memory.h"

namespace ce {

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

}  // namespace ce
