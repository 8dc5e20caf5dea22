// Runs the CUDA kernels on the CPU against an oracle in float64, which is written from the formulas of row_loss.h,
// row_divergence.h and row_picks.h but shares no code with them. Prints what differs, and how many cases ran.
//
// Usage: kernels_test [group ...], without arguments all groups. KERNELS_TEST_DTYPE=0 to 3 keeps to one dtype.
//
// A new option is a member of Case with a line in text_of(), an operand in Inputs where it is one, a line in
// describe(), its formula in Oracle, and a case in options(), which the groups at the end take through layouts and
// plans. A new output is a member of Results, a value in Oracle, a comparison in compare_rows(), and a case in stats().

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/workspace.h"
#include "../../csrc/row_picks.h"

namespace {

using namespace ce;

constexpr double kInf = std::numeric_limits<double>::infinity();

// A generator of its own, so that the cases are the same everywhere.
struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % n); }
  double uniform() { return next() / 2147483648.0; }
  double normal() { return uniform() + uniform() + uniform() + uniform() + uniform() + uniform() - 3; }
};

enum class Pass {
  kForward,
  kForwardGrad,
  kInplace,
  kBackward,  // after a forward pass; then the gradients of all other operands
};

// What a case may ask for besides the loss.
enum Output { kLse = 1, kLogProb = 2, kEntropy = 4, kArgmax = 8, kRank = 16, kAllOutputs = 31 };

struct Case {
  DType dtype = DType::kFloat32;
  TargetType target = TargetType::kInt64;

  // How the operands lie.
  int64_t outer = 1, inner = 1;  // rows are (outer, inner) of (outer, classes, inner)
  int64_t classes = 1;
  int64_t padding = 0;                    // classes behind them that do not count
  bool inner_is_last = false;             // the layout (outer, classes, inner), where inner > 1 or classes are columns
  int64_t class_step = 1;                 // elements between neighbouring classes, where they are the last dimension
  int64_t gap = 0;                        // elements between rows
  int64_t offset = 0;                     // of the first element from an aligned address
  bool companions_lie_otherwise = false;  // other operands do not share the logits' alignment and strides

  // What is asked for.
  bool weighted = false, row_weighted = false;
  double smoothing = 0, z_loss = 0, softcap = 0, logit_scale = 1;
  bool on_device = false;  // a factor of the logits' scale, and of the divisor, only the device knows
  char reduction = 'n';    // none, sum, mean, divided by a number that is given
  bool zero_if_empty = false;
  bool has_wide_total = false;  // a total in the accumulator's type, not in that of the logits
  bool reverse = false;         // of a teacher, as the next one
  double teacher_scale = 1;
  int64_t picks = 0;     // classes of a row that its target picks
  bool spreads = false;  // the rest of their mass over the other classes
  double kappa = 1;      // of a teacher and of picks
  int64_t shards = 1;    // of the classes
  int outputs = 0;       // of Output

  // What the operands hold.
  bool ignores = false, ignores_runs = false, ignores_all = false;  // every third row, several in a row, all
  bool has_bad_target = false, has_special_rows = false, has_ties = false;
  bool has_repeated_picks = false;

  int64_t rows() const { return outer * inner; }
  DType acc() const { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  DType total_type() const { return has_wide_total ? acc() : dtype; }
  bool has_teacher() const { return target == TargetType::kTeacher; }
  bool has_probabilities() const { return target == TargetType::kProbabilities; }
  bool has_indices() const { return !has_teacher() && !has_probabilities() && picks == 0; }
  bool wants(Output output) const { return (outputs & output) != 0; }
  bool wants_stats() const { return (outputs & ~kLse) != 0; }
  bool reads_ignored_rows() const { return wants(kLse) || wants(kEntropy) || wants(kArgmax); }
  bool transforms() const { return logit_scale != 1 || on_device || softcap > 0; }
  bool divides_by_weight() const { return reduction == 'm' && (has_indices() || row_weighted); }
};

// All members of a case that are not as usual.
std::string text_of(const Case& c) {
  std::string text;
  const auto add = [&](const char* name, auto Case::* member) {
    if (c.*member != Case().*member) {
      char value[40];
      std::snprintf(value, sizeof(value), " %s %g", name, static_cast<double>(c.*member));
      text += value;
    }
  };
  add("dtype", &Case::dtype);
  add("target", &Case::target);
  add("outer", &Case::outer);
  add("inner", &Case::inner);
  add("classes", &Case::classes);
  add("padding", &Case::padding);
  add("inner_is_last", &Case::inner_is_last);
  add("class_step", &Case::class_step);
  add("gap", &Case::gap);
  add("offset", &Case::offset);
  add("companions_lie_otherwise", &Case::companions_lie_otherwise);
  add("weighted", &Case::weighted);
  add("row_weighted", &Case::row_weighted);
  add("smoothing", &Case::smoothing);
  add("z_loss", &Case::z_loss);
  add("softcap", &Case::softcap);
  add("logit_scale", &Case::logit_scale);
  add("on_device", &Case::on_device);
  add("zero_if_empty", &Case::zero_if_empty);
  add("has_wide_total", &Case::has_wide_total);
  add("reverse", &Case::reverse);
  add("teacher_scale", &Case::teacher_scale);
  add("picks", &Case::picks);
  add("spreads", &Case::spreads);
  add("kappa", &Case::kappa);
  add("shards", &Case::shards);
  add("outputs", &Case::outputs);
  add("ignores", &Case::ignores);
  add("ignores_runs", &Case::ignores_runs);
  add("ignores_all", &Case::ignores_all);
  add("has_bad_target", &Case::has_bad_target);
  add("has_special_rows", &Case::has_special_rows);
  add("has_ties", &Case::has_ties);
  add("has_repeated_picks", &Case::has_repeated_picks);
  return text + " reduction " + c.reduction;
}

int failures = 0, cases = 0;

// What runs, for the message where a result differs.
struct Run {
  const char* group;
  const Case& c;
  Pass pass;

  void expect(double actual, double expected, double relative, double absolute, const char* what, int64_t row = -1,
              int64_t class_ = -1) const {
    const bool is_close = std::isnan(expected) ? std::isnan(actual)
                          : std::isinf(expected)
                              ? actual == expected
                              : std::abs(actual - expected) <= relative * std::abs(expected) + absolute;
    if (is_close) {
      return;
    }
    constexpr int kEnough = 10;
    std::printf("%s:%s, pass %d: %s of row %ld class %ld is %.9g, not %.9g\n", group, text_of(c).c_str(), int(pass),
                what, long(row), long(class_), actual, expected);
    if (++failures == kEnough) {
      std::exit(1);
    }
  }
};

double epsilon_of(DType dtype) {
  return dtype == DType::kFloat64    ? 1e-13
         : dtype == DType::kFloat16  ? 0x1p-10
         : dtype == DType::kBFloat16 ? 0x1p-7
                                     : 2e-6;
}

// What a result in the accumulator's type may be off, relative to the size of what it is made from. A softcap's tanh
// has fewer digits, and a scaled logit is rounded.
double epsilon_of(const Case& c) {
  return epsilon_of(c.acc()) * (c.transforms() ? 4 : 1);
}

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
Problem describe(const Case& c, Inputs& in) {
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

struct Softmax {
  double max = -kInf, sum = 0, lse = 0;
  std::vector<double> p, ln_p;

  explicit Softmax(const std::vector<double>& z) : p(z.size()), ln_p(z.size()) {
    for (const double value : z) {
      max = value > max ? value : max;
    }
    const double reference = max == -kInf ? 0 : max;
    for (size_t k = 0; k < z.size(); ++k) {
      p[k] = std::exp(z[k] - reference);
      sum += p[k];
    }
    for (size_t k = 0; k < z.size(); ++k) {
      p[k] /= sum;
      ln_p[k] = z[k] - reference - std::log(sum);
    }
    lse = max == kInf ? kInf : max + std::log(sum);
  }
};

// A gradient of shape (rows, classes), and for each row how large the terms are that it is made from.
struct Gradient {
  Matrix values;
  std::vector<double> sizes;

  Gradient(int64_t rows, int64_t classes) : values(rows, classes), sizes(rows) {}
};

// A sum, and that of its terms' sizes.
struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::abs(term);
  }
};

