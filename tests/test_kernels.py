"""The CUDA kernels on the CPU: against an oracle, under the sanitizers, and with mistakes planted in them.

tests/emulator/kernels_test.cpp holds the cases; csrc/cuda is compiled as it is, for the emulator.
"""

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
    """built(sanitizer): the directory of all objects, with the program kernels_test."""
    directories = {}

    def build(sanitizer):
        if sanitizer not in directories:
            directory = tmp_path_factory.mktemp(sanitizer)
            root = ROOT
            if sanitizer == "thread":  # see RUNS
                root = directory
                copy_one_dtype(root)
            sources = [root / "csrc/cuda" / name for name in KERNELS]
            compile_all(directory, sanitizer, [*sources, EMULATOR / "kernels_test.cpp", EMULATOR / "emulator.cpp"])
            compiler(*SANITIZERS[sanitizer], *directory.glob("*.o"), "-o", directory / "kernels_test")
            directories[sanitizer] = directory
        return directories[sanitizer]

    return build


def build_changed(base, root, sanitizer, file):
    """The directory of a kernels_test with the objects of `base`, but for those that include `file`, from `root`."""
    build = root / "build"
    build.mkdir()
    changed = [name for name in KERNELS if re.search(rf"/{file}\s", (base / name).with_suffix(".d").read_text())]
    compile_all(build, sanitizer, [root / "csrc/cuda" / name for name in changed], "-O0", "-g0")  # what runs is short
    objects = [path for path in base.glob("*.o") if f"{path.stem}.cu" not in changed]
    compiler(*SANITIZERS[sanitizer], *objects, *build.glob("*.o"), "-o", build / "kernels_test")
    return build


def run(directory, *groups, **environment):
    command = [directory / "kernels_test", *groups]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


GROUPS = [
    *["tails", "layouts", "regimes", "sharing", "tables", "special", "many rows"],
    *["options", "gradients", "stats", "teacher"],
]
# Under ThreadSanitizer a launch takes twenty times as long: one dtype, and what differs in how threads share a row.
RUNS = [
    *[("plain", group, {}) for group in [*GROUPS, "far"]],
    *[("plain", group, {"CE_EMULATOR_ORDER": "random"}) for group in ("layouts", "special", "sharing")],
    *[("address", group, {}) for group in GROUPS],
    *[("thread", group, ONE_DTYPE) for group in ("tails", "layouts", "sharing", "special")],
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
        "      __syncthreads();\n      state = sum_of_lanes<kGeneral>(shared[thread % warps]",
        "      state = sum_of_lanes<kGeneral>(shared[thread % warps]",
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
    "block leaves its cluster before it was read": (
        "address",
        ["sharing"],
        "reduce.cuh",
        "  cluster_barrier();  // nobody",
        "  // nobody",
    ),
    "last piece left out": (
        "plain",
        ["tails"],
        "row.cuh",
        "(walk.pieces() - rank - 1) / ranks + 1",
        "(walk.pieces() - rank - 1) / ranks",
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
        "kSize > 1 && stride_ == 1 && reinterpret_cast<uintptr_t>(data_ + c) % (sizeof(T) * kSize) == 0",
        "kSize > 1 && stride_ == 1 && reinterpret_cast<uintptr_t>(data_ + c) % sizeof(T) == 0",
    ),
    "stride of the gradient for that of the logits": (
        "plain",
        ["layouts"],
        "backward.cu",
        "walk(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride, exists ? p.classes : 0);\n"
        "    const Coefficients<T> coefficients(p, row);\n"
        "    const RowGradient<A> gradient = gradient_of_row<kGeneral>",
        "walk(p.logits.data, row_offset(p, row, p.grad.strides), p.logits.class_stride, exists ? p.classes : 0);\n"
        "    const Coefficients<T> coefficients(p, row);\n"
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
        "address",
        ["tables"],
        "forward.cu",
        "static_cast<int64_t>(plan.kept) * plan.threads",
        "static_cast<int64_t>(plan.kept) * (plan.threads - 1)",
    ),
    "kept pieces mixed up": (
        "plain",
        ["sharing"],
        "forward.cu",
        "return plan.kept > 0 ? kept[turn * plan.threads]",
        "return plan.kept > 0 ? kept[turn / 2 * plan.threads]",
    ),
    "target logit read when the gradient may have replaced it": (
        "thread",
        ["layouts"],
        "forward.cu",
        "      finish<kGeneral>(p, row, target, z_target, state);",
        "      finish<kGeneral>(p, row, target, z_target, state);\n    }\n    if (rank == 1 && exists) {\n"
        "      finish<kGeneral>(p, row, target, target_logit<A, T>(p, row, target), state);",
    ),
    "bad target read": (
        "address",
        ["special"],
        "target.cuh",
        "if (verdict == Verdict::kKept) {",
        "if (verdict != Verdict::kIgnored) {",
    ),
    "ignored rows counted": (
        "plain",
        ["many rows"],
        "sums.cu",
        "judge(p, target) == Verdict::kKept ? row_weight * weight_of_target<A>(p, target)",
        "judge(p, target) != Verdict::kOutOfBounds ? row_weight * weight_of_target<A>(p, target < 0 ? 0 : target)",
    ),
    "32 bits for the distance of rows": (
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
        "  cluster_barrier();\n  if",
        "  if",
    ),
    "a row too few in the blocks' sums": (
        "plain",
        ["many rows"],
        "sums.cu",
        "first + i * threads < p.rows",
        "first + i * threads < p.rows - 1",
    ),
    "padding written": (
        "plain",
        ["layouts"],
        "forward.cu",
        "      const Walk out(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride,\n"
        "                     exists ? p.classes : 0);",
        "      const Walk out(p.logits.data, row_offset(p, row, p.logits.strides), p.logits.class_stride,\n"
        "                     exists ? (p.classes + Walk::kSize - 1) / Walk::kSize * Walk::kSize : 0);",
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
        "__shfl_xor_sync(kAllLanes, mine.rank, offset, width)",
        "0",
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
}


def test_one_dtype_without_a_mistake(built, tmp_path):
    """In what mistakes are planted in, the same groups find nothing by themselves."""
    copy_one_dtype(tmp_path)
    build = build_changed(built("plain"), tmp_path, "plain", "operands.h")
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
    build = build_changed(built(sanitizer), tmp_path, sanitizer, path.name)
    result = run(build, *groups, CE_EMULATOR_ORDER="forward", TSAN_OPTIONS="halt_on_error=1", **ONE_DTYPE)
    assert result.returncode != 0, "the mistake was not found"
