// The operands of a case in memory: what the kernels read, and what they write.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "../../../csrc/cuda/workspace.h"
#include "../../../csrc/row_picks.h"
#include "case.h"

namespace ce::test {

// Memory of exactly the elements of an operand, so that AddressSanitizer sees each access outside. What nobody has
// written is NaN.
struct Array {
  DType dtype;
  int64_t count, offset;
  std::unique_ptr<char[]> memory;
  char* data;

  static int64_t size_of(DType dtype) {
    return dispatch(dtype, [](auto element) -> int64_t { return sizeof(element); });
  }
  explicit Array(DType dtype, int64_t count = 1, int64_t offset = 0)
      : dtype(dtype),
        count(count),
        offset(offset),
        memory(new char[(count + offset) * size_of(dtype)]),
        data(memory.get() + offset * size_of(dtype)) {
    std::memset(memory.get(), 0xff, (count + offset) * size_of(dtype));
  }
  bool is_untouched(int64_t i) const {
    const char* const element = data + i * size_of(dtype);
    return std::all_of(element, element + size_of(dtype), [](char byte) { return byte == char(0xff); });
  }
  double get(int64_t i = 0) const {
    return dispatch(dtype, [&](auto element) -> double {
      std::memcpy(&element, data + i * sizeof(element), sizeof(element));
      return cuda::to_accumulator(element);
    });
  }
  void set(int64_t i, double value) {
    dispatch(dtype, [&](auto element) {
      cuda::from_accumulator(static_cast<Acc<decltype(element)>>(value), element);
      std::memcpy(data + i * sizeof(element), &element, sizeof(element));
    });
  }
};

// Of shape (rows, classes), as numbers.
struct Matrix {
  int64_t classes;
  std::vector<double> values;

  Matrix(int64_t rows, int64_t classes) : classes(classes), values(rows * classes) {}
  double& operator()(int64_t row, int64_t k) { return values[row * classes + k]; }
  double operator()(int64_t row, int64_t k) const { return values[row * classes + k]; }
};

// How an operand of shape (outer, inner, classes) lies in a case's layout, where it stores as many. `other` sets it
// apart from the logits, where they are to lie otherwise.
struct PlaneStrides {
  int64_t inner, outer_stride, inner_stride, class_stride;

  PlaneStrides(const Case& c, int64_t other, int64_t classes) : inner(c.inner) {
    const int64_t gap = c.gap + (c.companions_lie_otherwise ? other : 0);
    class_stride = c.inner_is_last ? c.inner + gap : c.class_step;
    inner_stride = c.inner_is_last ? 1 : classes * c.class_step + gap;
    outer_stride = c.inner_is_last ? classes * class_stride : c.inner * inner_stride;
  }
  int64_t at(int64_t row, int64_t class_) const {
    return row / inner * outer_stride + row % inner * inner_stride + class_ * class_stride;
  }

  template <typename Operand>
  void describe(Operand& operand) const {
    operand.class_stride = class_stride;
    operand.strides[0] = outer_stride;
    operand.strides[1] = inner_stride;
  }
};

// Such an operand.
struct Plane {
  PlaneStrides strides;
  Array array;

  Plane(const Case& c, int64_t other) : Plane(c, other, c.dtype, c.classes, c.padding) {}
  Plane(const Case& c, int64_t other, DType dtype, int64_t classes, int64_t padding = 0)
      : strides(c, other, classes + padding),
        array(dtype, strides.at(c.rows() - 1, classes - 1) + 1,
              c.offset + (c.companions_lie_otherwise && other ? 1 : 0)) {}

  double get(int64_t row, int64_t class_) const { return array.get(strides.at(row, class_)); }
  void set(int64_t row, int64_t class_, double value) { array.set(strides.at(row, class_), value); }

  template <typename Operand>
  void describe(Operand& operand) {
    operand.data = array.data;
    strides.describe(operand);
  }
};

// How an operand of shape (outer, inner) lies: where it is to lie otherwise, transposed and `step` elements apart. With
// a step of 0 all rows have one element.
struct RowStrides {
  int64_t inner, outer_stride, inner_stride;

  RowStrides(const Case& c, int64_t step)
      : inner(c.inner),
        outer_stride(c.companions_lie_otherwise || step == 0 ? step : c.inner),
        inner_stride(c.companions_lie_otherwise || step == 0 ? step * c.outer : 1) {}
  int64_t at(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
  void describe(int64_t (&strides)[kMaxDims]) const {
    strides[0] = outer_stride;
    strides[1] = inner_stride;
  }
};

// An input of shape (outer, inner); every row has the same value where it is not given.
struct RowInput {
  bool is_given;
  double otherwise;
  RowStrides strides;
  Array array;