// What the kernels are to find.
class Oracle {
 public:
  Oracle(const Case& c, const Inputs& in)
      : max(c.rows()),
        sum(c.rows()),
        lse(c.rows()),
        loss(c.rows()),
        loss_size(c.rows()),
        log_prob(c.rows()),
        entropy(c.rows()),
        teacher_max(c.rows()),
        teacher_sum(c.rows()),
        mean(c.rows()),
        argmax(c.rows(), -1),
        rank(c.rows(), -1),
        c_(c),
        in_(in),
        scale_(c.logit_scale * (c.on_device ? Inputs::kScaleOnDevice : 1)),
        x_(c.rows(), c.classes),
        p_(c.rows(), c.classes),
        ln_p_(c.rows(), c.classes),
        slope_(c.rows(), c.classes),
        shares_(c.rows(), c.classes),
        by_logits_(c.rows(), c.classes),
        by_target_(c.rows(), c.classes) {
    std::vector<double> z(c.classes);
    for (int64_t row = 0; row < c.rows(); ++row) {
      if ((c.has_teacher() || c.picks > 0) && !in.kept[row]) {
        continue;
      }
      for (int64_t k = 0; k < c.classes; ++k) {
        x_(row, k) = in.logits.get(row, k);
        const double scaled = scale_ * x_(row, k), tanh = c.softcap > 0 ? std::tanh(scaled / c.softcap) : 0;
        z[k] = c.softcap > 0 ? c.softcap * tanh : scaled;
        slope_(row, k) = 1 - tanh * tanh;
      }
      const Softmax softmax(z);
      std::copy(softmax.p.begin(), softmax.p.end(), &p_(row, 0));
      std::copy(softmax.ln_p.begin(), softmax.ln_p.end(), &ln_p_(row, 0));
      max[row] = softmax.max;
      sum[row] = softmax.sum;
      lse[row] = softmax.lse;
      if (c.picks > 0 && !in.bad[row]) {
        pick(row);
      }
      c.has_teacher() ? diverge(row, softmax) : cross(row);
      if (c.z_loss > 0) {
        add_z_loss(row);
      }
      if (c.wants_stats()) {
        find_stats(row);
      }
      loss[row] = !in.kept[row] ? 0 : in.bad[row] ? NAN : loss[row];
    }
    reduce();
  }

  std::vector<double> max, sum, lse, loss, loss_size, log_prob, entropy, teacher_max, teacher_sum, mean;
  std::vector<int64_t> argmax, rank;
  double divisor = 1;
  Sum total;

  Gradient of_logits(const Upstream& upstream) const {
    Gradient gradient(c_.rows(), c_.classes);
    for (int64_t row = 0; row < c_.rows(); ++row) {
      const RowUpstream of_row = upstream_of(row, upstream);
      gradient.sizes[row] = std::abs(scale_) * (std::abs(of_row.loss) * by_logits_.sizes[row] + std::abs(of_row.lse) +
                                                std::abs(of_row.log_prob) +
                                                std::abs(of_row.entropy) * (c_.wants(kEntropy) ? 2 + entropy[row] : 0));
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient.values(row, k) = by_z(row, k, of_row) * scale_ * slope_(row, k);
      }
    }
    return gradient;
  }

  // Of the probabilities or of the teacher's logits.
  Gradient of_target(const Upstream& upstream) const {
    Gradient gradient = by_target_;
    for (int64_t row = 0; row < c_.rows(); ++row) {
      const double g = in_.kept[row] ? factor(row, upstream) : 0;
      gradient.sizes[row] *= std::abs(g);
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient.values(row, k) *= g;
      }
    }
    return gradient;
  }

  // Of the weights of classes that have probabilities.
  std::vector<Sum> of_weight(const Upstream& upstream) const {
    std::vector<Sum> gradient(c_.classes);
    for (int64_t row = 0; row < c_.rows(); ++row) {
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient[k].add(-factor(row, upstream) * smoothed(row, k) * ln_p_(row, k));
      }
    }
    return gradient;
  }

  Sum of_logit_scale(const Upstream& upstream) const {
    Sum gradient;
    for (int64_t row = 0; row < c_.rows(); ++row) {
      const RowUpstream of_row = upstream_of(row, upstream);
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient.add(by_z(row, k, of_row) * slope_(row, k) * x_(row, k));
      }
    }
    return gradient;
  }

 private:
  // A class's share of the target.
  double smoothed(int64_t row, int64_t k) const {
    const double q = c_.picks > 0             ? shares_(row, k)
                     : c_.has_probabilities() ? in_.target.get(row, k)
                     : k == in_.index[row]    ? 1
                                              : 0;
    return (1 - c_.smoothing) * q + c_.smoothing / c_.classes;
  }

  // The shares of the target, and the part of the loss that does not depend on the logits.
  void pick(int64_t row) {
    double mass = 0;
    Sum constant;
    for (int64_t j = 0; j < c_.picks; ++j) {
      const double q = in_.picked.probabilities.get(row, j);
      mass += q;
      constant.add(q > 0 ? q * std::log(q) : 0);
    }
    const int64_t others = c_.classes - c_.picks;
    const double background = c_.spreads && others > 0 ? std::max(0.0, 1 - mass) / others : 0;
    constant.add(background > 0 ? others * background * std::log(background) : 0);
    std::fill_n(&shares_(row, 0), c_.classes, background);
    for (int64_t j = 0; j < c_.picks; ++j) {
      shares_(row, in_.picked.index(row, j)) += in_.picked.probabilities.get(row, j) - background;
    }
    loss[row] = c_.kappa * constant.value;
    loss_size[row] = c_.kappa * constant.size;
  }

  void cross(int64_t row) {
    Sum sum_a;
    for (int64_t k = 0; k < c_.classes; ++k) {
      const double a = in_.weight.get(k) * smoothed(row, k);
      sum_a.add(a);
      if (a != 0) {
        loss[row] -= a * ln_p_(row, k);
        loss_size[row] += std::abs(a) * (1 + std::abs(ln_p_(row, k)));
      }
      by_logits_.values(row, k) = -a;
      by_target_.values(row, k) = -(1 - c_.smoothing) * in_.weight.get(k) * ln_p_(row, k);
      by_target_.sizes[row] = std::max(by_target_.sizes[row], 1 + std::abs(by_target_.values(row, k)));
    }
    for (int64_t k = 0; k < c_.classes; ++k) {
      by_logits_.values(row, k) += sum_a.value * p_(row, k);
    }
    by_logits_.sizes[row] = sum_a.size;
  }

  // The divergence is of the softmax `a` from `b`, of which one is the teacher's.
  void diverge(int64_t row, const Softmax& softmax) {
    std::vector<double> t(c_.classes);
    for (int64_t k = 0; k < c_.classes; ++k) {
      t[k] = c_.teacher_scale * in_.target.get(row, k);
    }
    const Softmax teacher(t);
    const Softmax &a = c_.reverse ? softmax : teacher, &b = c_.reverse ? teacher : softmax;
    for (int64_t k = 0; k < c_.classes; ++k) {
      // Without rounding where the softmaxes are the same.
      if (a.p[k] != 0 && c_.kappa * a.ln_p[k] != b.ln_p[k]) {
        loss[row] += a.p[k] * (c_.kappa * a.ln_p[k] - b.ln_p[k]);
        loss_size[row] += a.p[k] * (2 + std::abs(a.ln_p[k]) + std::abs(b.ln_p[k]));
      }
    }
    Gradient &by_a = c_.reverse ? by_logits_ : by_target_, &by_b = c_.reverse ? by_target_ : by_logits_;
    for (int64_t k = 0; k < c_.classes; ++k) {
      by_a.values(row, k) = a.p[k] == 0 ? 0 : a.p[k] * (c_.kappa * a.ln_p[k] - b.ln_p[k] - loss[row]);
      by_b.values(row, k) = b.p[k] - a.p[k];
      by_target_.values(row, k) *= c_.teacher_scale;
    }
    by_a.sizes[row] = loss_size[row] + std::abs(loss[row]);
    by_b.sizes[row] = 1;
    by_target_.sizes[row] *= c_.teacher_scale;
    teacher_max[row] = teacher.max;
    teacher_sum[row] = teacher.sum;
    mean[row] = loss[row] + c_.kappa * std::log(a.sum) - std::log(b.sum);
  }

  void add_z_loss(int64_t row) {
    loss[row] += c_.z_loss * lse[row] * lse[row];
    loss_size[row] += c_.z_loss * lse[row] * lse[row];
    const double slope = 2 * c_.z_loss * lse[row];
    by_logits_.sizes[row] += std::abs(slope);
    for (int64_t k = 0; k < c_.classes; ++k) {
      by_logits_.values(row, k) += slope * p_(row, k);
    }
  }

  // The place of a target is one among the logits as they are given, or their reverse under a negative scale.
  void find_stats(int64_t row) {
    const double order = scale_ < 0 ? -1 : 1;
    const int64_t target = in_.index[row];
    log_prob[row] = !in_.kept[row] ? 0 : target < 0 ? NAN : ln_p_(row, target);
    argmax[row] = 0;
    rank[row] = target < 0 ? -1 : 0;
    double largest = -kInf;
    for (int64_t k = 0; k < c_.classes; ++k) {
      const double y = order * x_(row, k);
      if (y > largest) {
        largest = y;
        argmax[row] = k;
      }
      if (target >= 0) {
        const double target_y = order * x_(row, target);
        rank[row] += std::isnan(y) || y > target_y || (y == target_y && k < target);
      }
      entropy[row] -= p_(row, k) == 0 ? 0 : p_(row, k) * ln_p_(row, k);
    }
  }

  void reduce() {
    double weights = 0;
    for (int64_t row = 0; row < c_.rows(); ++row) {
      if (!in_.kept[row]) {
        continue;
      }
      const double row_weight = in_.row_weight.get(row);
      weights += row_weight * (!c_.has_indices() ? 1 : in_.index[row] >= 0 ? in_.weight.get(in_.index[row]) : 0);
      total.value += row_weight * loss[row];
      total.size += row_weight * loss_size[row];
    }
    if (c_.reduction == 'd') {
      divisor = Inputs::kDivisor * (c_.on_device ? in_.divisor.get() : 1);
    } else if (c_.reduction == 'm') {
      divisor = c_.divides_by_weight() ? weights : c_.rows();
      divisor = divisor == 0 && c_.zero_if_empty ? kInf : divisor;
    }
    total.value /= divisor;
    total.size /= divisor;
  }

  // Of a row's loss.
  double factor(int64_t row, const Upstream& upstream) const {
    return in_.bad[row] ? NAN : in_.kept[row] ? upstream.loss.get(row) * in_.row_weight.get(row) / divisor : 0;
  }

  struct RowUpstream {
    double loss, lse, log_prob, entropy;
    bool is_zero;
  };
  RowUpstream upstream_of(int64_t row, const Upstream& upstream) const {
    return {factor(row, upstream), upstream.lse.get(row), in_.kept[row] ? upstream.log_prob.get(row) : 0,
            upstream.entropy.get(row), !in_.kept[row] && !upstream.reaches_ignored_rows()};
  }

  double by_z(int64_t row, int64_t k, const RowUpstream& upstream) const {
    if (upstream.is_zero) {
      return 0;
    }
    const double p = p_(row, k);
    double gradient =
        upstream.loss * by_logits_.values(row, k) + upstream.lse * p + upstream.log_prob * ((k == in_.index[row]) - p);
    if (upstream.entropy != 0 && p != 0) {
      gradient -= upstream.entropy * p * (ln_p_(row, k) + entropy[row]);
    }
    return gradient;
  }

  const Case& c_;
  const Inputs& in_;
  const double scale_;
  Matrix x_, p_, ln_p_, slope_;     // the logits as they are given, their softmax, and ∂z/∂x over the scale
  Matrix shares_;                   // of the target, where it picks classes
  Gradient by_logits_, by_target_;  // of a row's loss alone, the first by z
};

