// A case of the kernels' tests: what a problem is, and where a result of it differs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#include "../../../csrc/cuda/launch.cuh"

namespace ce::test {

inline constexpr double kInf = std::numeric_limits<double>::infinity();

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
inline std::string text_of(const Case& c) {
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

inline int failures = 0, cases = 0;

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

inline double epsilon_of(DType dtype) {
  return dtype == DType::kFloat64    ? 1e-13
         : dtype == DType::kFloat16  ? 0x1p-10
         : dtype == DType::kBFloat16 ? 0x1p-7
                                     : 2e-6;
}

// What a result in the accumulator's type may be off, relative to the size of what it is made from. A softcap's tanh
// has fewer digits, and a scaled logit is rounded.
inline double epsilon_of(const Case& c) {
  return epsilon_of(c.acc()) * (c.transforms() ? 4 : 1);
}

}  // namespace ce::test