  RowInput(const Case& c, DType dtype, bool is_given, double otherwise, int64_t step = 2)
      : is_given(is_given), otherwise(otherwise), strides(c, step), array(dtype, strides.at(c.rows() - 1) + 1) {}
  double get(int64_t row) const { return is_given ? array.get(strides.at(row)) : otherwise; }
  void set(int64_t row, double value) { array.set(strides.at(row), value); }
  void describe(Input& operand) const {
    operand.data = is_given ? array.data : nullptr;
    strides.describe(operand.strides);
  }
};

// Indices of classes, of a target's type.
struct IndexArray {
  int64_t size;
  std::vector<char> memory;

  IndexArray(TargetType type, int64_t count)
      : size(type == TargetType::kInt64   ? 8
             : type == TargetType::kInt32 ? 4
                                          : 1),
        memory(count * size, char(0xff)) {}
  void set(int64_t i, int64_t index) { std::memcpy(memory.data() + i * size, &index, size); }
  int64_t get(int64_t i) const {  // not of negative ones
    int64_t index = 0;
    std::memcpy(&index, memory.data() + i * size, size);
    return index;
  }
};

// Targets of shape (outer, inner).
struct Indices {
  RowStrides strides;
  IndexArray array;

  explicit Indices(const Case& c) : strides(c, 2), array(c.target, strides.at(c.rows() - 1) + 1) {}
  void set(int64_t row, int64_t index) { array.set(strides.at(row), index); }
  void describe(Input& operand) const {
    operand.data = array.memory.data();
    strides.describe(operand.strides);
  }
};

// Targets of shape (outer, inner, picks), and their probabilities.
struct PickedClasses {
  PlaneStrides strides;
  IndexArray indices;
  Plane probabilities;

  explicit PickedClasses(const Case& c) : PickedClasses(c, std::max<int64_t>(c.picks, 1)) {}

  int64_t index(int64_t row, int64_t j) const { return indices.get(strides.at(row, j)); }
  void set_index(int64_t row, int64_t j, int64_t index) { indices.set(strides.at(row, j), index); }
  void describe(Problem& p) {
    p.target.data = indices.memory.data();
    strides.describe(p.target);
    probabilities.describe(p.probabilities);
  }

 private:
  PickedClasses(const Case& c, int64_t picks)
      : strides(c, 2, picks),
        indices(c.target, strides.at(c.rows() - 1, picks - 1) + 1),
        probabilities(c, 1, c.acc(), picks) {}
};

// The operands of a case.
class Inputs {
 public:
  explicit Inputs(const Case& c)
      : logits(c, 0),
        target(c, 1),
        indices(c),
        picked(c),
        weight(c.acc(), c.classes),
        row_weight(c, c.acc(), c.row_weighted, 1),
        logit_scale(c.acc()),
        divisor(c.acc()),
        index(c.rows(), -1),
        kept(c.rows(), true),
        bad(c.rows(), false) {
    Random random;
    random.state = 77 + c.classes * 31 + c.outer + c.inner;
    for (int64_t k = 0; k < c.classes; ++k) {
      weight.set(k, c.weighted ? 0.25 + random.uniform() : 1);
    }
    for (int64_t row = 0; row < c.rows(); ++row) {
      row_weight.set(row, row % 4 == 2 ? 0 : 0.25 + random.uniform());
      if (c.has_teacher()) {
        make_pair(c, row, random);
        continue;
      }
      if (c.picks > 0) {
        make_picks(c, row, random);
        continue;
      }
      make_logits(c, row, random);
      c.has_probabilities() ? make_probabilities(c, row, random) : make_index(c, row, random);
    }
    logit_scale.set(0, kScaleOnDevice);
    divisor.set(0, 0.5 + random.uniform());
  }

  static constexpr double kScaleOnDevice = 2;
  static constexpr double kDivisor = 3;

  Plane logits;
  Plane target;  // probabilities or a teacher's logits
  Indices indices;
  PickedClasses picked;
  Array weight;
  RowInput row_weight;
  Array logit_scale, divisor;

  std::vector<int64_t> index;   // of a good target, or −1
  std::vector<bool> kept, bad;  // kept rows are those that have a loss

 private:
  // Some classes of some rows, or all, are infinite or NaN or far from 0.
  static double special(const Case& c, int64_t row, int64_t k, double value) {
    switch (row % 6) {
      case 1:
        return -kInf;
      case 2:
        return k == c.classes / 2 ? kInf : value;
      case 3:
        return k % 3 == 0 ? -kInf : value;
      case 4:
        return 5e4 + value;
      case 5:
        return k == c.classes / 3 ? NAN : value;
      default:
        return value;
    }
  }