void compare_rows(const Run& run, const Results& results, const Oracle& oracle, const Inputs& in, const Problem& p) {
  const Case& c = run.c;
  const double epsilon = epsilon_of(c);
  int64_t first_bad = INT64_MAX, bad_target = 0;
  for (int64_t row = 0; row < c.rows(); ++row) {
    const int64_t at = results.strides.at(row);
    if (in.bad[row] && at < first_bad) {
      first_bad = at;
      bad_target = c.classes + row;
    }
    run.expect(results.loss.get(at), oracle.loss[row], epsilon, epsilon * oracle.loss_size[row], "the loss", row);
    if (p.log_prob) {
      run.expect(results.log_prob.get(at), oracle.log_prob[row], epsilon, epsilon, "log_prob", row);
    }
    if (p.rank && !(in.index[row] >= 0 && std::isnan(in.logits.get(row, in.index[row])))) {
      run.expect(results.rank[at], oracle.rank[row], 0, 0, "the rank", row);
    }
    if (!in.kept[row] && !c.reads_ignored_rows()) {
      continue;
    }
    // The maximum is one of the logits, of which a transformed one is rounded.
    const double rounding = c.transforms() ? epsilon : 0;
    if (p.max) {
      run.expect(results.max.get(at), oracle.max[row], rounding, rounding, "the maximum", row);
    }
    if (p.sum && std::isfinite(oracle.max[row])) {
      run.expect(results.sum.get(at), oracle.sum[row], epsilon, 0, "the sum", row);
    }
    if (p.teacher_max) {
      run.expect(results.teacher_max.get(at), oracle.teacher_max[row], epsilon, 0, "the teacher's maximum", row);
      run.expect(results.teacher_sum.get(at), oracle.teacher_sum[row], epsilon, 0, "the teacher's sum", row);
      run.expect(results.mean.get(at), oracle.mean[row], epsilon, epsilon * oracle.loss_size[row], "M", row);
    }
    if (p.lse) {
      run.expect(results.lse.get(at), oracle.lse[row], epsilon, epsilon, "lse", row);
    }
    if (p.entropy) {
      run.expect(results.entropy.get(at), oracle.entropy[row], epsilon, 2 * epsilon, "the entropy", row);
    }
    if (p.argmax) {
      run.expect(results.argmax[at], oracle.argmax[row], 0, 0, "argmax", row);
    }
  }
  if (p.total) {
    run.expect(results.total.get(), oracle.total.value, epsilon_of(c.total_type()), epsilon * oracle.total.size,
               "the total");
  }
  run.expect(double(results.bad_target.row), double(first_bad), 0, 0, "the reported row");
  run.expect(results.bad_target.target, bad_target, 0, 0, "the reported target");
}

// Of what is rounded to zero or to the smallest numbers: half of what separates those of float16.
double smallest_of(DType dtype) {
  return dtype == DType::kFloat16 ? 0x1p-25 : 1e-37;
}

// Of classes from `first` on; also that what belongs to no class has not been written.
void compare_gradient(const Run& run, const Plane& plane, const Gradient& expected, const char* what,
                      int64_t first = 0) {
  const Case& c = run.c;
  const double relative = epsilon_of(c.dtype), epsilon = epsilon_of(c), smallest = smallest_of(c.dtype);
  std::vector<bool> is_class(plane.array.count);
  for (int64_t row = 0; row < c.rows(); ++row) {
    for (int64_t k = 0; k < c.classes; ++k) {
      is_class[plane.strides.at(row, k)] = true;
      run.expect(plane.get(row, k), expected.values(row, first + k), relative, epsilon * expected.sizes[row] + smallest,
                 what, row, k);
    }
  }
  for (int64_t i = -plane.array.offset; i < plane.array.count; ++i) {
    if ((i < 0 || !is_class[i]) && !plane.array.is_untouched(i)) {
      run.expect(plane.array.get(i), NAN, 0, 0, "what is around the gradient", -1, i);
    }
  }
}

void compare_sum(const Run& run, double actual, const Sum& expected, const char* what, int64_t class_ = -1) {
  run.expect(actual, expected.value, epsilon_of(run.c), epsilon_of(run.c) * expected.size, what, -1, class_);
}

double logit_scale_gradient(Problem p, const Case& c) {
  Array grad(c.acc());
  std::vector<double> sums(cuda::logit_scale_backward_sums());
  p.grad.data = grad.data;
  p.partial_sums = sums.data();
  cuda::logit_scale_backward(p, nullptr);
  return grad.get();
}

// The gradients of all operands but the logits that have one in the kernels.
void run_other_gradients(const Run& run, Problem p, const Oracle& oracle, const Upstream& upstream) {
  const Case& c = run.c;
  if (c.has_teacher() || c.has_probabilities()) {
    Plane grad(c, 2);
    grad.describe(p.grad);
    cuda::target_backward(p, nullptr);
    compare_gradient(run, grad, oracle.of_target(upstream), "the target's gradient");
  }
  if (c.has_probabilities() && c.weighted) {
    Array grad(c.acc(), c.classes);
    std::vector<double> sums(cuda::weight_backward_sums(p));
    p.grad.data = grad.data;
    p.partial_sums = sums.data();
    cuda::weight_backward(p, nullptr);
    const std::vector<Sum> expected = oracle.of_weight(upstream);
    for (int64_t k = 0; k < c.classes; ++k) {
      compare_sum(run, grad.get(k), expected[k], "the weight's gradient", k);
    }
  }
  if (!c.has_teacher() && c.picks == 0 && c.logit_scale != 1) {
    compare_sum(run, logit_scale_gradient(p, c), oracle.of_logit_scale(upstream), "the scale's gradient");
  }
}

