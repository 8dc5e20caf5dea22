// Runs the CUDA kernels on the CPU against an oracle in float64. Prints what differs, and how many cases ran.
//
// Usage: kernels_test [group ...], without arguments all groups. KERNELS_TEST_DTYPE=0 to 3 keeps to one dtype.
//
// A new option is a member of Case with a line in text_of() (case.h), an operand in Inputs where it is one, a line in
// describe() (operands.h), its formula in Oracle (oracle.h), and a case in options() (cases.h), which the groups here
// take through layouts and plans. A new output is a member of Results (operands.h), a value in Oracle, a comparison in
// compare_rows() (passes.h), and a case in stats() (cases.h).

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cases.h"
#include "kernels/passes.h"

namespace ce::test {
namespace {

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
    Problem p = test::describe(c, in);
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
}  // namespace ce::test

// Picks of one class all write to its place: first their numbers, of which any may stay, and then the same gradient.
extern "C" const char* __tsan_default_suppressions() {
  return "race:write_rows\n";
}

int main(int argc, char** argv) {
  using namespace ce::test;
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
