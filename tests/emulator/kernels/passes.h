// Runs the passes of a case and compares what they write with the oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <vector>

#include "oracle.h"

namespace ce::test {

inline void compare_rows(const Run& run, const Results& results, const Oracle& oracle, const Inputs& in,
                         const Problem& p) {
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
inline double smallest_of(DType dtype) {
  return dtype == DType::kFloat16 ? 0x1p-25 : 1e-37;
}

// Of classes from `first` on; also that what belongs to no class has not been written.
inline void compare_gradient(const Run& run, const Plane& plane, const Gradient& expected, const char* what,
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

inline void compare_sum(const Run& run, double actual, const Sum& expected, const char* what, int64_t class_ = -1) {
  run.expect(actual, expected.value, epsilon_of(run.c), epsilon_of(run.c) * expected.size, what, -1, class_);
}

inline double logit_scale_gradient(Problem p, const Case& c) {
  Array grad(c.acc());
  std::vector<double> sums(cuda::logit_scale_backward_sums());
  p.grad.data = grad.data;
  p.partial_sums = sums.data();
  cuda::logit_scale_backward(p, nullptr);
  return grad.get();
}

// The gradients of all operands but the logits that have one in the kernels.
inline void run_other_gradients(const Run& run, Problem p, const Oracle& oracle, const Upstream& upstream) {
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
inline void count_reads(const Inputs& in) {
  const Array& logits = in.logits.array;
  emulator::count_reads_of(logits.data, logits.data + logits.count * Array::size_of(logits.dtype));
}
inline void expect_reads(const Run& run, const Inputs& in, const cuda::Plan& plan, int times) {
  const Case& c = run.c;
  const int64_t rows = std::count(in.kept.begin(), in.kept.end(), true);
  const int64_t size = Array::size_of(c.dtype), reads = emulator::counted_bytes() / size;
  const int64_t around = 2 * (16 / size - 1) * (plan.blocks + 1);
  if (reads < times * rows * c.classes || reads > c.rows() * (times * c.classes + around)) {
    run.expect(double(reads), double(times * rows * c.classes), 0, 0, "reads of logits");
  }
}

using ChangePlan = std::function<void(cuda::Plan&)>;

inline cuda::Plan changed(cuda::Plan plan, const ChangePlan& change) {
  if (change) {
    change(plan);
  }
  return plan;
}

// Runs one pass. `change` makes another plan from what the tables would choose.
inline void run_pass(const Run& run, Inputs& in, const Oracle& oracle, const ChangePlan& change) {
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
inline void run(const char* group, const Case& c, std::initializer_list<Pass> passes, const ChangePlan& change = {}) {
  Inputs in(c);
  const Oracle oracle(c, in);
  for (const Pass pass : passes) {
    run_pass({group, c, pass}, in, oracle, change);
  }
}

inline void run_all(const char* group, const std::vector<Case>& list, const ChangePlan& change = {}) {
  for (const Case& c : list) {
    if (c.wants_stats()) {  // they come with no gradient in the forward pass
      run(group, c, {Pass::kBackward}, change);
    } else {
      run(group, c, {Pass::kForwardGrad, Pass::kBackward, Pass::kInplace}, change);
    }
  }
}

// The same plan with one tile of rows at a time.
inline ChangePlan in_turn(const ChangePlan& change = {}) {
  return [change](cuda::Plan& plan) {
    if (change) {
      change(plan);
    }
    plan.tiles = 1;
  };
}

}  // namespace ce::test
