// Runs the CUDA kernels on the CPU against an oracle in float64, which is written from the formulas of row_loss.h but
// shares no code with it. Prints what differs, and how many cases ran.
//
// Usage: kernels_test [group ...], without arguments all groups. KERNELS_TEST_DTYPE=0 to 3 keeps to one dtype.

#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"

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

struct Case {
  DType dtype = DType::kFloat32;
  TargetType target = TargetType::kInt64;
  int64_t outer = 1, inner = 1;  // rows are (outer, inner) of (outer, classes, inner)
  int64_t classes = 1;
  bool inner_is_last = false;  // the layout (outer, classes, inner), where inner > 1 or classes are columns
  int64_t class_step = 1;      // elements between neighbouring classes, where they are the last dimension
  int64_t gap = 0;             // elements between rows
  int64_t offset = 0;          // of the first element from an aligned address
  bool weighted = false;
  double smoothing = 0;
  char reduction = 'n';  // none, sum, mean
  bool ignores = false, has_bad_target = false, wants_lse = false, has_special_rows = false;
  bool companions_lie_otherwise = false;  // gradient and probabilities do not share the logits' alignment
};

// Memory of exactly the elements of an operand, so that AddressSanitizer sees each access outside.
struct Array {
  DType dtype;
  int64_t count, offset;
  std::unique_ptr<char[]> memory;
  char* data;

