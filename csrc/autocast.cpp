// Autocast runs the loss in float32, as torch does. The kernels read half types and compute in float32 anyway, so that
// asking for a float32 loss gives the same result without a copy of the logits.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "arguments.h"

namespace ce {
namespace {

using at::Tensor;

struct NoAutocast {
  explicit NoAutocast(c10::DeviceType device)
      : guard(at::autocast::get_autocast_dispatch_key_from_device_type(device)) {}
  c10::impl::ExcludeDispatchKeyGuard guard;
};

Inputs in_full_precision(const Inputs& in) {
  Options options = in.options;
  options.full_precision = true;
  return in.with(options);
}

template <c10::DeviceType kDevice>
Tensor loss(const Inputs& in) {
  const NoAutocast guard(kDevice);
  return op::loss(in_full_precision(in));
}

template <c10::DeviceType kDevice>
Tensor inplace_loss(const Inputs& in) {
  const NoAutocast guard(kDevice);
  return cross_entropy_(in_full_precision(in));
}

template <c10::DeviceType kDevice>
void add_to(torch::Library& m) {
  m.impl("loss", &unpacked<&loss<kDevice>>);
  m.impl("cross_entropy_", &unpacked<&inplace_loss<kDevice>>);
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy, AutocastCPU, m) {
  add_to<c10::kCPU>(m);
}
TORCH_LIBRARY_IMPL(cross_entropy, AutocastCUDA, m) {
  add_to<c10::kCUDA>(m);
}

}  // namespace ce
