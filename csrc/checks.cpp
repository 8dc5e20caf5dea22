#include "checks.h"

#include <ATen/core/Reduction.h>
#include <c10/util/Exception.h>

#include "problem.h"

namespace ce {
namespace {

constexpr int64_t kMostPicks = 1 << 16;  // see picks.h

void check_weight(const Inputs& in, const char* who) {
  const at::Tensor& weight = *in.weight;
  const auto& classes = in.logits.sym_size(class_dim(in.logits));
  TORCH_CHECK(weight.dim() == 1 && (weight.sym_numel() == classes ||
                                    (in.options.valid_classes && weight.sym_numel() == *in.options.valid_classes)),
              who, "weight tensor should be defined either for all ", classes,
              " classes or no classes but got weight tensor of shape: ", weight.sym_sizes());
}

// What torch's loss does not have.
void check_options(const Inputs& in) {
  const auto& o = in.options;
  TORCH_CHECK_VALUE(o.z_loss >= 0, "cross_entropy: z_loss must not be negative. Got: ", o.z_loss);
  TORCH_CHECK_VALUE(!o.softcap || *o.softcap > 0, "cross_entropy: softcap must be positive. Got: ", *o.softcap);
  TORCH_CHECK_VALUE(!in.divides_by_given() || o.reduction == at::Reduction::Mean,
                    "cross_entropy: divisor is only for reduction='mean', where it takes the place of the mean's own");
  TORCH_CHECK_VALUE(!o.divisor || *o.divisor > 0, "cross_entropy: divisor must be positive. Got: ", *o.divisor);
  if (o.valid_classes) {
    const auto& classes = in.logits.sym_size(class_dim(in.logits));
    TORCH_CHECK_VALUE(*o.valid_classes > 0 && *o.valid_classes <= classes,
                      "cross_entropy: valid_classes must be between 1 and the logits' ", classes,
                      " classes. Got: ", *o.valid_classes);
  }
  const auto check_scalar = [&](const OptionalTensor& scalar, const char* name, bool is_floating) {
    if (scalar) {
      TORCH_CHECK_VALUE(scalar->dim() == 0 && !scalar->is_complex() && (!is_floating || scalar->is_floating_point()),
                        "cross_entropy: ", name, " must be a number or a ", is_floating ? "floating point " : "",
                        "tensor of shape (). Got: ", scalar->scalar_type(), " of shape ", scalar->sym_sizes());
      TORCH_CHECK(scalar->device() == in.logits.device() || scalar->device().is_cpu(), "cross_entropy: ", name,
                  " must be on the CPU or on ", in.logits.device(), ". Got: ", scalar->device());
    }
  };
  check_scalar(in.logit_scale, "logit_scale", true);
  check_scalar(in.divisor, "divisor", false);
  TORCH_CHECK(!in.divisor || !in.divisor->requires_grad(), "cross_entropy: divisor has no gradient");
  if (in.row_weight) {
    c10::SymDimVector rows(in.logits.sym_sizes().begin(), in.logits.sym_sizes().end());
    rows.erase(rows.begin() + class_dim(in.logits));
    const bool one_row = in.logits.dim() == 1 && in.row_weight->sym_numel() == 1 && in.row_weight->dim() == 1;
    TORCH_CHECK_VALUE(
        in.row_weight->is_floating_point() && (one_row || in.row_weight->sym_sizes() == c10::SymIntArrayRef(rows)),
        "cross_entropy: row_weight must be a floating point tensor of the rows' shape ", c10::SymIntArrayRef(rows),
        ". Got: ", in.row_weight->scalar_type(), " of shape ", in.row_weight->sym_sizes());
    TORCH_CHECK(in.row_weight->device() == in.logits.device(), "cross_entropy: row_weight must be on ",
                in.logits.device(), ". Got: ", in.row_weight->device());
  }
}

void check_shard(const Inputs& in) {
  const auto& o = in.options;
  const c10::SymInt own = o.valid_classes.value_or(in.logits.sym_size(class_dim(in.logits)));
  TORCH_CHECK_VALUE(o.first_class >= 0 && own + o.first_class <= *o.all_classes, "cross_entropy: ", own,
                    " classes from class ", o.first_class, " on are no shard of ", *o.all_classes);
  TORCH_CHECK_VALUE(o.reduction == at::Reduction::None, "cross_entropy: a shard of the classes has no reduction");
}

void check_teacher(const Inputs& in) {
  const auto& o = in.options;
  TORCH_CHECK_VALUE(o.divergence == kCrossEntropy || o.divergence == kKullbackLeibler, o.divergence,
                    " is not a valid value for divergence");
  TORCH_CHECK_VALUE(is_probabilities(in), "cross_entropy: the teacher's logits must have the shape of the logits, ",
                    in.logits.sym_sizes(), ". Got: ", in.target.sym_sizes());
  TORCH_CHECK_VALUE(!in.weight && o.label_smoothing == 0,
                    "cross_entropy: a divergence from a teacher has no class weights and no label smoothing");
}

void check_picks(const Inputs& in) {
  const auto dim = class_dim(in.logits);
  const auto& picked = *in.picked;
  const auto& type = in.target.scalar_type();
  TORCH_CHECK_VALUE(type == at::kLong || type == at::kInt,
                    "cross_entropy: the picked classes must be int64 or int32. Got: ", type);
  c10::SymDimVector rows(in.logits.sym_sizes().begin(), in.logits.sym_sizes().end());
  c10::SymDimVector rows_of_target(in.target.sym_sizes().begin(), in.target.sym_sizes().end());
  TORCH_CHECK_VALUE(
      in.target.dim() == in.logits.dim(),
      "cross_entropy: the picked classes must be of as many dimensions as the logits. Got: ", in.target.sym_sizes());
  const c10::SymInt classes = in.options.valid_classes.value_or(rows[dim]), picks = rows_of_target[dim];
  rows.erase(rows.begin() + dim);
  rows_of_target.erase(rows_of_target.begin() + dim);
  TORCH_CHECK_VALUE(rows == rows_of_target, "cross_entropy: the picked classes must be of the logits' rows, ",
                    c10::SymIntArrayRef(rows), ". Got: ", c10::SymIntArrayRef(rows_of_target));
  TORCH_CHECK_VALUE(picks >= 1 && picks <= classes && picks <= kMostPicks, "cross_entropy: of ", classes,
                    " classes a row can pick 1 to ", classes.min(kMostPicks), ". Got: ", picks);
  TORCH_CHECK_VALUE(picked.is_floating_point() && picked.sym_sizes() == in.target.sym_sizes(),
                    "cross_entropy: probabilities must be a floating point tensor of the picked classes' shape ",
                    in.target.sym_sizes(), ". Got: ", picked.scalar_type(), " of shape ", picked.sym_sizes());
  TORCH_CHECK(picked.device() == in.logits.device(), "cross_entropy: probabilities must be on ", in.logits.device(),
              ". Got: ", picked.device());
  TORCH_CHECK_NOT_IMPLEMENTED(!picked.requires_grad(), "cross_entropy: picked probabilities have no gradient");
  TORCH_CHECK_VALUE(!in.weight && in.options.label_smoothing == 0 && !in.is_shard(),
                    "cross_entropy: picked classes have no class weights, no label smoothing and no shards");
}

void check_index_shapes(const at::Tensor& logits, const at::Tensor& target) {
  const auto sizes = logits.sym_sizes();
  const auto dim = logits.dim();
  if (dim == 1) {
    TORCH_CHECK(target.dim() <= 1, "0D or 1D target tensor expected, multi-target not supported");
    TORCH_CHECK_VALUE(target.dim() == 0 || target.sym_size(0) == 1,
                      "For 1D input, 1D target must have size 1, but got target size: ", target.sym_size(0));
    return;
  }
  const c10::SymInt target_rows = target.dim() == 0 ? c10::SymInt(0) : target.sym_size(0);
  TORCH_CHECK_VALUE(target.dim() > 0 && sizes[0] == target_rows, "Expected input batch_size (", sizes[0],
                    ") to match target batch_size (", target_rows, ").");
  TORCH_CHECK(dim != 2 || target.dim() == 1, "0D or 1D target tensor expected, multi-target not supported");
  TORCH_CHECK(dim != 4 || target.dim() == 3,
              "only batches of spatial targets supported (3D tensors) but got targets of dimension: ", target.dim());
  c10::SymDimVector expected(sizes.begin(), sizes.end());
  expected.erase(expected.begin() + 1);
  TORCH_CHECK(c10::SymIntArrayRef(expected) == target.sym_sizes(), "Expected target size ",
              c10::SymIntArrayRef(expected), ", got ", target.sym_sizes());
}

}  // namespace

void check(const Inputs& in) {
  const at::Tensor &logits = in.logits, &target = in.target;
  const OptionalTensor& weight = in.weight;
  const Options& options = in.options;
  const int64_t reduction = options.reduction;
  const double label_smoothing = options.label_smoothing;
  const bool has_weight = weight && weight->defined();
  TORCH_CHECK(logits.layout() == at::kStrided, "cross_entropy expects dense logits, got ", logits.layout());
  TORCH_CHECK(target.device() == logits.device() && (!has_weight || weight->device() == logits.device()),
              "Expected all tensors to be on the same device, but got input on ", logits.device(), ", target on ",
              target.device(), has_weight ? c10::str(" and weight on ", weight->device()) : "");
  TORCH_CHECK_VALUE(reduction >= 0 && reduction < at::Reduction::END, reduction, " is not a valid value for reduction");

  const bool probabilities = is_probabilities(in);
  if (probabilities) {
    TORCH_CHECK(at::isFloatingType(target.scalar_type()),
                "Expected floating point type for target with class probabilities, got ", target.scalar_type());
    TORCH_CHECK(options.ignore_index < 0, "ignore_index is not supported for floating point target");
  }
  TORCH_CHECK_INDEX(logits.dim() > 0, probabilities
                                          ? "Dimension specified as 1 but tensor has no dimensions"
                                          : "Dimension out of range (expected to be in range of [-1, 0], but got 1)");
  const auto type = logits.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
                              "\"cross_entropy\" not implemented for '", type, "'");
  TORCH_CHECK(!(label_smoothing > 1), "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  if (!in.is_plain()) {
    check_options(in);
  }
  if (in.has_teacher()) {
    check_teacher(in);
  }
  if (in.is_shard()) {
    check_shard(in);
  }

  if (probabilities) {
    TORCH_CHECK(target.scalar_type() == type, "expected scalar type ", type, " but found ", target.scalar_type());
    if (has_weight) {
      check_weight(in, "cross_entropy: ");
    }
    return;
  }
  if (in.picked) {
    check_picks(in);
    return;
  }
  check_index_shapes(logits, target);
  if (has_weight) {
    check_weight(in, "");
    TORCH_CHECK(weight->scalar_type() == type || weight->scalar_type() == loss_dtype(in), "expected scalar type ", type,
                " but found ", weight->scalar_type());
  }
  const auto index_type = target.scalar_type();
  TORCH_CHECK(index_type == at::kLong || index_type == at::kInt || index_type == at::kByte,
              "expected target dtype to be Long or Byte, but got ", index_type);
  TORCH_CHECK(index_type != at::kByte || logits.dim() <= 2, "expected scalar type Long but found Byte");
}

}  // namespace ce