// The logits cross memory once, whatever is asked of them: `times` is 2 where a gradient does not fit beside them. What
// is around a row's vectors may be read again, for its gradient and by each of its blocks, and an ignored row may have
// been read before that shows.
void count_reads(const Inputs& in) {
  const Array& logits = in.logits.array;
  emulator::count_reads_of(logits.data, logits.data + logits.count * Array::size_of(logits.dtype));
}
void expect_reads(const Run& run, const Inputs& in, const cuda::Plan& plan, int times) {
  const Case& c = run.c;
  const int64_t rows = std::count(in.kept.begin(), in.kept.end(), true);
  const int64_t size = Array::size_of(c.dtype), reads = emulator::counted_bytes() / size;
  const int64_t around = 2 * (16 / size - 1) * (plan.blocks + 1);
  if (reads < times * rows * c.classes || reads > c.rows() * (times * c.classes + around)) {
    run.expect(double(reads), double(times * rows * c.classes), 0, 0, "reads of logits");
  }
}

using ChangePlan = std::function<void(cuda::Plan&)>;

cuda::Plan changed(cuda::Plan plan, const ChangePlan& change) {
  if (change) {
    change(plan);
  }
  return plan;
}

// Runs one pass. `change` makes another plan from what the tables would choose.
void run_pass(const Run& run, Inputs& in, const Oracle& oracle, const ChangePlan& change) {
  ++cases;
  const Case& c = run.c;
  Results results(c);
  Plane grad(c, 2);
  Problem p = describe(c, in);
  results.describe(p, c, run.pass);
  if (run.pass == Pass::kForwardGrad) {
    grad.describe(p.grad);
  } else if (run.pass == Pass::kInplace) {
    in.logits.describe(p.grad);
  }
  const cuda::Plan plan = changed(cuda::plan_forward(p, cuda::current_device()), change);
  const bool reads_again = p.grad.data && (plan.kept == 0 || cuda::has_gradient_pass(p, plan));
  count_reads(in);
  cuda::forward(p, plan, nullptr);
  compare_rows(run, results, oracle, in, p);
  expect_reads(run, in, plan, reads_again ? 2 : 1);
  if (run.pass == Pass::kForward) {
    return;
  }
  const Upstream upstream(c, run.pass);
  if (run.pass == Pass::kBackward) {
    upstream.describe(p, c);
    grad.describe(p.grad);
    results.describe_memory(p, c, /*grad=*/false);
    count_reads(in);
    const cuda::Plan backward_plan = changed(cuda::plan_backward(p, cuda::current_device()), change);
    cuda::backward(p, backward_plan, nullptr);
    expect_reads(run, in, backward_plan, 1);
  }
  compare_gradient(run, run.pass == Pass::kInplace ? in.logits : grad, oracle.of_logits(upstream), "the gradient");
  // These choose their plan themselves.
  if (run.pass == Pass::kBackward && !change) {
    run_other_gradients(run, p, oracle, upstream);
  }
}

// Runs passes of one case, of which only the last may overwrite the logits.
void run(const char* group, const Case& c, std::initializer_list<Pass> passes, const ChangePlan& change = {}) {
  Inputs in(c);
  const Oracle oracle(c, in);
  for (const Pass pass : passes) {
    run_pass({group, c, pass}, in, oracle, change);
  }
}

// The options, in lists of cases of one shape and layout.

// The loss of torch: every combination.
std::vector<Case> losses(Case c) {
  std::vector<Case> list;
  for (const TargetType target : {TargetType::kInt64, TargetType::kProbabilities}) {
    for (const double smoothing : {0.0, 0.1}) {
      for (const bool weighted : {false, true}) {
        c.target = target;
        c.smoothing = smoothing;
        c.weighted = weighted;
        c.reduction = "msn"[list.size() % 3];
        c.ignores = c.has_indices();
        c.outputs = list.size() % 2 ? 0 : kLse;
        list.push_back(c);
      }
    }
  }
  return list;
}

// What goes beyond torch. Every kernel has what is plain, an index without options, and what is general, so each option
// meets both kinds of target, and the plain kernel if it can.
std::vector<Case> options(const Case& c) {
  Case plain = c;
  plain.ignores = plain.weighted = plain.row_weighted = true;
  plain.z_loss = 0.02;
  plain.reduction = 'm';
  Case divided = c;
  divided.ignores = divided.row_weighted = divided.on_device = true;
  divided.reduction = 'd';
  Case scaled = c;
  scaled.ignores = true;
  scaled.logit_scale = 0.7;
  scaled.z_loss = 0.01;
  scaled.outputs = kLse;
  scaled.reduction = 's';
  Case capped = plain;
  capped.softcap = 4;
  capped.logit_scale = 1.3;
  capped.on_device = true;
  capped.smoothing = 0.1;
  Case mixed = c;
  mixed.target = TargetType::kProbabilities;
  mixed.weighted = mixed.row_weighted = true;
  mixed.smoothing = 0.2;
  mixed.softcap = 6;
  mixed.z_loss = 0.02;
  mixed.logit_scale = -0.8;
  mixed.reduction = 'm';
  Case mixed_divided = c;
  mixed_divided.target = TargetType::kProbabilities;
  mixed_divided.logit_scale = 1.2;
  mixed_divided.row_weighted = mixed_divided.on_device = true;
  mixed_divided.outputs = kLse;
  mixed_divided.reduction = 'd';
  return {capped, mixed, plain, divided, scaled, mixed_divided};
}

// The outputs besides the loss. Ignored rows are read only for some of them.
std::vector<Case> stats(const Case& c) {
  Case all = c;
  all.ignores = all.has_ties = true;
  all.outputs = kAllOutputs;
  all.reduction = 'm';
  Case transformed = all;
  transformed.logit_scale = -0.7;
  transformed.softcap = 5;
  transformed.smoothing = 0.1;
  transformed.weighted = transformed.row_weighted = true;
  transformed.z_loss = 0.01;
  Case of_targets = all;
  of_targets.outputs = kLogProb | kRank;
  Case entropy = all;
  entropy.outputs = kEntropy;
  Case of_probabilities = transformed;
  of_probabilities.outputs = kEntropy | kArgmax;
  of_probabilities.target = TargetType::kProbabilities;
  of_probabilities.ignores = false;
  Case place = all;
  place.outputs = kArgmax;
  place.ignores_all = true;
  return {all, transformed, of_targets, entropy, of_probabilities, place};
}

std::vector<Case> teachers(Case c) {
  c.target = TargetType::kTeacher;
  Case forward = c;
  forward.reduction = 's';
  Case reverse = c;
  reverse.reverse = reverse.row_weighted = true;
  reverse.teacher_scale = 0.5;
  reverse.logit_scale = 0.5;
  reverse.reduction = 'm';
  Case cross = c;
  cross.kappa = 0;
  cross.row_weighted = true;
  cross.softcap = 5;
  cross.logit_scale = 1.2;
  cross.z_loss = 0.02;
  cross.on_device = true;
  cross.reduction = 'd';
  Case reverse_cross = cross;
  reverse_cross.reverse = true;
  reverse_cross.row_weighted = false;
  reverse_cross.reduction = 'm';
  return {reverse, cross, forward, reverse_cross};
}

std::vector<Case> picks(Case c) {
  c.picks = c.picks > 0 ? c.picks : c.classes * 3 / 4;
  c.row_weighted = true;
  Case dropped = c;
  dropped.z_loss = 0.02;
  dropped.reduction = 's';
  Case spread = c;
  spread.target = TargetType::kInt32;
  spread.spreads = spread.has_repeated_picks = true;
  spread.softcap = 5;
  spread.logit_scale = 1.2;
  spread.z_loss = 0.02;
  spread.reduction = 'm';
  Case cross = c;
  cross.kappa = 0;
  cross.spreads = cross.on_device = true;
  cross.logit_scale = 0.7;
  cross.reduction = 'd';
  Case repeated = c;
  repeated.target = TargetType::kInt32;
  repeated.kappa = 0;
  repeated.has_repeated_picks = true;
  repeated.row_weighted = false;
  return {spread, dropped, repeated, cross};
}

// A shard has no reduction. Ignored rows are read only for the log-sum-exp.
std::vector<Case> shards(Case c, int64_t number) {
  c.shards = number;
  c.ignores = true;
  Case plain = c;
  plain.z_loss = 0.02;
  Case smoothed = c;
  smoothed.target = TargetType::kInt32;
  smoothed.smoothing = 0.1;
  smoothed.weighted = true;
  smoothed.softcap = 5;
  smoothed.logit_scale = 1.2;
  smoothed.outputs = kLse;
  Case mixed = c;
  mixed.target = TargetType::kProbabilities;
  mixed.ignores = false;
  mixed.weighted = true;
  mixed.smoothing = 0.2;
  mixed.logit_scale = -0.8;
  mixed.z_loss = 0.02;
  Case bad = c;
  bad.has_bad_target = true;
  return {smoothed, plain, mixed, bad};
}

void run_all(const char* group, const std::vector<Case>& list, const ChangePlan& change = {}) {
  for (const Case& c : list) {
    if (c.wants_stats()) {  // they come with no gradient in the forward pass
      run(group, c, {Pass::kBackward}, change);
    } else {
      run(group, c, {Pass::kForwardGrad, Pass::kBackward, Pass::kInplace}, change);
    }
  }
}

