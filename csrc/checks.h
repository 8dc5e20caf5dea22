// What a call must satisfy before anything is computed, with torch's exception classes and wording.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops.h"

namespace ce {

// Torch's rule: a target of the logits' shape holds class probabilities, any other one class indices.
inline bool is_probabilities(const at::Tensor& logits, const at::Tensor& target) {
  return logits.sym_sizes() == target.sym_sizes();
}
inline bool is_probabilities(const Inputs& in) {
  return !in.picked && is_probabilities(in.logits, in.target);
}
// Whether the target is a class index of each row.
inline bool is_index(const Inputs& in) {
  return !in.picked && !is_probabilities(in.logits, in.target);
}

// The dimension of the classes.
inline int64_t class_dim(const at::Tensor& logits) {
  return logits.dim() == 1 ? 0 : 1;
}

// Shapes, dtypes, devices and options; reads no element.
void check(const Inputs&);

}  // namespace ce