  void make_logits(const Case& c, int64_t row, Random& random) {
    for (int64_t k = 0; k < c.classes; ++k) {
      const double value = 3 * random.normal();
      logits.set(row, k, c.has_special_rows ? special(c, row, k, value) : c.has_ties ? std::round(value) : value);
    }
  }

  // The same of a row and its teacher: what is −inf in both or either, far from 0, or equal.
  static void make_special(int kind, int64_t k, int64_t classes, double& x, double& t) {
    const double far = 2000;  // below the maximum there is nothing left
    const bool is_middle = k == classes / 2, is_first_half = k < classes / 2;
    if ((kind == 1 && k % 3 == 0) || (kind == 2 && k < classes * 2 / 3)) {
      x = t = -kInf;
    } else if (kind == 3) {
      x = is_middle ? -kInf : x;
    } else if (kind == 4) {
      t = is_middle ? -kInf : t;
    } else if (kind == 5) {
      x += 5e4;
      t -= 3e4;
    } else if (kind == 6) {
      t = x;
    } else if (kind == 7 && is_first_half) {
      x -= far;
      t = -kInf;
    } else if (kind == 8 && is_first_half) {
      x = -kInf;
      t -= far;
    }
  }

  // Of a row and its teacher; a row without weight holds what must not be read.
  void make_pair(const Case& c, int64_t row, Random& random) {
    kept[row] = row_weight.get(row) != 0;
    for (int64_t k = 0; k < c.classes; ++k) {
      double x = 3 * random.normal(), t = 3 * random.normal();
      if (c.has_special_rows) {
        make_special(row % 9, k, c.classes, x, t);
      }
      logits.set(row, k, kept[row] ? x : NAN);
      target.set(row, k, kept[row] ? t : NAN);
    }
  }

  void make_probabilities(const Case& c, int64_t row, Random& random) {
    for (int64_t k = 0; k < c.classes; ++k) {
      target.set(row, k, random.uniform() / c.classes);
    }
  }

  // In a row without weight nothing is written: none of it must be read.
  void make_picks(const Case& c, int64_t row, Random& random) {
    kept[row] = row_weight.get(row) != 0;
    if (!kept[row]) {
      return;
    }
    make_logits(c, row, random);
    std::vector<int64_t> classes(c.classes);
    std::iota(classes.begin(), classes.end(), 0);
    for (int64_t j = 0; j < c.picks; ++j) {
      std::swap(classes[j], classes[j + random.below(c.classes - j)]);
      const bool repeats = c.has_repeated_picks && j > 0 && random.below(3) == 0;
      picked.set_index(row, j, repeats ? picked.index(row, random.below(j)) : classes[j]);
      picked.probabilities.set(row, j, j == 2 ? 0 : 1.5 * random.uniform() / c.picks);
    }
    bad[row] = c.has_bad_target && row >= c.rows() / 2;
    if (bad[row]) {
      picked.set_index(row, row % c.picks, c.classes + row);
    }
  }

  void make_index(const Case& c, int64_t row, Random& random) {
    const int64_t limit = c.target == TargetType::kUInt8 ? std::min<int64_t>(c.classes, 256) : c.classes;
    const int64_t good = row == 0 ? limit - 1 : row == 1 ? 0 : random.below(limit);
    kept[row] = !c.ignores_all && !(c.ignores && row % 3 == 1) && !(c.ignores_runs && (row + 2) % 5 < 3);
    bad[row] = c.has_bad_target && kept[row] && row >= c.rows() / 2;
    index[row] = kept[row] && !bad[row] ? good : -1;
    indices.set(row, !kept[row] ? ignore_index(c) : bad[row] ? c.classes + row : good);
    if (!kept[row]) {
      row_weight.set(row, NAN);
    }
  }

 public:
  static int64_t ignore_index(const Case& c) { return c.target == TargetType::kUInt8 ? 255 : -100; }
};

// A case as the kernels get it, without what they are to write.
inline Problem describe(const Case& c, Inputs& in) {
  Problem p;
  p.dtype = c.dtype;
  p.target_type = c.target;
  p.rows = c.rows();
  p.classes = c.classes;
  p.dims = 2;
  p.sizes[0] = c.outer;
  p.sizes[1] = c.inner;
  if (c.inner > 1) {
    p.dividers[1] = Divider(c.inner);
  } else {  // as ProblemBuilder merges them
    p.dims = 1;
  }
  in.logits.describe(p.logits);
  p.picks = c.picks;
  p.spreads = c.spreads;
  if (c.picks > 0) {
    in.picked.describe(p);
  } else if (c.has_indices()) {
    in.indices.describe(p.target);
  } else {
    in.target.describe(p.target);
  }
  p.ignore_index = Inputs::ignore_index(c);
  p.weight = c.weighted ? in.weight.data : nullptr;
  p.label_smoothing = c.smoothing;
  p.z_loss = c.z_loss;
  p.softcap = c.softcap;
  p.logit_scale = {c.logit_scale, c.on_device ? in.logit_scale.data : nullptr};
  in.row_weight.describe(p.row_weight);
  p.divides_by_weight = c.divides_by_weight();
  p.zero_if_empty = c.zero_if_empty;
  if (c.reduction == 'd') {
    p.divisor = {Inputs::kDivisor, c.on_device ? in.divisor.data : nullptr};
  } else if (c.reduction == 'm') {
    p.divisor.value = static_cast<double>(c.rows());
  }
  p.teacher_scale = c.teacher_scale;
  p.reverse = c.reverse;
  p.kappa = c.kappa;
  return p;
}

// What the forward pass writes.
struct Results {
  RowStrides strides;
  Array loss, max, sum, lse, log_prob, entropy, teacher_max, teacher_sum, mean, total;
  std::vector<int64_t> argmax, rank;
  BadTarget bad_target;
  std::vector<char> workspace, picked_rows, picked;  // for the kernels' own use