// The same plan with one tile of rows at a time.
ChangePlan in_turn(const ChangePlan& change = {}) {
  return [change](cuda::Plan& plan) {
    if (change) {
      change(plan);
    }
    plan.tiles = 1;
  };
}

// The first cases of a list, where they have to do.
std::vector<Case> first(size_t count, std::vector<Case> list) {
  list.resize(std::min(count, list.size()), Case());
  return list;
}

// Those that a group asks for, unless KERNELS_TEST_DTYPE keeps to one.
std::vector<DType> these_or_one(std::vector<DType> dtypes) {
  const char* const only = std::getenv("KERNELS_TEST_DTYPE");
  return only ? std::vector<DType>{static_cast<DType>(std::atoi(only))} : dtypes;
}
const std::vector<DType> kAllDTypes = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
const std::vector<DType> kTwoDTypes = {DType::kFloat32, DType::kBFloat16};

// Rows next to each other or not, classes apart, classes across rows, classes that do not count.
std::vector<Case> layouts(DType dtype) {
  Case contiguous;
  contiguous.dtype = dtype;
  contiguous.outer = 9;
  contiguous.classes = 45;
  Case misaligned = contiguous;
  misaligned.gap = 3;
  misaligned.offset = 1;
  misaligned.companions_lie_otherwise = true;
  Case stepped = contiguous;
  stepped.class_step = 2;
  Case columns = contiguous;
  columns.outer = 1;
  columns.inner = 70;
  columns.inner_is_last = true;
  Case segmentation = columns;
  segmentation.outer = 2;
  segmentation.inner = 37;
  segmentation.classes = 21;
  Case classes_last = segmentation;
  classes_last.inner_is_last = false;
  Case apart = segmentation;
  apart.gap = 2;
  apart.companions_lie_otherwise = true;
  Case padded = contiguous;
  padded.padding = 19;
  Case padded_columns = segmentation;
  padded_columns.padding = 3;
  return {contiguous, misaligned, stepped, columns, segmentation, classes_last, apart, padded, padded_columns};
}

// Of a row whose classes lie next to each other.
int pieces(const Case& c) {
  return static_cast<int>(c.classes * Array::size_of(c.dtype) / 16);
}

// Every way to share rows: parts of a warp, warps, a block, clusters, blocks without a cluster; with the row kept and
// read again.
void for_each_sharing(DType dtype, const std::function<void(const Case&, const ChangePlan&)>& f) {
  for (const bool keeps : {true, false}) {
    for (const int lanes : {1, 2, 8, 32, 64, 256}) {
      Case c;
      c.dtype = dtype;
      c.outer = 5;
      c.classes = lanes < 32 ? 123 : 1234;
      c.offset = 1;
      f(c, [&](cuda::Plan& plan) {
        plan.threads = std::max(64, lanes);
        plan.lanes = lanes;
        plan.blocks = 1;
        plan.cluster = false;
        plan.kept = keeps ? pieces(c) / lanes + 1 : 0;
      });
    }
    for (const int blocks : {2, 4, 8, 16}) {
      for (const bool cluster : {true, false}) {
        if (keeps && !cluster) {
          continue;
        }
        Case c;
        c.dtype = dtype;
        c.outer = 3;
        c.classes = 4321;
        c.gap = 1;
        f(c, [&](cuda::Plan& plan) {
          plan.threads = plan.lanes = 64;
          plan.blocks = blocks;
          plan.cluster = cluster;
          plan.kept = keeps ? pieces(c) / 64 / blocks + 1 : 0;
        });
      }
    }
  }
  for (const int lanes : {1, 2, 8, 64}) {
    for (const bool keeps : {true, false}) {
      Case c;
      c.dtype = dtype;
      c.inner = 77;
      c.inner_is_last = true;
      c.classes = 67;
      f(c, [&](cuda::Plan& plan) {
        plan.threads = 64;
        plan.lanes = lanes;
        plan.blocks = 1;
        plan.kept = keeps ? 67 / lanes + 1 : 0;
      });
    }
  }
  Case c;
  c.dtype = dtype;
  c.inner = 3;
  c.inner_is_last = true;
  c.classes = 301;
  f(c, [](cuda::Plan& plan) {
    plan.threads = plan.lanes = 32;
    plan.blocks = 4;
    plan.kept = 0;
  });
}

// Every length around a vector of 2 to 8 elements and around a warp's share of them, at every misalignment.
void for_each_tail(DType dtype, const std::function<void(int64_t length, int64_t offset)>& f) {
  const int64_t vector = 16 / Array::size_of(dtype);
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 4 * vector + 1; ++n) {
    lengths.push_back(n);
  }
  for (const int64_t pieces : {32, 128, 256, 1024}) {
    for (int64_t n = pieces * vector - 1; n <= pieces * vector + 1; ++n) {
      lengths.push_back(n);
    }
  }
  for (const int64_t length : lengths) {
    for (int64_t offset = 0; offset < vector; offset += length > 300 ? 3 : 1) {
      f(length, offset);
    }
  }
}

void run_tails(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for_each_tail(dtype, [&](int64_t classes, int64_t offset) {
      Case c;
      c.dtype = dtype;
      c.outer = 3;
      c.classes = classes;
      c.offset = offset;
      c.gap = offset % 3;
      c.reduction = "msn"[offset % 3];
      c.smoothing = offset % 2 ? 0.1 : 0;
      run_all(group, {c});
      if (c.smoothing == 0) {
        c.ignores_runs = true;
        run(group, c, {Pass::kForwardGrad, Pass::kInplace}, in_turn());
      }
    });
  }
}

// Every option of torch in every layout, and rows in turn.
void run_layouts(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for (const Case& c : layouts(dtype)) {
      run_all(group, losses(c));
      for (const Case& plain : first(2, losses(c))) {
        run(group, plain, {Pass::kForwardGrad, Pass::kInplace}, in_turn());
      }
    }
  }
}

void run_regimes(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for_each_sharing(dtype, [&](const Case& c, const ChangePlan& change) {
      run_all(group, losses(c), change);
      for (const Case& plain : first(2, losses(c))) {
        run(group, plain, {Pass::kForwardGrad, Pass::kInplace}, in_turn(change));
      }
    });
  }
}

// The ways to share rows in short, for builds in which a launch takes long, with all kinds of states that threads
// share; with blocks that take one row after another.
void run_sharing(const char* group) {
  const auto run_short = [&](Case c, const cuda::Plan& chosen, bool keeps) {
    c.dtype = these_or_one({DType::kBFloat16})[0];
    Case plain = c;
    plain.ignores = true;
    plain.reduction = 'm';
    Case smoothed = plain;
    smoothed.weighted = true;
    smoothed.smoothing = 0.1;
    smoothed.reduction = 'n';
    const auto change = [&](cuda::Plan& plan) {
      plan = chosen;
      plan.tiles = 1;
      plan.kept = keeps ? (c.inner_is_last ? static_cast<int>(c.classes) : pieces(c)) / plan.lanes + 1 : 0;
    };
    run_all(group, {plain, smoothed, stats(c)[1], teachers(c)[0]}, change);
    Case in_turns = c;
    (c.inner_is_last ? in_turns.inner : in_turns.outer) += 2 * chosen.rows();
    in_turns.ignores_runs = in_turns.weighted = in_turns.row_weighted = true;
    in_turns.reduction = 'm';
    for (const bool reads_all : {false, true}) {
      run(group, in_turns, {Pass::kForwardGrad, Pass::kInplace}, [&](cuda::Plan& plan) {
        in_turn(change)(plan);
        plan.reads_all = reads_all;
      });
    }
  };
  for (const bool keeps : {true, false}) {
    for (const int lanes : {1, 8, 32, 64, 256}) {
      cuda::Plan plan;
      plan.threads = std::max(64, lanes);
      plan.lanes = lanes;
      Case along;
      along.outer = 2 * plan.rows() + 1;
      along.classes = 10 * lanes + 3;
      along.offset = 1;
      run_short(along, plan, keeps);
      Case across;
      across.inner = along.outer;
      across.classes = 3 * lanes + 2;
      across.inner_is_last = true;
      run_short(across, plan, keeps);
    }
    for (const int blocks : {2, 4, 8}) {
      for (const bool cluster : {true, false}) {
        if (keeps && !cluster) {
          continue;
        }
        cuda::Plan plan;
        plan.threads = plan.lanes = 64;
        plan.blocks = blocks;
        plan.cluster = cluster;
        Case c;
        c.outer = 3;
        c.classes = 1201 * blocks;
        run_short(c, plan, keeps);
      }
    }
  }
}

