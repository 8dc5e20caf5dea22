"""The CUDA kernels on the CPU: against an oracle, under the sanitizers, and with mistakes planted in them.

tests/emulator/kernels_test.cpp holds the cases; csrc/cuda is compiled as it is, for the emulator.
"""

import fcntl
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests/emulator"
FLAGS = ["-std=c++17", "-O1", "-g1", "-MMD", "-Wall", "-Wextra", "-Werror", "-DCE_EMULATE", f"-I{EMULATOR}"]
SANITIZERS = {
    "plain": [],
    # More optimization of these checks takes longer to compile than it saves.
    "address": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# What takes longest to compile comes first.
KERNELS = [path.name for path in sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)]
ONE_DTYPE = {"KERNELS_TEST_DTYPE": "3"}  # that of copy_one_dtype()


def compiler(*arguments):
    command = [os.environ.get("CXX", "g++"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def compile_all(build, sanitizer, sources, *flags):
    """<name>.o of each source, two at a time, and in <name>.d what it includes."""

    def compile_one(source):
        own = [*SANITIZERS[sanitizer], *flags] if source.stem != "emulator" else ["-O2"]
        compiler(*FLAGS, *own, "-x", "c++", "-c", source, "-o", build / f"{source.stem}.o")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))


def copy_one_dtype(root):
    """Copies csrc, with kernels of bfloat16 alone, which compile in a quarter of the time."""
    shutil.copytree(ROOT / "csrc", root / "csrc", ignore=shutil.ignore_patterns("cpu"))
    path = root / "csrc/operands.h"
    cases = re.compile(r"case DType::kFloat64:.*return f\(float\(\)\);", re.DOTALL)
    text, count = cases.subn("default:\n      return f(BFloat16());", path.read_text())
    assert count == 1, "dispatch() has changed"
    path.write_text(text)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """built(sanitizer): the directory of all objects and kernels_test, which the workers of pytest-xdist share."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def build(sanitizer):
        directory = shared / sanitizer
        directory.mkdir(exist_ok=True)
        with open(directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "kernels_test").exists():
                root = ROOT
                if sanitizer == "thread":  # see RUNS
                    root = directory
                    copy_one_dtype(root)
                sources = [root / "csrc/cuda" / name for name in KERNELS]
                compile_all(directory, sanitizer, [*sources, EMULATOR / "kernels_test.cpp", EMULATOR / "emulator.cpp"])
                compiler(*SANITIZERS[sanitizer], *directory.glob("*.o"), "-o", directory / "kernels_test")
        return directory

    return build


def including(base, file):
    """The kernels that include `file`, those of the loss first."""
    kernels = [name for name in KERNELS if re.search(rf"/{file}\s", (base / name).with_suffix(".d").read_text())]
    return sorted(kernels, key=lambda name: not name.startswith("forward"))


def build_changed(base, root, sanitizer, kernels):
    """The directory of a kernels_test with the objects of `base`, but for those of `kernels`, from `root`.

    The changed objects come first: of the functions that objects share the linker takes the first.
    """
    build = root / "build"
    build.mkdir(exist_ok=True)
    compile_all(build, sanitizer, [root / "csrc/cuda" / name for name in kernels], "-O0", "-g0")  # what runs is short
    changed = list(build.glob("*.o"))
    objects = [path for path in base.glob("*.o") if build / path.name not in changed]
    compiler(*SANITIZERS[sanitizer], *changed, *objects, "-o", build / "kernels_test")
    return build


def run(directory, *groups, **environment):
    command = [directory / "kernels_test", *groups]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


GROUPS = [
    *["tails", "layouts", "regimes", "sharing", "tables", "special", "many rows"],
    *["options", "gradients", "stats", "teacher", "picks", "shards", "scale"],
    *["bundles", "shared bundles"],
]
# Under ThreadSanitizer a launch takes twenty times as long: one dtype, and what differs in how threads share a row.
RUNS = [
    *[("plain", group, {}) for group in [*GROUPS, "far"]],
    *[("plain", group, {"CE_EMULATOR_ORDER": "random"}) for group in ("layouts", "special", "sharing", "picks")],
    *[("address", group, {}) for group in GROUPS],
    *[("thread", group, ONE_DTYPE) for group in ("tails", "layouts", "sharing", "special", "picks", "scale")],
    ("thread", "shared bundles", ONE_DTYPE),
]


@pytest.mark.parametrize(("sanitizer", "group", "environment"), RUNS, ids=lambda value: str(value) if value else "")
def test_kernels(built, sanitizer, group, environment):
    result = run(built(sanitizer), group, **environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert f"{group}: " in result.stdout and ": 0 cases" not in result.stdout


# name: (sanitizer, groups, file, what is replaced, by what). One mistake each that CUDA code is known for, or that a
# new option invites.
MISTAKES = {
    "no barrier before the warps are summed": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "      __syncthreads();\n      state = sum_of_lanes<kGeneral>(shared[thread & (warps - 1)]",
        "      state = sum_of_lanes<kGeneral>(shared[thread & (warps - 1)]",
    ),
    "shared memory used again without a barrier": (
        "thread",
        ["sharing"],
        "reduce.cuh",
        "      __syncthreads();\n    } else {\n      __syncwarp();",
        "    } else {\n      __syncwarp();",
    ),
    "no order of memory within a warp": (
        "thread",
        ["special"],
        "reduce.cuh",
        "      __syncwarp();\n",
        "",
    ),
    "no barrier in the tree across rows": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "      __syncthreads();\n      if (thread < threads) {",
        "      if (thread < threads) {",
    ),
    "barrier that not all threads reach": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "    if (warps > 1) {",
        "    if (warps > 1 && thread < kWarp) {",
    ),
    "shuffle in a divergent branch": (
        "plain",
        ["layouts"],
        "forward.cu",
        "    state = sum_in_block<Walk, kGeneral>(state, plan, states);",
        "    if (target.kept) {\n      state = sum_in_block<Walk, kGeneral>(state, plan, states);\n    }",
    ),
    "shuffle too narrow": (
        "plain",
        ["tails"],
        "reduce.cuh",
        "plan.lanes < kWarp ? plan.lanes : kWarp",
        "plan.lanes < kWarp ? plan.lanes : kWarp / 2",
    ),
    "no cluster barrier before the remote read": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "  cluster_barrier();\n  state = sum_of_lanes",
        "  state = sum_of_lanes",
    ),
    "message to a block that is not there yet": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "    if (turn_ == 0) {\n      cluster_wait();\n    }\n",
        "",
    ),
    "messages read before they are there": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "    wait_for_arrivals(arrivals_, turn_ % 2);\n",
        "",
    ),
    "a message more waited for than there are": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "return parts(plan) * sizeof(MaxSum<A>)",
        "return (parts(plan) + 1) * sizeof(MaxSum<A>)",
    ),
    "next turn's messages not expected": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "    if (threadIdx.x == 0) {\n      expect_arrivals(arrivals_, bytes_of_turn(plan));\n    }\n    ++turn_;",
        "    ++turn_;",
    ),
    "next turn's messages over those that others read": (
        "thread",
        ["sharing"],
        "reduce.cuh",
        "parts_ + turn_ % 2 * parts(plan)",
        "parts_",
    ),
    "message over what other lanes of the warp read": (
        "thread",
        ["sharing"],
        "reduce.cuh",
        "    __syncwarp();\n    if (lane",
        "    if (lane",
    ),
    "block leaves its cluster before it was read": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "CE_DEVICE void leave_cluster() {\n  cluster_wait();",
        "CE_DEVICE void leave_cluster() {\n",
    ),
    "block lets others leave its cluster before it has read": (
        "thread",
        ["sharing"],
        "reduce.cuh",
        "  state = sum_of_lanes<kGeneral>(*in_block(mine, threadIdx.x & (plan.blocks - 1)), plan.blocks);\n"
        "  cluster_arrive_relaxed();  // it has only read",
        "  cluster_arrive_relaxed();\n"
        "  state = sum_of_lanes<kGeneral>(*in_block(mine, threadIdx.x & (plan.blocks - 1)), plan.blocks);",
    ),
    "last piece left out": (
        "plain",
        ["tails"],
        "row.cuh",
        "(walk.pieces() - seat.rank + (int64_t{1} << seat.bits) - 1) >> seat.bits",
        "(walk.pieces() - seat.rank) >> seat.bits",
    ),
    "tail read past its end": (
        "address",
        ["tails"],
        "row.cuh",
        "pieces_ = (classes - head_) / kSize;",
        "pieces_ = (classes - head_ + kSize - 1) / kSize;",
    ),
    "head too short: misaligned access": (
        "plain",
        ["tails"],
        "row.cuh",
        "head_ = misaligned == 0 ? 0 : kSize - misaligned;",
        "head_ = misaligned == 0 ? 0 : 0;",
    ),
    "gradient stored as the logits lie": (
        "plain",
        ["layouts"],
        "row.cuh",
        "reinterpret_cast<uintptr_t>(data + walk.class_of(0)) % (sizeof(T) * Walk::kSize) == 0",
        "reinterpret_cast<uintptr_t>(data + walk.class_of(0)) % sizeof(T) == 0",
    ),
    "stride of the gradient for that of the logits": (
        "plain",
        ["layouts"],
        "backward.cu",
        "walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, exists ? p.classes : 0);\n"
        "    const Coefficients<T> coefficients(p, row, walk);\n"
        "    const RowGradient<A> gradient = gradient_of_row<kGeneral>",
        "walk(p.logits.data, row_offset(p, row, p.grad.strides), p.logits.class_stride, exists ? p.classes : 0);\n"
        "    const Coefficients<T> coefficients(p, row, walk);\n"
        "    const RowGradient<A> gradient = gradient_of_row<kGeneral>",
    ),
    "no guard of -inf": (
        "plain",
        ["special"],
        "../max_sum.h",
        "return max == -INFINITY ? T(0) : max;",
        "return max;",
    ),
    "shared memory too small": (
        "plain",
        ["tables"],
        "forward.cu",
        "static_cast<int64_t>(plan.kept) * plan.threads",
        "static_cast<int64_t>(plan.kept) * (plan.threads - 1)",
    ),
    "another element of the piece taken for the target's": (
        "plain",
        ["tails"],
        "target.cuh",
        "element_ = static_cast<int>(place % Walk::kSize);",
        "element_ = static_cast<int>(target % Walk::kSize);",
    ),
    "gradient written where nothing is kept": (
        "address",
        ["sharing"],
        "plan.cu",
        "(copies && plan.kept == 0)",
        "(copies && plan.kept < 0)",
    ),
    "kept pieces mixed up": (
        "plain",
        ["sharing"],
        "forward.cuh",
        "CE_DEVICE Whole operator()(int64_t, int turn) const { return (*this)[turn]; }",
        "CE_DEVICE Whole operator()(int64_t, int turn) const { return (*this)[turn / 2]; }",
    ),
    "kept pieces read before they are there": (
        "plain",
        ["sharing"],
        "forward_grad.cu",
        "wait_for_copies(1 - i);",
        "wait_for_copies(2 - i);",
    ),
    "pieces that nobody waits for": (
        "plain",
        ["layouts"],
        "forward_grad.cu",
        "      wait_for_copies(1 - i);\n",
        "",
    ),
    "copies that are not committed": (
        "plain",
        ["layouts"],
        "forward_grad.cu",
        "    commit_copies();\n    if (reads) {\n      kept.start(walk, turns, half",
        "    if (reads) {\n      kept.start(walk, turns, half",
    ),
    "target logit read when the gradient may have replaced it": (
        "thread",
        ["layouts"],
        "forward.cu",
        "    const A z_target = seat.rank == 0 ? target_logit<kGeneral, A, T>(p, row, target) : A(0);\n"
        "    state = sum_in_block<Walk, kGeneral>(state, plan, states);",
        "    state = sum_in_block<Walk, kGeneral>(state, plan, states);\n"
        "    const A z_target = seat.rank == 0 ? target_logit<kGeneral, A, T>(p, row, target) : A(0);",
    ),
    "target logit read when its gradient has replaced it": (
        "plain",
        ["sharing"],
        "target.cuh",
        "    write(target.index, logit);",
        "    write(target.index, walk.template read<1>(target.index));",
    ),
    "target's element written before its piece": (
        "plain",
        ["tails"],
        "target.cuh",
        "  const Exponentials<A> exponentials(gradient.max);\n",
        "  if (TargetPlace<Walk>(walk, seat, target.index).is_mine()) {\n"
        "    write(target.index, logit);\n    return;\n  }\n"
        "  const Exponentials<A> exponentials(gradient.max);\n",
    ),
    "target's element written by a neighbour": (
        "plain",
        ["layouts"],
        "target.cuh",
        "((1 << seat.bits) - 1)) == seat.rank",
        "((1 << seat.bits) - 1)) == (seat.rank ^ 1)",
    ),
    "target's element written by all blocks of a cluster": (
        "thread",
        ["sharing"],
        "target.cuh",
        "((1 << seat.bits) - 1)) == seat.rank",
        "((1 << seat.bits) - 1)) % blockDim.x == seat.rank % blockDim.x",
    ),
    "edges of an ignored row's gradient left out": (
        "plain",
        ["layouts"],
        "target.cuh",
        "edge < walk.edges(); edge += 1 << seat.bits) {\n    grad.write",
        "edge < 0; edge += 1 << seat.bits) {\n    grad.write",
    ),
    "bad target read": (
        "plain",
        ["special"],
        "target.cuh",
        "if (verdict == Verdict::kKept) {",
        "if (verdict != Verdict::kIgnored) {",
    ),
    "ignored rows counted": (
        "plain",
        ["many rows"],
        "sums.cuh",
        "judge(p, target) == Verdict::kKept ? row_weight * weight_of_target<A>(p, target)",
        "judge(p, target) != Verdict::kOutOfBounds ? row_weight * weight_of_target<A>(p, target < 0 ? 0 : target)",
    ),
    "ignored rows counted by the blocks that sum them up": (
        "plain",
        ["layouts"],
        "forward.cuh",
        "target.index < 0 ? A(0) : row_weight * class_weight<A>(p, target.index)",
        "row_weight * class_weight<A>(p, target.index < 0 ? 0 : target.index)",
    ),
    "row weights left out of the divisor": (
        "plain",
        ["options"],
        "forward.cuh",
        "A(0) : row_weight * class_weight<A>(p, target.index);",
        "A(0) : class_weight<A>(p, target.index);",
    ),
    "an ignored row's weight in the sum": (
        "plain",
        ["options"],
        "forward.cuh",
        "weighted_loss(row_weight, loss)",
        "row_weight * loss",
    ),
    "an ignored row's weight in a sum over all rows": (
        "plain",
        ["many rows"],
        "sums.cu",
        "weighted_loss(row_weight, values.loss)",
        "row_weight * values.loss",
    ),
    "only a block's last row summed up": (
        "plain",
        ["layouts"],
        "forward.cuh",
        "add(*sums, {weighted_loss(row_weight, loss), weight});",
        "*sums = {weighted_loss(row_weight, loss), weight};",
    ),
    "no barrier before a tile's rows are summed": (
        "plain",
        ["sharing"],
        "forward.cuh",
        "  __syncthreads();\n  if (threadIdx.x >= kWarp ||",
        "  if (threadIdx.x >= kWarp ||",
    ),
    "a warp's rows for all of a tile": (
        "plain",
        ["sharing"],
        "forward.cuh",
        "i < count; i += kWarp",
        "i < count && i < kWarp; i += kWarp",
    ),
    "a tile's sums from all blocks of its cluster": (
        "plain",
        ["sharing"],
        "forward.cuh",
        "threadIdx.x >= kWarp || seat.block != 0",
        "threadIdx.x >= kWarp || seat.block < 0",
    ),
    "the last tile's sums left out": (
        "plain",
        ["tails"],
        "forward.cu",
        "sum_tiles(p, static_cast<int>(tiles), stream);",
        "sum_tiles(p, static_cast<int>(tiles) - 1, stream);",
    ),
    "more tiles than there are sums": (
        "address",
        ["many rows"],
        "forward.cu",
        "      plan.tiles = std::min<int64_t>(plan.tiles, kMaxTiles);\n",
        "",
    ),
    "32 bits for the distance of rows": (
        "plain",
        ["far"],
        "../operands.h",
        "return row * strides[0];\n  }\n  if (p.dims == 2)",
        "return static_cast<int>(row * strides[0]);\n  }\n  if (p.dims == 2)",
    ),
    "32 bits for the distance of rows on a grid": (
        "plain",
        ["far"],
        "../operands.h",
        "return outer * strides[0] +",
        "return static_cast<int>(outer * strides[0]) +",
    ),
    "32 bits for the distance of rows on a grid of many dimensions": (
        "plain",
        ["far"],
        "../operands.h",
        "return offset + row * strides[0];",
        "return offset + static_cast<int>(row * strides[0]);",
    ),
    "cluster's sums read before they are there": (
        "plain",
        ["many rows"],
        "sums.cu",
        "    wait_for_arrivals(arrivals_, 0);\n",
        "",
    ),
    "a row too few in the blocks' sums": (
        "plain",
        ["many rows"],
        "sums.cu",
        "first + i * threads < count) {\n        add",
        "first + i * threads < count - 1) {\n        add",
    ),
    "padding written": (
        "plain",
        ["layouts"],
        "forward_grad.cu",
        "const Walk walk(p.logits.data, offset, p.logits.class_stride, exists ? p.classes : 0);",
        "const Walk walk(p.logits.data, offset, p.logits.class_stride,\n"
        "                exists ? (p.classes + Walk::kSize - 1) / Walk::kSize * Walk::kSize : 0);",
    ),
    "row weights taken for neighbours": (
        "plain",
        ["options"],
        "../operands.h",
        "static_cast<const A*>(operand.data)[row_offset(p, row, operand.strides)]",
        "static_cast<const A*>(operand.data)[row_offset(p, row, p.row_strides)]",
    ),
    "a block's first warp for all of its partial sums": (
        "plain",
        ["gradients"],
        "backward.cu",
        "stream, p, grid.blocks * (plan.threads / kWarp));",
        "stream, p, grid.blocks);",
    ),
    "more blocks than there are partial sums": (
        "address",
        ["gradients"],
        "backward.cu",
        "  plan.tiles = std::min(plan.tiles, kScaleBlocks / plan.blocks);\n",
        "",
    ),
    "moment taken relative to the new maximum's sum": (
        "plain",
        ["sharing"],
        "../row_loss.h",
        "    moment = moment.relative_to(top, state.exps);\n    state.raise(top);",
        "    state.raise(top);\n    moment = moment.relative_to(top, state.exps);",
    ),
    "of equal logits in two lanes the last": (
        "plain",
        ["sharing"],
        "../row_loss.h",
        "other.argmax < argmax",
        "other.argmax > argmax",
    ),
    "rank counted for one lane": (
        "plain",
        ["stats"],
        "reduce.cuh",
        "__shfl_xor_sync(kAllLanes, mine.rank, distance)",
        "0",
    ),
    "kept row read again": (
        "plain",
        ["sharing"],
        "forward_grad.cu",
        "write_row<false, 1>(walk, seat, kept, target",
        "write_row<false, 1>(walk, seat, FromMemory<Walk>{walk}, target",
    ),
    "kept row of the general kernel read again": (
        "plain",
        ["sharing"],
        "forward.cu",
        "plan.kept > 0 ? write(kept) : write(FromMemory<Walk>{out});",
        "write(FromMemory<Walk>{out});",
    ),
    "call with weights taken for a plain one": (
        "plain",
        ["layouts"],
        "target.cuh",
        "p.logits.class_stride == 1 && !p.weight &&",
        "p.logits.class_stride == 1 &&",
    ),
    "rows on a grid taken for a line": (
        "plain",
        ["layouts"],
        "target.cuh",
        "return p.dims <= 1 && p.target_type",
        "return p.dims <= 2 && p.target_type",
    ),
    "one of two maxima grows": (
        "plain",
        ["teacher"],
        "divergence.cu",
        "if (top_of > row.of.max || top_from > row.from.max) {",
        "if (top_of > row.of.max && top_from > row.from.max) {",
    ),
    "stride of the logits for that of the teacher": (
        "plain",
        ["teacher"],
        "divergence.cu",
        "row_offset(p, row, p.target.strides)",
        "row_offset(p, row, p.logits.strides)",
    ),
    "kept pieces of a divergence mixed up": (
        "plain",
        ["sharing"],
        "divergence.cu",
        "return plan.kept > 0 ? kept[turn * plan.threads]",
        "return plan.kept > 0 ? kept[turn / 2 * plan.threads]",
    ),
    "lanes' divergences of different maxima": (
        "plain",
        ["sharing"],
        "reduce.cuh",
        "  row.raise(max_of_lanes(row.of.max, width), max_of_lanes(row.from.max, width));",
        "  row.of.raise(max_of_lanes(row.of.max, width));\n  row.from.raise(max_of_lanes(row.from.max, width));",
    ),
    "merged divergences of different maxima": (
        "plain",
        ["sharing"],
        "../row_divergence.h",
        "    other.raise(top_of, top_from);",
        "    other.of.raise(top_of);\n    other.from.raise(top_from);",
    ),
    "shared memory of another state": (
        "address",
        ["sharing"],
        "divergence.cu",
        "shared_states<Walk>(plan) * sizeof(RowDivergence<A>)",
        "shared_states<Walk>(plan) * sizeof(RowState<A>)",
    ),
    "row without weight read": (
        "plain",
        ["teacher"],
        "../operands.h",
        "return row_value<A>(p, p.row_weight, row, 1) != 0;",
        "return row < p.rows;",
    ),
    "no order between the picks' numbers and their readers": (
        "plain",
        ["picks"],
        "picks.cu",
        "  __syncwarp();\n  bool is_repeated",
        "  bool is_repeated",
    ),
    "no order between the coefficients of repeated picks and their readers": (
        "plain",
        ["picks"],
        "picks.cu",
        "  __syncwarp();\n  const LogitTransform",
        "  const LogitTransform",
    ),
    "repeated picks merged where the first lane has one": (
        "plain",
        ["picks"],
        "picks.cu",
        "if (__any_sync(kAllLanes, is_repeated) && lane == 0) {",
        "if (is_repeated && lane == 0) {",
    ),
    "classes of picks taken for neighbours": (
        "plain",
        ["picks"],
        "picks.cu",
        "logits[picks.index(j) * p.logits.class_stride]",
        "logits[picks.index(j)]",
    ),
    "picks without the others' share": (
        "plain",
        ["picks"],
        "picks.cu",
        "background = picks.row.background;",
        "background = 0;",
    ),
    "picks not gathered for the backward pass": (
        "plain",
        ["picks"],
        "backward.cu",
        "    gather_picks(p, stream);\n",
        "",
    ),
    "a shard's own coefficients for those of all": (
        "plain",
        ["shards"],
        "backward.cu",
        "} else if (p.coefficients) {",
        "} else if (p.coefficients && !kGeneral) {",
    ),
    "the shards' coefficients left out of the loss": (
        "plain",
        ["shards"],
        "../shards.h",
        "of_shard[2 * s.rows], of_shard[3 * s.rows]}",
        "of_shard[2 * s.rows], 0}",
    ),
    "a bundle's rows finished before all have their sums": (
        "thread",
        ["shared bundles"],
        "bundles.cu",
        "    __syncthreads();\n    if (kKeeps && p.grad.data) {\n      wait_for_previous();",
        "    if (kKeeps && p.grad.data) {\n      wait_for_previous();",
    ),
    "a bundle's gradient before its rows are finished": (
        "thread",
        ["shared bundles"],
        "bundles.cu",
        "    });\n    __syncthreads();\n    if constexpr (kKeeps) {",
        "    });\n    if constexpr (kKeeps) {",
    ),
    "the next tile of bundles over the rows of this one": (
        "thread",
        ["shared bundles"],
        "bundles.cu",
        "        __syncthreads();\n      }\n    }\n  }\n  wait_for_previous();",
        "      }\n    }\n  }\n  wait_for_previous();",
    ),
    "the next tile of bundles over what the target's logit is read from": (
        "thread",
        ["shared bundles"],
        "bundles.cu",
        "    });\n    __syncthreads();\n    if constexpr (kKeeps) {",
        "    });\n    if (kKeeps && p.grad.data) {\n      __syncthreads();\n    }\n    if constexpr (kKeeps) {",
    ),
    "the next gradient of bundles over the rows of this one": (
        "thread",
        ["shared bundles"],
        "bundles.cu",
        "    __syncthreads();\n  }\n}\n\n// Calls f with",
        "  }\n}\n\n// Calls f with",
    ),
    "the target's logit of another bundle": (
        "plain",
        ["bundles"],
        "bundles.cu",
        "(of - first * kBundle<T>);",
        "(of - first * kBundle<T>) % kBundle<T>;",
    ),
    "a tile's rows behind the last one": (
        "address",
        ["bundles"],
        "bundles.cu",
        "static_cast<int>(left < plan.rows() * kBundle<T> ? left : plan.rows() * kBundle<T>)",
        "plan.rows() * kBundle<T> + static_cast<int>(left - left)",
    ),
    "a bundle ignored with its first row": (
        "plain",
        ["shared bundles"],
        "bundles.cu",
        "CE_NO_UNROLL for (int r = 0; r < kBundle<T>; ++r) {\n    result |=",
        "CE_NO_UNROLL for (int r = 0; r < 1; ++r) {\n    result |=",
    ),
    "gradient of an ignored row in a bundle": (
        "plain",
        ["bundles"],
        "bundles.cu",
        "    if (has_zeros) {",
        "    if (has_zeros && classes.count < 0) {",
    ),
    "bundles over the end of a line": (
        "plain",
        ["bundles"],
        "plan.cu",
        " && p.sizes[p.dims - 1] % bundle == 0;",
        ";",
    ),
    "bundles that are misaligned": (
        "plain",
        ["bundles"],
        "plan.cu",
        "reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 &&",
        "operand.data &&",
    ),
    "elements multiplied by 1": (
        "plain",
        ["scale"],
        "scale.cu",
        "  if (scalar == 1) {\n    return;\n  }\n",
        "",
    ),
    "elements multiplied by every block": (
        "plain",
        ["scale"],
        "scale.cu",
        "  plan.blocks = gridDim.x;\n",
        "",
    ),
}


def test_one_dtype_without_a_mistake(built, tmp_path):
    """In what mistakes are planted in, the same groups find nothing by themselves."""
    copy_one_dtype(tmp_path)
    base = built("plain")
    build = build_changed(base, tmp_path, "plain", including(base, "operands.h"))
    groups = {group for _, groups, *_ in MISTAKES.values() for group in groups}
    result = run(build, *groups, **ONE_DTYPE)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(built, tmp_path, name):
    sanitizer, groups, file, old, new = MISTAKES[name]
    copy_one_dtype(tmp_path)
    path = tmp_path / "csrc/cuda" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has changed: the mistake no longer fits"
    path.write_text(text.replace(old, new))
    base = built(sanitizer)
    for kernel in including(base, path.name):  # most mistakes show in the first
        build = build_changed(base, tmp_path, sanitizer, [kernel])
        result = run(build, *groups, CE_EMULATOR_ORDER="forward", TSAN_OPTIONS="halt_on_error=1", **ONE_DTYPE)
        if result.returncode != 0:
            return
    pytest.fail("the mistake was not found")
