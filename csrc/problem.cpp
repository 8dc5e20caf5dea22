#include "problem.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <numeric>

#include "checks.h"
#include "row_picks.h"

namespace ce {
namespace {

TargetType target_type_of(const at::Tensor& target) {
  switch (target.scalar_type()) {
    case at::kLong:
      return TargetType::kInt64;
    case at::kInt:
      return TargetType::kInt32;
    case at::kByte:
      return TargetType::kUInt8;
    default:
      return TargetType::kProbabilities;
  }
}

c10::DimVector without(at::IntArrayRef values, int64_t dim) {
  c10::DimVector rest(values.begin(), values.end());
  rest.erase(rest.begin() + dim);
  return rest;
}

}  // namespace

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

at::Tensor make_scalar(double value, const at::TensorOptions& options) {
  at::Tensor scalar = at::empty({}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, scalar.scalar_type(), "cross_entropy",
                                  [&] { *scalar.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(value); });
  return scalar;
}

at::Tensor to_accumulator(const at::Tensor& tensor, at::ScalarType accumulator) {
  if (tensor.dim() > 0 || tensor.scalar_type() == accumulator) {
    return tensor.to(accumulator);
  }
  double value = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "cross_entropy",
                                  [&] { value = *tensor.const_data_ptr<scalar_t>(); });
  return make_scalar(value, tensor.options().dtype(accumulator));
}

ProblemBuilder::ProblemBuilder(const Inputs& in)
    : logits_(in.logits),
      target_(in.target),
      class_dim_(class_dim(in.logits)),
      row_sizes_(without(in.logits.sizes(), class_dim_)) {
  const Options& options = in.options;
  problem_.dtype = dtype_of(logits_);
  problem_.target_type = in.has_teacher() ? TargetType::kTeacher : target_type_of(target_);
  problem_.picks = in.picked ? target_.size(class_dim_) : 0;
  problem_.spreads = options.spreads;
  problem_.first_class = options.first_class;
  problem_.all_classes = options.all_classes.value_or(0);
  problem_.reverse = options.reverse;
  problem_.kappa = options.divergence == kKullbackLeibler ? 1 : 0;
  problem_.teacher_scale = options.teacher_scale;
  problem_.classes =
      options.valid_classes ? options.valid_classes->guard_int(__FILE__, __LINE__) : logits_.size(class_dim_);
  problem_.rows = c10::multiply_integers(row_sizes_);
  if (has_indices(problem_)) {  // other targets have no class to be ignored, which picks could be taken for
    problem_.ignore_index = options.ignore_index.guard_int(__FILE__, __LINE__);
  }
  problem_.label_smoothing = options.label_smoothing;
  problem_.z_loss = options.z_loss;
  problem_.softcap = options.softcap.value_or(0);
  problem_.zero_if_empty = options.zero_if_empty;
  if (in.weight && in.weight->defined()) {
    kept_.push_back(in.weight->detach().to(accumulator()).contiguous());
    problem_.weight = kept_.back().const_data_ptr();
  }
  problem_.logit_scale = scalar_of(options.logit_scale, in.logit_scale);
  if (in.divides_by_given()) {
    problem_.divisor = scalar_of(options.divisor.value_or(1), in.divisor);
    TORCH_CHECK_VALUE(problem_.divisor.value > 0,
                      "cross_entropy: divisor must be positive. Got: ", problem_.divisor.value);
  }

  problem_.logits.data = logits_.const_data_ptr();
  problem_.logits.class_stride = logits_.stride(class_dim_);
  add_operand(problem_.logits.strides, logits_, /*has_classes=*/true);
  problem_.target.data = target_.const_data_ptr();
  const bool has_classes = !has_indices(problem_);
  if (has_classes) {
    problem_.target.class_stride = target_.stride(class_dim_);
  }
  add_operand(problem_.target.strides, target_, has_classes);
  if (in.picked) {
    kept_.push_back(in.picked->detach().to(accumulator()));
    problem_.probabilities.data = kept_.back().const_data_ptr();
    problem_.probabilities.class_stride = kept_.back().stride(class_dim_);
    add_operand(problem_.probabilities.strides, kept_.back(), /*has_classes=*/true);
    const auto bytes = logits_.options().dtype(at::kByte);
    kept_.push_back(at::empty({problem_.rows * static_cast<int64_t>(sizeof(PickedRow<double>))}, bytes));
    problem_.picked_rows = kept_.back().data_ptr();
    kept_.push_back(at::empty({2 * problem_.rows * problem_.picks}, logits_.options().dtype(accumulator())));
    problem_.picked = kept_.back().data_ptr();
  }
  if (in.row_weight) {
    add_rows(&Problem::row_weight, in.row_weight->detach().to(accumulator()));
  }
}