// What the tables choose by themselves on a large chip, a small one without clusters, and small ones with clusters, of
// which one has to take rows in turn.
void run_tables(const char* group) {
  const emulator::Properties before = emulator::properties();
  for (const emulator::Properties& chip : {emulator::Properties{132, 232448, 16}, emulator::Properties{4, 101376, 1},
                                           emulator::Properties{16, 101376, 8}, emulator::Properties{2, 101376, 8}}) {
    emulator::properties() = chip;
    for (const DType dtype : these_or_one(kTwoDTypes)) {
      for (const int64_t classes : {10, 300, 1000, 2048, 5000, 20000, 70000}) {
        for (const int64_t rows : {1, 3, 40}) {
          if (rows * classes > 300000) {
            continue;
          }
          Case c;
          c.dtype = dtype;
          c.outer = rows;
          c.classes = classes;
          c.reduction = 'm';
          run_all(group, {c});
          Case across = c;
          across.inner = rows;
          across.outer = 1;
          across.inner_is_last = true;
          if (classes <= 5000) {
            run_all(group, {across});
          }
        }
      }
    }
  }
  emulator::properties() = before;
}

// Infinities, NaN, logits far from 0, all kinds of targets, and targets out of bounds.
void run_special(const char* group) {
  for (const DType dtype : these_or_one({DType::kFloat32, DType::kFloat64, DType::kBFloat16})) {
    for (const int64_t classes : {7, 300, 3000}) {
      Case c;
      c.dtype = dtype;
      c.outer = 12;
      c.classes = classes;
      c.has_special_rows = true;
      Case across = c;
      across.inner = 12;
      across.outer = 1;
      across.inner_is_last = true;
      run_all(group, {c, across});
      run(group, c, {Pass::kForwardGrad, Pass::kInplace}, in_turn());
      for (const TargetType target : {TargetType::kInt64, TargetType::kInt32, TargetType::kUInt8}) {
        Case t;
        t.dtype = dtype;
        t.outer = 10;
        t.classes = target == TargetType::kUInt8 ? std::min<int64_t>(classes, 200) : classes;
        t.target = target;
        t.ignores = true;
        t.has_bad_target = target != TargetType::kUInt8;
        t.reduction = "msn"[classes % 3];
        t.smoothing = classes == 300 ? 0.1 : 0;
        run_all(group, {t});
        run(group, t, {Pass::kForwardGrad, Pass::kInplace}, in_turn());
      }
    }
  }
}

// Sums over more tiles than may leave theirs; over as many rows as a block takes, over more, over
// more than a block takes, and a cluster, on chips with and without clusters. Each thread takes a row of its own where
// there are many: the sums are what counts. Then as many rows that blocks share without a cluster as the workspace has
// room for, in the widest type.
void run_many_rows(const char* group) {
  Case tiles;
  tiles.dtype = these_or_one({DType::kFloat32})[0];
  tiles.outer = 30000;
  tiles.classes = 3;
  tiles.reduction = 's';
  run(group, tiles, {Pass::kForward}, [](cuda::Plan& plan) { plan.threads = plan.lanes = 32; });
  const emulator::Properties before = emulator::properties();
  for (const int max_cluster : {16, 1}) {
    emulator::properties().max_cluster = max_cluster;
    for (const int64_t rows : {2048, 2049, 32768, 140001}) {
      if (rows == 140001 && max_cluster == 1) {
        continue;  // too many for a cluster anyway
      }
      const ChangePlan one_lane = [](cuda::Plan& plan) { plan.lanes = 1; };
      const ChangePlan change = rows > 2049 ? one_lane : ChangePlan();
      Case c;
      c.dtype = these_or_one({DType::kFloat32})[0];
      c.outer = rows;
      c.classes = 3;
      c.ignores = true;
      c.weighted = true;
      c.has_wide_total = true;
      for (const char reduction : {'s', 'm'}) {
        c.reduction = reduction;
        run(group, c, {Pass::kForward, Pass::kForwardGrad}, change);
      }
      Case by_rows = c;
      by_rows.row_weighted = true;
      run(group, by_rows, {Pass::kForwardGrad}, change);
      if (rows <= 2049) {
        run(group, by_rows, {Pass::kForward, Pass::kForwardGrad}, in_turn());
      }
      run(group, teachers(by_rows)[0], {Pass::kForward}, change);
    }
  }
  emulator::properties() = before;
  Case c;
  c.dtype = these_or_one({DType::kFloat64})[0];
  c.outer = 2048;
  c.classes = 40;
  c.ignores = c.row_weighted = true;
  const ChangePlan two_blocks = [](cuda::Plan& plan) {
    plan.threads = plan.lanes = 32;
    plan.blocks = 2;
    plan.kept = 0;
  };
  run(group, c, {Pass::kForwardGrad}, two_blocks);
  run(group, stats(c)[0], {Pass::kForward}, two_blocks);
  run(group, teachers(c)[0], {Pass::kForwardGrad}, two_blocks);
}

// The options beyond torch: in every layout, in every way to share rows, in rows with infinities, and where no row is
// left to divide by.
void run_options(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for (const Case& c : layouts(dtype)) {
      run_all(group, options(c));
      for (const Case& plain : {options(c)[2], options(c)[3]}) {
        run(group, plain, {Pass::kForwardGrad, Pass::kInplace}, in_turn());
      }
    }
  }
  for (const DType dtype : these_or_one(kTwoDTypes)) {
    for_each_sharing(dtype,
                     [&](const Case& c, const ChangePlan& change) { run_all(group, first(2, options(c)), change); });
    for (const int64_t classes : {7, 3000}) {
      Case c;
      c.dtype = dtype;
      c.outer = 12;
      c.classes = classes;
      c.has_special_rows = true;
      c.z_loss = 0.01;
      Case scaled = c;
      scaled.on_device = true;  // by a power of two, which rounds no logit far from 0
      Case capped = c;
      capped.softcap = 5;
      run_all(group, {c, scaled, capped});
    }
    for (const bool zero_if_empty : {false, true}) {
      Case c;
      c.dtype = dtype;
      c.outer = 5;
      c.classes = 20;
      c.ignores_all = true;
      c.zero_if_empty = zero_if_empty;
      c.reduction = 'm';
      run_all(group, {c});
    }
  }
}

// The gradients of operands other than the logits, of sizes that the groups above do not have: rows that blocks share,
// more classes than a block takes and more rows than there are parts of, more blocks than may leave a part of a sum.
void run_gradients(const char* group) {
  for (const DType dtype : these_or_one(kTwoDTypes)) {
    Case long_rows;
    long_rows.dtype = dtype;
    long_rows.outer = 3;
    long_rows.classes = 40000;
    Case parts = long_rows;
    parts.outer = 70;
    parts.classes = 600;
    for (const Case& c : {long_rows, parts}) {
      for (const Case& with_options : first(2, options(c))) {
        run(group, with_options, {Pass::kBackward});
      }
      run(group, teachers(c)[0], {Pass::kBackward});
    }
    Case blocks = options(long_rows)[0];
    blocks.outer = 8 * 1024 + 50;
    blocks.classes = 3;
    blocks.class_step = 2;
    run(group, blocks, {Pass::kBackward});
  }
}

// The outputs besides the loss, with equal logits in all parts of a row.
void run_stats(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for (const Case& c : layouts(dtype)) {
      run_all(group, stats(c));
    }
  }
  for (const DType dtype : these_or_one(kTwoDTypes)) {
    for_each_sharing(dtype,
                     [&](const Case& c, const ChangePlan& change) { run_all(group, first(2, stats(c)), change); });
    for (const int64_t classes : {7, 300, 3000}) {
      Case c;
      c.dtype = dtype;
      c.outer = 12;
      c.classes = classes;
      c.has_special_rows = true;
      c.outputs = kAllOutputs;
      Case reversed = c;
      reversed.logit_scale = -0.5;
      Case bad = stats(c)[0];
      bad.has_special_rows = false;
      bad.has_bad_target = true;
      run_all(group, {c, reversed, bad});
    }
  }
}

// Divergences from a teacher, also one that lies otherwise than the logits at every length around a vector.
void run_teacher(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for (const Case& c : layouts(dtype)) {
      run_all(group, teachers(c));
    }
    const int64_t vector = 16 / Array::size_of(dtype);
    for (int64_t classes = 1; classes <= 3 * vector + 1; ++classes) {
      for (int64_t offset = 0; offset < vector; ++offset) {
        Case c;
        c.dtype = dtype;
        c.outer = 3;
        c.classes = classes;
        c.offset = offset;
        c.gap = offset % 3;
        c.companions_lie_otherwise = classes % 2 == 1;
        run_all(group, {teachers(c)[offset % 2]});
      }
    }
  }
  for (const DType dtype : these_or_one(kTwoDTypes)) {
    for_each_sharing(dtype,
                     [&](const Case& c, const ChangePlan& change) { run_all(group, first(2, teachers(c)), change); });
    for (const int64_t classes : {7, 300, 3000}) {
      for (const bool reverse : {false, true}) {
        Case c;
        c.dtype = dtype;
        c.target = TargetType::kTeacher;
        c.outer = 18;
        c.classes = classes;
        c.has_special_rows = true;
        c.reverse = reverse;
        Case across = c;
        across.inner = 18;
        across.outer = 1;
        across.inner_is_last = true;
        across.kappa = 0;
        run_all(group, {c, across});
      }
    }
  }
}