  static int64_t size_of(DType dtype) {
    return dispatch(dtype, [](auto element) -> int64_t { return sizeof(element); });
  }
  Array(DType dtype, int64_t count, int64_t offset = 0)
      : dtype(dtype), count(count), offset(offset), memory(new char[16 + (count + offset) * size_of(dtype)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    data = memory.get() + (16 - address % 16) % 16 + offset * size_of(dtype);
    // The allocation begins where the data does not need to: move it to the end.
    data = memory.get() + (16 + (count + offset) * size_of(dtype)) - count * size_of(dtype);
    const auto misaligned = (reinterpret_cast<uintptr_t>(data) - offset * size_of(dtype)) % 16;
    data -= misaligned;
    std::memset(memory.get(), 0xa5, 16 + (count + offset) * size_of(dtype));
  }
  double get(int64_t i) const {
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

// An operand of shape (outer, inner, classes) in a case's layout.
struct Layout {
  int64_t outer_stride, inner_stride, class_stride, count;

  explicit Layout(const Case& c, int64_t gap) {
    if (c.inner_is_last) {
      inner_stride = 1;
      class_stride = c.inner + gap;
      outer_stride = c.classes * class_stride;
    } else {
      class_stride = c.class_step;
      inner_stride = c.classes * c.class_step + gap;
      outer_stride = c.inner * inner_stride;
    }
    count = (c.outer - 1) * outer_stride + (c.inner - 1) * inner_stride + (c.classes - 1) * class_stride + 1;
  }
  int64_t at(const Case& c, int64_t row, int64_t class_) const {
    return row / c.inner * outer_stride + row % c.inner * inner_stride + class_ * class_stride;
  }
  template <typename Operand>
  void describe(Operand& operand, void* data) const {
    operand.data = data;
    operand.class_stride = class_stride;
    operand.strides[0] = outer_stride;
    operand.strides[1] = inner_stride;
  }
};

double epsilon_of(DType dtype) {
  return dtype == DType::kFloat64    ? 1e-13
         : dtype == DType::kFloat16  ? 0x1p-10
         : dtype == DType::kBFloat16 ? 0x1p-7
                                     : 2e-6;
}

bool is_close(double actual, double expected, double relative, double absolute) {
  if (std::isnan(expected) || std::isinf(expected)) {
    return std::isnan(expected) ? std::isnan(actual) : actual == expected;
  }
  return std::abs(actual - expected) <= relative * std::abs(expected) + absolute;
}

int failures = 0, cases = 0;

void fail(const char* group, const Case& c, const char* what, int64_t row, int64_t class_, double actual,
          double expected) {
  constexpr int kEnough = 10;
  ++failures;
  std::printf(
      "%s: dtype %d, target %d, (%ld, %ld, %ld) %s step %ld gap %ld offset %ld, weighted %d smoothing %g reduction "
      "%c: "
      "%s of row %ld class %ld is %.9g, not %.9g\n",
      group, int(c.dtype), int(c.target), long(c.outer), long(c.classes), long(c.inner),
      c.inner_is_last ? "inner last" : "classes last", long(c.class_step), long(c.gap), long(c.offset), c.weighted,
      c.smoothing, c.reduction, what, long(row), long(class_), actual, expected);
  if (failures == kEnough) {
    std::exit(1);
  }
}

enum class Pass { kForward, kForwardGrad, kInplace, kBackward };

// Runs one pass of one case. `plan` changes what the tables would choose.
void run(const char* group, const Case& c, Pass pass, const std::function<void(cuda::Plan&)>& plan = {}) {
  ++cases;
  Random random;
  random.state = 77 + c.classes * 31 + c.outer + c.inner;
  const int64_t rows = c.outer * c.inner;
  const DType acc = c.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const bool probabilities = c.target == TargetType::kProbabilities;
  const int64_t other = c.companions_lie_otherwise ? 1 : 0;

  const Layout layout(c, c.gap), q_layout(c, c.gap + other), grad_layout(c, c.gap + 2 * other);
  Array logits(c.dtype, layout.count, c.offset), q(c.dtype, q_layout.count, c.offset + other);
  Array grad(c.dtype, grad_layout.count, c.offset + other), weight(acc, c.classes);
  std::vector<double> z(rows * c.classes), a(rows * c.classes), w(c.classes, 1.0);
  for (int64_t k = 0; k < c.classes; ++k) {
    weight.set(k, c.weighted ? 0.25 + random.uniform() : 1);
    w[k] = weight.get(k);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < c.classes; ++k) {
      double value = 3 * random.normal();
      if (c.has_special_rows) {
        value = row % 5 == 1                         ? -kInf
                : row % 5 == 2 && k == c.classes / 2 ? kInf
                : row % 5 == 3 && k % 3 == 0         ? -kInf
                                                     : value;
        value = row % 5 == 4 ? 5e4 + value : value;
      }
      logits.set(layout.at(c, row, k), value);
      z[row * c.classes + k] = logits.get(layout.at(c, row, k));
    }
  }

  std::vector<int64_t> index(rows, -1);
  std::vector<bool> kept(rows, true), bad(rows, false);
  std::vector<char> index_memory(rows * 8);
  for (int64_t row = 0; row < rows; ++row) {
    if (probabilities) {
      for (int64_t k = 0; k < c.classes; ++k) {
        q.set(q_layout.at(c, row, k), random.uniform() / c.classes);
      }
      continue;
    }
    const int64_t limit = c.target == TargetType::kUInt8 ? std::min<int64_t>(c.classes, 256) : c.classes;
    int64_t target = row == 0 ? limit - 1 : row == 1 ? 0 : random.below(limit);
    kept[row] = !(c.ignores && row % 3 == 1);
    bad[row] = c.has_bad_target && kept[row] && row >= rows / 2;
    const int64_t ignore_index = c.target == TargetType::kUInt8 ? 255 : -100;
    index[row] = kept[row] && !bad[row] ? target : -1;
    target = !kept[row] ? ignore_index : bad[row] ? c.classes + row : target;
    char* const place = index_memory.data() + row * (c.target == TargetType::kInt64   ? 8
                                                     : c.target == TargetType::kInt32 ? 4
                                                                                      : 1);
    std::memcpy(place, &target, c.target == TargetType::kInt64 ? 8 : c.target == TargetType::kInt32 ? 4 : 1);
  }

  // The oracle.
  double weights = 0, total = 0;
  std::vector<double> max(rows), sum(rows), loss(rows), sum_a(rows);
  for (int64_t row = 0; row < rows; ++row) {
    double m = -kInf, s = 0;
    for (int64_t k = 0; k < c.classes; ++k) {
      m = std::max(m, z[row * c.classes + k]);
    }
    for (int64_t k = 0; k < c.classes; ++k) {
      s += std::exp(z[row * c.classes + k] - (m == -kInf ? 0 : m));
    }
    max[row] = m;
    sum[row] = s;
    for (int64_t k = 0; k < c.classes; ++k) {
      const double p = probabilities ? q.get(q_layout.at(c, row, k)) : k == index[row] ? 1 : 0;
      a[row * c.classes + k] = w[k] * ((1 - c.smoothing) * p + c.smoothing / c.classes);
      const double term = a[row * c.classes + k] * (std::log(s) + (m - z[row * c.classes + k]));
      loss[row] += probabilities || c.smoothing > 0 || k == index[row] ? term : 0;
      sum_a[row] += a[row * c.classes + k];
    }
    loss[row] = !kept[row] ? 0 : bad[row] ? NAN : loss[row];
    weights += index[row] >= 0 ? w[index[row]] : 0;
    total += loss[row];
  }
  const double divisor = c.reduction != 'm' ? 1 : probabilities ? double(rows) : weights;

  Problem p;
  p.dtype = c.dtype;
  p.target_type = c.target;
  p.rows = rows;
  p.classes = c.classes;
  p.dims = 2;
  p.sizes[0] = c.outer;
  p.sizes[1] = c.inner;
  if (c.inner > 1) {
    p.dividers[1] = Divider(c.inner);
  } else {  // as ProblemBuilder merges them
    p.dims = 1;
  }
  layout.describe(p.logits, logits.data);
  if (probabilities) {
    q_layout.describe(p.target, q.data);
  } else {
    p.target.data = index_memory.data();
    p.target.strides[0] = c.inner;
    p.target.strides[1] = 1;
  }
  p.weight = c.weighted ? weight.data : nullptr;
  p.ignore_index = c.target == TargetType::kUInt8 ? 255 : -100;
  p.label_smoothing = c.smoothing;
  p.divides_by_weight = c.reduction == 'm' && !probabilities;
  p.divisor.value = probabilities ? divisor : 1;
  p.row_strides[0] = c.inner;
  p.row_strides[1] = 1;

  Array row_loss(acc, rows), row_max(acc, rows), row_sum(acc, rows), row_lse(acc, rows), result(c.dtype, 1);
  Array grad_loss(c.dtype, rows), grad_lse(acc, rows);
  std::vector<char> workspace(cuda::workspace_size(p));
  std::memset(workspace.data(), 0xff, workspace.size());
  p.workspace = workspace.data();
  BadTarget record;
  p.bad_target = &record;
  p.loss = row_loss.data;
  if (pass == Pass::kForward || pass == Pass::kBackward) {
    p.max = row_max.data;
    p.sum = row_sum.data;
  }
  if (c.wants_lse || pass == Pass::kBackward) {
    p.lse = row_lse.data;
  }
  if (c.reduction != 'n') {
    p.total = result.data;
    p.total_type = c.dtype;
  }
  if (pass == Pass::kForwardGrad) {
    grad_layout.describe(p.grad, grad.data);
  } else if (pass == Pass::kInplace) {
    layout.describe(p.grad, logits.data);
  }
  cuda::Plan chosen = cuda::plan_forward(p, cuda::current_device());
  if (plan && pass != Pass::kBackward) {
    plan(chosen);
  }
  cuda::forward(p, chosen, nullptr);

  double scale = 0;
  for (int64_t row = 0; row < rows; ++row) {
    scale = std::isfinite(loss[row]) ? std::max(scale, std::abs(loss[row])) : scale;
  }
  const double epsilon = epsilon_of(acc);
  int64_t first_bad = INT64_MAX;
  for (int64_t row = 0; row < rows; ++row) {
    first_bad = bad[row] && first_bad == INT64_MAX ? row : first_bad;
    if (!is_close(row_loss.get(row), loss[row], epsilon, epsilon * scale)) {
      fail(group, c, "the loss", row, -1, row_loss.get(row), loss[row]);
    }
    if (!kept[row] && !p.lse) {
      continue;
    }
    if (p.max && row_max.get(row) != max[row]) {
      fail(group, c, "the maximum", row, -1, row_max.get(row), max[row]);
    }
    if (p.sum && std::isfinite(max[row]) && !is_close(row_sum.get(row), sum[row], epsilon, 0)) {
      fail(group, c, "the sum", row, -1, row_sum.get(row), sum[row]);
    }
    const double reported = max[row] == kInf ? kInf : max[row] + std::log(sum[row]);
    if (p.lse && !is_close(row_lse.get(row), reported, epsilon, epsilon)) {
      fail(group, c, "lse", row, -1, row_lse.get(row), reported);
    }
  }
  if (c.reduction != 'n' && !is_close(result.get(0), total / divisor, epsilon_of(c.dtype), epsilon * scale)) {
    fail(group, c, "the total", -1, -1, result.get(0), total / divisor);
  }
  if (record.row != first_bad || (first_bad != INT64_MAX && record.target != c.classes + first_bad)) {
    fail(group, c, "the reported row", first_bad, record.target, double(record.row), double(first_bad));
  }
  if (pass == Pass::kForward) {
    return;
  }

  std::vector<double> upstream(rows, 1), upstream_lse(rows, 0);
  if (pass == Pass::kBackward) {
    for (int64_t row = 0; row < rows; ++row) {
      grad_loss.set(row, random.normal());
      grad_lse.set(row, random.normal());
      upstream[row] = grad_loss.get(row);
      upstream_lse[row] = c.wants_lse ? grad_lse.get(row) : 0;
    }
    p.grad_loss.data = grad_loss.data;
    p.grad_loss_type = c.dtype;
    p.grad_loss.strides[0] = c.inner;
    p.grad_loss.strides[1] = 1;
    if (c.wants_lse) {
      p.grad_lse.data = grad_lse.data;
      p.grad_lse.strides[0] = c.inner;
      p.grad_lse.strides[1] = 1;
    }
    grad_layout.describe(p.grad, grad.data);
    cuda::Plan chosen = cuda::plan_backward(p, cuda::current_device());
    if (plan) {
      plan(chosen);
    }
    cuda::backward(p, chosen, nullptr);
  }
  // Half of what separates the smallest numbers of float16.
  const double smallest = c.dtype == DType::kFloat16 ? 0x1p-25 : 1e-37;
  const Array& actual = pass == Pass::kInplace ? logits : grad;
  const Layout& actual_layout = pass == Pass::kInplace ? layout : grad_layout;
  for (int64_t row = 0; row < rows; ++row) {
    const double g = bad[row] ? NAN : kept[row] ? upstream[row] / divisor : 0;
    const double size = std::abs(g) * sum_a[row] + std::abs(upstream_lse[row]);
    for (int64_t k = 0; k < c.classes; ++k) {
      const double exp = std::exp(z[row * c.classes + k] - max[row]) / sum[row];
      double expected = g * (sum_a[row] * exp - a[row * c.classes + k]) + upstream_lse[row] * exp;
      if (!kept[row] && !(c.wants_lse && pass == Pass::kBackward)) {
        expected = 0;
      }
      const double value = actual.get(actual_layout.at(c, row, k));
      if (!is_close(value, expected, epsilon_of(c.dtype), epsilon * size + smallest)) {
        fail(group, c, "the gradient", row, k, value, expected);
      }
    }
  }
}

const std::vector<DType> kDTypes = [] {
  if (const char* only = std::getenv("KERNELS_TEST_DTYPE")) {
    return std::vector<DType>{static_cast<DType>(std::atoi(only))};
  }
  return std::vector<DType>{DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
}();
const Pass kPasses[] = {Pass::kForward, Pass::kForwardGrad, Pass::kInplace, Pass::kBackward};

// Every combination of the options, for one shape and layout.
void run_options(const char* group, Case c, const std::function<void(cuda::Plan&)>& plan = {}) {
  int turn = 0;
  for (const TargetType target : {TargetType::kInt64, TargetType::kProbabilities}) {
    for (const double smoothing : {0.0, 0.1}) {
      for (const bool weighted : {false, true}) {
        c.target = target;
        c.smoothing = smoothing;
        c.weighted = weighted;
        c.reduction = "msn"[turn++ % 3];
        c.ignores = target != TargetType::kProbabilities;
        c.wants_lse = turn % 2;
        for (const Pass pass : kPasses) {
          run(group, c, pass, plan);
        }
      }
    }
  }
}

// Of a row whose classes lie next to each other.
int pieces(const Case& c) {
  return static_cast<int>(c.classes * Array::size_of(c.dtype) / 16);
}

// Memory of which only what is touched exists.
class SparseMemory {
 public:
  explicit SparseMemory(size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (data_ == MAP_FAILED) {
      std::perror("mmap");
      std::exit(1);
    }
  }
  SparseMemory(const SparseMemory&) = delete;
  ~SparseMemory() { munmap(data_, bytes_); }
  float* data() const { return static_cast<float*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// Compares with the same elements next to each other: every bit has to be the same.
void run_far(const char* group, bool across) {
  constexpr int64_t kFar = (int64_t{1} << 31) + 8;
  const int64_t rows = across ? 70 : 3, classes = across ? 3 : 600;
  std::vector<float> results[2];
  for (const bool far : {false, true}) {
    const int64_t apart = far ? kFar : across ? rows : classes;
    const SparseMemory logits(3 * apart * sizeof(float)), grad(3 * apart * sizeof(float));
    std::vector<float> loss(rows);
    std::vector<char> workspace(cuda::workspace_size({}));
    std::vector<int64_t> target(rows, 2);
    const auto at = [&](int64_t row, int64_t class_) { return across ? class_ * apart + row : row * apart + class_; };
    Random random;
    for (int64_t i = 0; i < rows * classes; ++i) {
      logits.data()[at(i / classes, i % classes)] = static_cast<float>(random.normal());
    }
    Problem p;
    p.rows = p.sizes[0] = rows;
    p.classes = classes;
    p.dims = 1;
    p.logits.data = logits.data();
    p.grad.data = grad.data();
    p.logits.class_stride = p.grad.class_stride = across ? apart : 1;
    p.logits.strides[0] = p.grad.strides[0] = across ? 1 : apart;
    p.target.data = target.data();
    p.target.strides[0] = p.row_strides[0] = 1;
    p.loss = loss.data();
    p.workspace = workspace.data();
    cuda::forward(p, nullptr);
    results[far] = loss;
    for (int64_t i = 0; i < rows * classes; ++i) {
      results[far].push_back(grad.data()[at(i / classes, i % classes)]);
    }
  }
  ++cases;
  if (results[0] != results[1]) {
    ++failures;
    std::printf("%s: %s apart differ from neighbours\n", group, across ? "classes" : "rows");
  }
}

struct Group {
  const char* name;
  void (*run)(const char* group);
};

const Group kGroups[] = {
    // Every length around a vector of 2 to 8 elements and around a warp's share of them, at every misalignment.
    {"tails",
     [](const char* group) {
       for (const DType dtype : kDTypes) {
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
         for (const int64_t classes : lengths) {
           for (int64_t offset = 0; offset < vector; offset += classes > 300 ? 3 : 1) {
             Case c;
             c.dtype = dtype;
             c.outer = 3;
             c.classes = classes;
             c.offset = offset;
             c.gap = offset % 3;
             c.reduction = "msn"[offset % 3];
             c.smoothing = offset % 2 ? 0.1 : 0;
             for (const Pass pass : kPasses) {
               run(group, c, pass);
             }
           }
         }
       }
     }},
    // Every option in every layout: rows next to each other or not, classes apart, classes across rows.
    {"layouts",
     [](const char* group) {
       for (const DType dtype : kDTypes) {
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
         Case padded = segmentation;
         padded.gap = 2;
         padded.companions_lie_otherwise = true;
         for (const Case& c : {contiguous, misaligned, stepped, columns, segmentation, classes_last, padded}) {
           run_options(group, c);
         }
       }
     }},
    // Every way to share rows: parts of a warp, warps, a block, clusters, blocks without a cluster; with the row kept
    // and read again.
    {"regimes",
     [](const char* group) {
       for (const DType dtype : kDTypes) {
         for (const bool keeps : {true, false}) {
           for (const int lanes : {1, 2, 8, 32, 64, 256}) {
             Case c;
             c.dtype = dtype;
             c.outer = 5;
             c.classes = lanes < 32 ? 123 : 1234;
             c.offset = 1;
             run_options(group, c, [&](cuda::Plan& plan) {
               plan.threads = std::max(64, lanes);
               plan.lanes = lanes;
               plan.blocks = 1;
               plan.cluster = false;
               plan.kept = keeps ? pieces(c) / lanes + 1 : 0;
             });
           }
           for (const int blocks : {2, 4, 8, 16}) {
             for (const bool cluster : {true, false}) {
               Case c;
               c.dtype = dtype;
               c.outer = 3;
               c.classes = 4321;
               c.gap = 1;
               run_options(group, c, [&](cuda::Plan& plan) {
                 plan.threads = plan.lanes = 64;
                 plan.blocks = blocks;
                 plan.cluster = cluster;
                 plan.kept = keeps && cluster ? pieces(c) / 64 / blocks + 1 : 0;
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
             run_options(group, c, [&](cuda::Plan& plan) {
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
         run_options(group, c, [](cuda::Plan& plan) {
           plan.threads = plan.lanes = 32;
           plan.blocks = 4;
           plan.kept = 0;
         });
       }
     }},
    // The same in short, for builds in which a launch takes long; with blocks that take one row after another.
    {"sharing",
     [](const char* group) {
       const auto run_short = [&](Case c, const cuda::Plan& chosen, bool keeps) {
         for (const double smoothing : {0.0, 0.1}) {
           c.dtype = DType::kBFloat16;
           c.ignores = true;
           c.weighted = smoothing > 0;
           c.smoothing = smoothing;
           c.reduction = smoothing > 0 ? 'n' : 'm';
           for (const Pass pass : kPasses) {
             run(group, c, pass, [&](cuda::Plan& plan) {
               plan = chosen;
               plan.tiles = 1;
               plan.kept = keeps ? (c.inner_is_last ? static_cast<int>(c.classes) : pieces(c)) / plan.lanes + 1 : 0;
             });
           }
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
             cuda::Plan plan;
             plan.threads = plan.lanes = 64;
             plan.blocks = blocks;
             plan.cluster = cluster;
             Case c;
             c.outer = 3;
             c.classes = 1201 * blocks;
             run_short(c, plan, keeps && cluster);
           }
         }
       }
     }},
    // What the tables choose by themselves on a large chip, a small one, and one without clusters.
    {"tables",
     [](const char* group) {
       const emulator::Properties before = emulator::properties();
       for (const emulator::Properties& chip :
            {emulator::Properties{132, 232448, 16}, emulator::Properties{4, 101376, 1},
             emulator::Properties{16, 101376, 8}}) {
         emulator::properties() = chip;
         for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
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
               for (const Pass pass : kPasses) {
                 run(group, c, pass);
                 Case across = c;
                 across.inner = rows;
                 across.outer = 1;
                 across.inner_is_last = true;
                 if (classes <= 5000) {
                   run(group, across, pass);
                 }
               }
             }
           }
         }
       }
       emulator::properties() = before;
     }},
    // Infinities, logits far from 0, all kinds of targets, and targets out of bounds.
    {"special",
     [](const char* group) {
       for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
         for (const int64_t classes : {7, 300, 3000}) {
           for (const Pass pass : kPasses) {
             Case c;
             c.dtype = dtype;
             c.outer = 10;
             c.classes = classes;
             c.has_special_rows = true;
             run(group, c, pass);
             c.inner = 10;
             c.outer = 1;
             c.inner_is_last = true;
             run(group, c, pass);
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
               run(group, t, pass);
             }
           }
         }
       }
     }},
    // Sums over more rows than a block takes, and a cluster, on chips with and without clusters.
    {"many rows",
     [](const char* group) {
       const emulator::Properties before = emulator::properties();
       for (const int max_cluster : {16, 1}) {
         emulator::properties().max_cluster = max_cluster;
         for (const int64_t rows : {2049, 32768, 140001}) {
           Case c;
           c.outer = rows;
           c.classes = 3;
           c.ignores = true;
           c.weighted = true;
           for (const char reduction : {'s', 'm'}) {
             c.reduction = reduction;
             run(group, c, Pass::kForward);
             run(group, c, Pass::kForwardGrad);
           }
         }
       }
       emulator::properties() = before;
     }},
    // Rows, and then classes, that lie further apart than 32 bits count.
    {"far",
     [](const char* group) {
       run_far(group, false);
       run_far(group, true);
     }},
};

}  // namespace

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