// A tensor of the CPU is read here, any other by the kernels.
Scalar ProblemBuilder::scalar_of(double factor, const OptionalTensor& tensor) {
  Scalar scalar{factor};
  if (!tensor) {
    return scalar;
  }
  const at::Tensor value = tensor->detach().to(accumulator());
#ifdef CE_EMULATE
  const bool is_read_here = false;
#else
  const bool is_read_here = value.is_cpu();
#endif
  if (is_read_here) {
    scalar.value *= value.item<double>();
  } else {
    kept_.push_back(value);
    scalar.data = value.const_data_ptr();
  }
  return scalar;
}

void ProblemBuilder::add_operand(int64_t* strides, const at::Tensor& tensor, bool has_classes) {
  if (has_classes) {
    operands_.push_back({strides, without(tensor.strides(), class_dim_)});
  } else if (tensor.numel() == problem_.rows && tensor.dim() == static_cast<int64_t>(row_sizes_.size())) {
    operands_.push_back({strides, c10::DimVector(tensor.strides().begin(), tensor.strides().end())});
  } else {  // one element for all rows
    operands_.push_back({strides, c10::DimVector(row_sizes_.size(), 0)});
  }
}

at::Tensor ProblemBuilder::add_row_result(void* Problem::* result) {
  at::Tensor rows = at::empty(row_sizes_, logits_.options().dtype(accumulator()));
  problem_.*result = rows.data_ptr();
  kept_.push_back(rows);
  return rows;
}

at::Tensor ProblemBuilder::add_row_result(int64_t* Problem::* result) {
  at::Tensor rows = at::empty(row_sizes_, logits_.options().dtype(at::kLong));
  problem_.*result = rows.data_ptr<int64_t>();
  kept_.push_back(rows);
  return rows;
}

void ProblemBuilder::add_row_input(void* Problem::* input, const at::Tensor& rows) {
  kept_.push_back(rows.contiguous());
  problem_.*input = kept_.back().data_ptr();
}

void ProblemBuilder::add_rows(Input Problem::* input, const at::Tensor& rows) {
  kept_.push_back(rows);
  (problem_.*input).data = rows.const_data_ptr();
  add_operand((problem_.*input).strides, rows, /*has_classes=*/false);
}

void ProblemBuilder::add_grad_loss(const at::Tensor& grad) {
  // The CUDA kernels read any type, which saves a kernel that converts it.
  const at::Tensor upstream = grad.is_cuda() ? grad : to_accumulator(grad, accumulator());
  problem_.grad_loss_type = dtype_of(upstream);
  add_rows(&Problem::grad_loss, upstream);
}

void ProblemBuilder::add_row_upstream(Input Problem::* input, const OptionalTensor& grad) {
  if (grad && grad->defined()) {
    add_rows(input, grad->to(accumulator()));
  }
}

void ProblemBuilder::add_grad(const at::Tensor& grad, bool streams) {
  problem_.streams_grad = streams;
  problem_.grad.data = grad.data_ptr();
  problem_.grad.class_stride = grad.stride(class_dim_);
  add_operand(problem_.grad.strides, grad, /*has_classes=*/true);
}

Problem& ProblemBuilder::problem() {
  operands_.push_back({problem_.row_strides, {}});
  auto& contiguous = operands_.back().rows;
  contiguous.resize(row_sizes_.size(), 1);
  for (size_t d = row_sizes_.size(); d-- > 1;) {
    contiguous[d - 1] = contiguous[d] * row_sizes_[d];
  }

  // The dimensions in the order of the logits' memory, so that neighbouring rows are neighbours on the grid.
  c10::SmallVector<size_t, 6> order(row_sizes_.size());
  std::iota(order.begin(), order.end(), 0);
  const auto& by = operands_.front().rows;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return by[a] > by[b]; });

  int dims = 0;
  for (const size_t d : order) {
    if (row_sizes_[d] == 1) {
      continue;
    }
    // A dimension that continues the one before it in every operand is merged into it.
    const bool continues = dims > 0 && std::all_of(operands_.begin(), operands_.end(), [&](const Operand& operand) {
                             return operand.strides[dims - 1] == operand.rows[d] * row_sizes_[d];
                           });
    if (!continues) {
      TORCH_CHECK(dims < kMaxDims, "cross_entropy: rows of more than ", kMaxDims,
                  " dimensions that do not follow each other in memory; call .contiguous() first");
      problem_.sizes[dims++] = 1;
    }
    problem_.sizes[dims - 1] *= row_sizes_[d];
    for (const Operand& operand : operands_) {
      operand.strides[dims - 1] = operand.rows[d];
    }
  }
  if (dims == 0) {
    problem_.sizes[dims++] = 1;
  }
  for (int d = 1; d < dims && problem_.rows > 0; ++d) {
    problem_.dividers[d] = Divider(problem_.sizes[d]);
  }
  problem_.dims = dims;
  return problem_;
}

}  // namespace ce