// Targets that pick some classes or all of them, fewer than a warp has lanes and more.
void run_picks(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for (const Case& c : layouts(dtype)) {
      run_all(group, picks(c));
    }
    for (const int64_t number : {1, 2, 31, 33, 300, 301}) {
      Case c;
      c.dtype = dtype;
      c.outer = 6;
      c.classes = 301;
      c.picks = number;
      c.has_bad_target = number == 31;
      run_all(group, picks(c));
    }
  }
  for (const DType dtype : these_or_one(kTwoDTypes)) {
    for_each_sharing(
        dtype, [&](const Case& c, const ChangePlan& change) { run(group, picks(c)[0], {Pass::kForwardGrad}, change); });
    for (const int64_t classes : {7, 300, 3000}) {
      Case c;
      c.dtype = dtype;
      c.outer = 12;
      c.classes = classes;
      c.has_special_rows = true;
      run_all(group, first(3, picks(c)));  // the scale of the last rounds logits far from 0
    }
  }
}

// A shard of a case's classes, as a case of its own whose logits and probabilities are copies.
struct Shard {
  Case c;
  int64_t first, all;
  Plane logits, target, grad;

  Shard(const Case& whole, const Inputs& in, int64_t number)
      : c(whole_to_shard(whole, number)),
        first(first_of(whole, number)),
        all(whole.classes),
        logits(c, 0),
        target(c, 1),
        grad(c, 2) {
    for (int64_t row = 0; row < c.rows(); ++row) {
      for (int64_t k = 0; k < c.classes; ++k) {
        logits.set(row, k, in.logits.get(row, first + k));
        target.set(row, k, in.target.get(row, first + k));
      }
    }
  }

  Problem describe(Inputs& in) {
    Problem p = ::describe(c, in);
    p.first_class = first;
    p.all_classes = all;
    logits.describe(p.logits);
    if (c.has_probabilities()) {
      target.describe(p.target);
    }
    p.weight = c.weighted ? in.weight.data + first * Array::size_of(c.acc()) : nullptr;
    return p;
  }

 private:
  // Of different sizes.
  static int64_t first_of(const Case& whole, int64_t number) {
    return whole.classes * number * number / (whole.shards * whole.shards);
  }
  static Case whole_to_shard(Case whole, int64_t number) {
    whole.classes = first_of(whole, number + 1) - first_of(whole, number);
    return whole;
  }
};

// Runs the shards of a case one by one, and merges what they leave. `change` is of their plans.
void run_sharded(const char* group, const Case& c, const ChangePlan& change = {}) {
  ++cases;
  Inputs in(c);
  const Oracle oracle(c, in);
  const Run run{group, c, Pass::kBackward};
  Results results(c);
  const auto describe_shard = [&](Shard& shard) {
    Problem p = shard.describe(in);
    results.describe(p, shard.c, run.pass);
    return p;
  };
  Array states(c.acc(), c.shards * 4 * c.rows()), coefficients(c.acc(), c.rows());
  std::vector<Shard> shards;
  char* state = states.data;
  for (int64_t number = 0; number < c.shards; ++number) {
    shards.emplace_back(c, in, number);
    Problem p = describe_shard(shards.back());
    for (void** const of_rows : {&p.max, &p.sum, &p.linear, &p.coefficients}) {
      *of_rows = state;
      state += c.rows() * Array::size_of(c.acc());
    }
    cuda::forward(p, changed(cuda::plan_forward(p, cuda::current_device()), change), nullptr);
  }
  const bool is_double = c.acc() == DType::kFloat64;
  cuda::merge_shards({is_double, c.rows(), c.shards, c.z_loss, states.data, results.loss.data, results.max.data,
                      results.sum.data, coefficients.data},
                     nullptr);
  for (int64_t row = 0; row < c.rows(); ++row) {
    if (!in.kept[row]) {  // whose loss is the caller's affair
      results.loss.set(results.strides.at(row), 0);
    }
  }
  Problem whole;
  whole.max = results.max.data;
  whole.sum = results.sum.data;
  compare_rows(run, results, oracle, in, whole);

  const Upstream upstream(c, run.pass);
  const Gradient of_logits = oracle.of_logits(upstream), of_target = oracle.of_target(upstream);
  double of_scale = 0;
  for (Shard& shard : shards) {
    Problem p = describe_shard(shard);
    p.coefficients = coefficients.data;
    upstream.describe(p, c);
    shard.grad.describe(p.grad);
    const Run of_shard{group, shard.c, run.pass};
    cuda::backward(p, changed(cuda::plan_backward(p, cuda::current_device()), change), nullptr);
    compare_gradient(of_shard, shard.grad, of_logits, "the gradient", shard.first);
    if (c.has_probabilities()) {
      cuda::target_backward(p, nullptr);
      compare_gradient(of_shard, shard.grad, of_target, "the target's gradient", shard.first);
    }
    of_scale += logit_scale_gradient(p, c);
  }
  compare_sum(run, of_scale, oracle.of_logit_scale(upstream), "the scale's gradient");
}

// Classes in two and three shards, in every layout and way to share rows, and more rows than a block merges.
void run_shards(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for (const Case& c : layouts(dtype)) {
      for (const int64_t number : {2, 3}) {
        for (const Case& sharded : shards(c, number)) {
          run_sharded(group, sharded);
        }
      }
    }
  }
  for (const DType dtype : these_or_one(kTwoDTypes)) {
    for_each_sharing(dtype,
                     [&](const Case& c, const ChangePlan& change) { run_sharded(group, shards(c, 2)[0], change); });
    Case c;
    c.dtype = dtype;
    c.outer = 300;
    c.classes = 20;
    run_sharded(group, shards(c, 3)[0]);
  }
}

// Losses of indices that leave no class but the target's with a coefficient.
std::vector<Case> plain_losses(const Case& c) {
  Case summed = c;
  summed.reduction = 's';
  summed.ignores_runs = true;
  const Case weighted = options(c)[2];
  Case divided = c;
  divided.ignores = divided.row_weighted = true;
  divided.outputs = kLse;
  divided.reduction = 'd';
  Case bad = c;
  bad.target = TargetType::kInt32;
  bad.ignores = bad.has_bad_target = true;
  return {summed, weighted, divided, bad};
}

// Neighbouring rows that a thread takes together, with a check that it does.
struct Bundles {
  int size;
  Case c;

  explicit Bundles(DType dtype) : size(16 / Array::size_of(dtype)) {
    c.dtype = dtype;
    c.inner_is_last = true;
    c.inner = 5 * size;
    c.classes = 21;
  }
  ChangePlan are(bool taken, const ChangePlan& change = {}) const {
    return [=](cuda::Plan& plan) {
      const int expected = taken ? size : 1;
      if (plan.bundle != expected) {
        ++failures;
        std::printf("bundles are of %d rows, not %d\n", plan.bundle, expected);
      }
      if (change) {
        change(plan);
      }
    };
  }
};
const std::vector<DType> kBundledDTypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// Lines of one bundle, of several, of more than a block takes; as many classes as are kept, or summed together, fewer
// and more, read before the target or after; rows that cannot be taken so, each for another reason.
void run_bundles(const char* group) {
  for (const DType dtype : these_or_one(kBundledDTypes)) {
    const Bundles bundles(dtype);
    for (const int64_t line : {1, 5, 131}) {
      for (const int64_t classes : {1, 2, 7, 8, 9, 21, 32, 33}) {
        Case c = bundles.c;
        c.outer = line > 5 ? 1 : 3;
        c.inner = line * bundles.size;
        c.classes = classes;
        c.gap = classes % 2 * bundles.size;
        run_all(group, first(line > 5 ? 1 : 4, plain_losses(c)), bundles.are(true));
      }
    }
    Case c = bundles.c;
    c.inner = 3 * bundles.size;
    for (const int64_t classes : {511, 512, 513, 3001, 5000}) {
      c.classes = classes;
      run_all(group, first(classes > 512 ? 2 : 1, plain_losses(c)), bundles.are(true));
    }
    c.has_special_rows = true;
    for (const int64_t classes : {7, 300, 3000, 5000}) {
      c.classes = classes;
      Case ignoring = c;
      ignoring.ignores_runs = true;
      run_all(group, {c, ignoring}, bundles.are(true));
    }
    run_sharded(group, shards(bundles.c, 3)[1]);
    Case odd_line = bundles.c, misaligned = bundles.c, odd_gap = bundles.c, otherwise = bundles.c;
    odd_line.inner += bundles.size / 2;
    odd_line.gap = bundles.size / 2;
    misaligned.offset = bundles.size / 2;
    odd_gap.gap = 1;
    otherwise.companions_lie_otherwise = true;
    run_all(group, {odd_line, misaligned, odd_gap, losses(bundles.c)[2], stats(bundles.c)[0]}, bundles.are(false));
    run(group, otherwise, {Pass::kForwardGrad, Pass::kBackward});
  }
  for (const int64_t inner : {8, 15}) {
    Case c = Bundles(these_or_one({DType::kFloat64})[0]).c;
    c.inner = inner;
    run_all(group, plain_losses(c));
  }
}