  explicit Results(const Case& c)
      : strides(c, 1),
        loss(c.acc(), c.rows()),
        max(c.acc(), c.rows()),
        sum(c.acc(), c.rows()),
        lse(c.acc(), c.rows()),
        log_prob(c.acc(), c.rows()),
        entropy(c.acc(), c.rows()),
        teacher_max(c.acc(), c.rows()),
        teacher_sum(c.acc(), c.rows()),
        mean(c.acc(), c.rows()),
        total(c.total_type()),
        argmax(c.rows(), -7),
        rank(c.rows(), -7) {}

  // Those that the operators ask for in the same pass.
  void describe(Problem& p, const Case& c, Pass pass) {
    strides.describe(p.row_strides);
    p.loss = loss.data;
    if (pass == Pass::kForward || pass == Pass::kBackward || c.picks > 0) {
      p.max = max.data;
      p.sum = sum.data;
      if (c.has_teacher()) {
        p.teacher_max = teacher_max.data;
        p.teacher_sum = teacher_sum.data;
        p.mean = mean.data;
      }
    }
    p.lse = c.wants(kLse) ? lse.data : nullptr;
    p.log_prob = c.wants(kLogProb) ? log_prob.data : nullptr;
    p.entropy = c.wants(kEntropy) ? entropy.data : nullptr;
    p.argmax = c.wants(kArgmax) ? argmax.data() : nullptr;
    p.rank = c.wants(kRank) ? rank.data() : nullptr;
    if (c.reduction != 'n') {
      p.total = total.data;
      p.total_type = c.total_type();
    }
    p.bad_target = &bad_target;
    describe_memory(p, c, pass == Pass::kForwardGrad || pass == Pass::kInplace);
  }

  // Every call has memory of its own: nothing is left there of the one before.
  void describe_memory(Problem& p, const Case& c, bool grad) {
    // Plans are changed, some into ones that need more.
    workspace.assign(cuda::workspace_size(p) + (grad ? cuda::Workspace::bytes_of_rows(p.rows) : 0), char(0xff));
    p.workspace = workspace.data();
    const int64_t picked_row = c.acc() == DType::kFloat64 ? sizeof(PickedRow<double>) : sizeof(PickedRow<float>);
    picked_rows.assign(c.picks > 0 ? c.rows() * picked_row : 0, char(0xff));
    p.picked_rows = picked_rows.data();
    picked.assign(2 * c.rows() * c.picks * Array::size_of(c.acc()), char(0xff));
    p.picked = picked.data();
  }
};

// The gradients that come to what the forward pass has given: random ones where it is followed by a backward pass.
struct Upstream {
  RowInput loss, lse, log_prob, entropy;

  Upstream(const Case& c, Pass pass)
      : loss(c, c.dtype, pass == Pass::kBackward, 1, c.reduction == 'n' ? 2 : 0),
        lse(c, c.acc(), pass == Pass::kBackward && c.wants(kLse), 0),
        log_prob(c, c.acc(), pass == Pass::kBackward && c.wants(kLogProb), 0),
        entropy(c, c.acc(), pass == Pass::kBackward && c.wants(kEntropy), 0) {
    Random random;
    for (int64_t row = 0; row < c.rows(); ++row) {
      for (RowInput* const input : {&loss, &lse, &log_prob, &entropy}) {
        input->set(row, random.normal());
      }
    }
  }
  void describe(Problem& p, const Case& c) const {
    loss.describe(p.grad_loss);
    p.grad_loss_type = c.dtype;
    lse.describe(p.grad_lse);
    log_prob.describe(p.grad_log_prob);
    entropy.describe(p.grad_entropy);
  }
  bool reaches_ignored_rows() const { return lse.is_given || entropy.is_given; }
};

}  // namespace ce::test
