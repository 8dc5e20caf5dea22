// Autocast runs the loss in float32, as torch does. The kernels read half types and compute in float32 anyway, so that
// asking for a float32 loss gives the same result without a copy of the logits.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace ce {
namespace {

using at::Tensor;

struct NoAutocast {
  explicit NoAutocast(c10::DeviceType device)
      : guard(at::autocast::get_autocast_dispatch_key_from_device_type(device)) {}
  c10::impl::ExcludeDispatchKeyGuard guard;
};

template <c10::DeviceType kDevice>
Tensor loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
            c10::SymInt ignore_index, double label_smoothing, bool) {
  const NoAutocast guard(kDevice);
  return op::loss(logits, target, weight, {reduction, ignore_index, label_smoothing, /*full_precision=*/true});
}

template <c10::DeviceType kDevice>
Tensor inplace_loss(Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                    c10::SymInt ignore_index, double label_smoothing, bool) {
  const NoAutocast guard(kDevice);
  return cross_entropy_(logits, target, weight, reduction, ignore_index, label_smoothing, /*full_precision=*/true);
}

template <c10::DeviceType kDevice>
void add_to(torch::Library& m) {
  m.impl("loss", &loss<kDevice>);
  m.impl("cross_entropy_", &inplace_loss<kDevice>);
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy, AutocastCPU, m) {
  add_to<c10::kCPU>(m);
}
TORCH_LIBRARY_IMPL(cross_entropy, AutocastCUDA, m) {
  add_to<c10::kCUDA>(m);
}

}  // namespace ce