// Each way to share a bundle, and blocks that take one tile of them after another.
void run_shared_bundles(const char* group) {
  for (const DType dtype : these_or_one(kBundledDTypes)) {
    const Bundles bundles(dtype);
    for (const int lanes : {1, 8, 128}) {
      for (const bool keeps : {true, false}) {
        Case c = bundles.c;
        c.classes = 67;
        c.inner = (256 / lanes + 1) * bundles.size;
        const ChangePlan change = bundles.are(true, [=](cuda::Plan& plan) {
          plan.lanes = lanes;
          plan.kept = keeps ? 67 / lanes + 1 : 0;
        });
        run_all(group, first(2, plain_losses(c)), change);
        for (const bool reads_all : {true, false}) {
          run(group, plain_losses(c)[reads_all], {Pass::kForwardGrad, Pass::kBackward, Pass::kInplace},
              [=](cuda::Plan& plan) {
                in_turn(change)(plan);
                plan.reads_all = reads_all;
              });
        }
      }
    }
    for (const int blocks : {2, 4}) {
      Case c = bundles.c;
      c.classes = 301;
      run_all(group, plain_losses(c), bundles.are(true, [=](cuda::Plan& plan) {
        plan.lanes = 32;
        plan.blocks = blocks;
        plan.kept = 0;
      }));
    }
  }
}

// Memory of which only what is touched exists.
class SparseMemory {
 public:
  explicit SparseMemory(size_t bytes, int protection = PROT_READ | PROT_WRITE)
      : bytes_(bytes), data_(mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (data_ == MAP_FAILED) {
      std::perror("mmap");
      std::exit(1);
    }
  }
  SparseMemory(const SparseMemory&) = delete;
  ~SparseMemory() { munmap(data_, bytes_); }
  void* data() const { return data_; }

 private:
  size_t bytes_;
  void* data_;
};

// Multiplies elements by a factor.
void run_scaling(const char* group, DType dtype, int64_t count, int64_t offset, double factor, DType factor_type) {
  ++cases;
  Case c;
  c.dtype = dtype;
  c.classes = count;
  c.offset = offset;
  const Run run{group, c, Pass::kBackward};
  Plane elements(c, 0);
  Array scalar(factor_type);
  scalar.set(0, factor);
  Gradient expected(1, count);
  Random random;
  for (int64_t i = 0; i < count; ++i) {
    elements.set(0, i, random.normal());
    expected.values(0, i) = elements.get(0, i) * scalar.get();
  }
  cuda::scale(dtype, elements.array.data, count, scalar.data, factor_type, nullptr);
  compare_gradient(run, elements, expected, "the product");
}

// Factors of every type, among them 1, which leaves the elements untouched. Then more than all blocks take in one turn.
void run_scale(const char* group) {
  for (const DType dtype : these_or_one(kAllDTypes)) {
    for_each_tail(dtype, [&](int64_t count, int64_t offset) {
      run_scaling(group, dtype, count, offset, 1.0 / 3, kAllDTypes[count % 4]);
    });
    const int64_t count = 1000, pieces = 1 << 18;
    const SparseMemory untouchable(count * Array::size_of(dtype), PROT_NONE);
    for (const DType factor_type : kAllDTypes) {
      for (const double factor : {0.0, -2.5}) {
        run_scaling(group, dtype, count, 1, factor, factor_type);
      }
      Array one(factor_type);
      one.set(0, 1);
      cuda::scale(dtype, untouchable.data(), count, one.data, factor_type, nullptr);
      ++cases;
    }
    run_scaling(group, dtype, (pieces + 5) * 16 / Array::size_of(dtype), 1, 0.5, dtype);
  }
}

// Compares with the same elements next to each other: every bit has to be the same. The rows lie on a grid, along whose
// first dimension they may be far apart, and have two neighbours along each other one.
template <typename T>
void compare_far(const char* group, DType dtype, bool across, int dims) {
  constexpr int64_t kFar = (int64_t{1} << 31) + 8;
  const int64_t outer = across ? 72 : 3, inner = int64_t{1} << (dims - 1);
  const int64_t rows = outer * inner, classes = across ? 3 : 600;
  std::vector<double> results[2];
  for (const bool far : {false, true}) {
    const int64_t apart = far ? kFar : across ? rows : inner * classes;
    const SparseMemory logits(3 * apart * sizeof(T)), grad(3 * apart * sizeof(T));
    std::vector<Acc<T>> loss(rows);
    std::vector<char> workspace(cuda::workspace_size({}));
    std::vector<int64_t> target(rows, 2);
    const auto element = [&](const SparseMemory& memory, int64_t i) -> T& {
      const int64_t row = i / classes, k = i % classes;
      return static_cast<T*>(memory.data())[across ? k * apart + row : row / inner * apart + row % inner * classes + k];
    };
    Random random;
    for (int64_t i = 0; i < rows * classes; ++i) {
      cuda::from_accumulator(static_cast<Acc<T>>(random.normal()), element(logits, i));
    }
    Problem p;
    p.dtype = dtype;
    p.rows = rows;
    p.classes = classes;
    p.dims = dims;
    p.logits.data = logits.data();
    p.grad.data = grad.data();
    p.logits.class_stride = p.grad.class_stride = across ? apart : 1;
    p.target.data = target.data();
    for (int d = 0; d < dims; ++d) {
      p.sizes[d] = d == 0 ? outer : 2;
      p.dividers[d] = Divider(p.sizes[d]);
      p.target.strides[d] = p.row_strides[d] = inner >> d;
      p.logits.strides[d] = p.grad.strides[d] = across ? inner >> d : d == 0 ? apart : (inner >> d) * classes;
    }
    p.loss = loss.data();
    p.workspace = workspace.data();
    cuda::forward(p, nullptr);
    results[far].assign(loss.begin(), loss.end());
    for (int64_t i = 0; i < rows * classes; ++i) {
      results[far].push_back(cuda::to_accumulator(element(grad, i)));
    }
  }
  ++cases;
  if (results[0] != results[1]) {
    ++failures;
    std::printf("%s: %s apart on a grid of %d dimensions differ from neighbours\n", group, across ? "classes" : "rows",
                dims);
  }
}

// Rows, and then classes, that lie further apart than 32 bits count.
void run_far(const char* group) {
  for (const DType dtype : these_or_one({DType::kFloat32})) {
    for (const bool across : {false, true}) {
      for (const int dims : {1, 2, 3}) {
        dispatch(dtype, [&](auto element) { compare_far<decltype(element)>(group, dtype, across, dims); });
      }
    }
  }
}

struct Group {
  const char* name;
  void (*run)(const char* group);
};

const Group kGroups[] = {{"tails", run_tails},         {"layouts", run_layouts},
                         {"regimes", run_regimes},     {"sharing", run_sharing},
                         {"tables", run_tables},       {"special", run_special},
                         {"options", run_options},     {"gradients", run_gradients},
                         {"stats", run_stats},         {"teacher", run_teacher},
                         {"many rows", run_many_rows}, {"far", run_far},
                         {"picks", run_picks},         {"shards", run_shards},
                         {"bundles", run_bundles},     {"shared bundles", run_shared_bundles},
                         {"scale", run_scale}};

}  // namespace

// Picks of one class all write to its place: first their numbers, of which any may stay, and then the same gradient.
extern "C" const char* __tsan_default_suppressions() {
  return "race:write_rows\n";
}

int main(int argc, char** argv) {
  for (const Group& group : kGroups) {
    bool asked = argc == 1;
    for (int i = 1; i < argc; ++i) {
      asked |= std::string(argv[i]) == group.name;
    }
    if (asked) {
      const int before = cases;
      group.run(group.name);
      std::printf("%s: %d cases\n", group.name, cases - before);
    }
  }
  std::printf("%d of %d cases failed\n", failures, cases);
  return failures > 0;
}
