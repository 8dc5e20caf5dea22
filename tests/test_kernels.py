"""The CUDA kernels on the CPU: against an oracle, under the sanitizers, and with mistakes planted in them.

tests/emulator/kernels_test.cpp holds the cases; csrc/cuda is compiled as it is, for the emulator.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-DCE_EMULATE"]
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
KERNELS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))


def compiler(*arguments):
    command = [os.environ.get("CXX", "g++"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def compile_kernels(root, build, sanitizer, names):
    """Objects of csrc/cuda/<name>.cu below `root`."""
    flags = [*FLAGS, *SANITIZERS[sanitizer], f"-I{ROOT / 'tests/emulator'}"]
    objects = [build / f"{name}.o" for name in names]
    sources = [root / "csrc/cuda" / f"{name}.cu" for name in names]
    with ThreadPoolExecutor(2) as pool:
        for done in [
            pool.submit(compiler, *flags, "-x", "c++", "-c", source, "-o", target)
            for source, target in zip(sources, objects, strict=True)
        ]:
            done.result()
    return objects


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """built(sanitizer): the directory of all objects, with the program kernels_test."""
    directories = {}

    def build(sanitizer):
        if sanitizer not in directories:
            directory = tmp_path_factory.mktemp(sanitizer)
            emulator = ROOT / "tests/emulator"
            flags = [*FLAGS, f"-I{emulator}"]
            compiler(*flags, "-O2", "-c", emulator / "emulator.cpp", "-o", directory / "emulator.o")
            test = directory / "kernels_test.o"
            compiler(*flags, *SANITIZERS[sanitizer], "-c", emulator / "kernels_test.cpp", "-o", test)
            compile_kernels(ROOT, directory, sanitizer, KERNELS)
            compiler(*SANITIZERS[sanitizer], *directory.glob("*.o"), "-o", directory / "kernels_test")
            directories[sanitizer] = directory
        return directories[sanitizer]

    return build


def run(directory, *groups, **environment):
    command = [directory / "kernels_test", *groups]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


GROUPS = ["tails", "layouts", "regimes", "sharing", "tables", "special", "many rows"]
# Under ThreadSanitizer a launch takes twenty times as long: one dtype, and what differs in how threads share a row.
RUNS = [
    *[("plain", group, {}) for group in [*GROUPS, "far"]],
    *[("plain", group, {"CE_EMULATOR_ORDER": "random"}) for group in ("layouts", "special")],
    *[("address", group, {}) for group in GROUPS],
    *[("thread", group, {"KERNELS_TEST_DTYPE": "3"}) for group in ("tails", "layouts", "sharing", "special")],
]


@pytest.mark.parametrize(("sanitizer", "group", "environment"), RUNS, ids=lambda value: str(value) if value else "")
def test_kernels(built, sanitizer, group, environment):
    result = run(built(sanitizer), group, **environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert f"{group}: " in result.stdout and ": 0 cases" not in result.stdout


# name: (sanitizer, groups, file, what is replaced, by what). One mistake each that CUDA code is known for.
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
        "      finish(p, row, target, z_target, state);",
        "      finish(p, row, target, z_target, state);\n    }\n    if (rank == 1 && exists) {\n"
        "      finish(p, row, target, target_logit<A, T>(p, row, target), state);",
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
        "judge(p, target) == Verdict::kKept ? row_weight * class_weight<A>(p, target)",
        "judge(p, target) != Verdict::kOutOfBounds ? row_weight * class_weight<A>(p, target < 0 ? 0 : target)",
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
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(built, tmp_path, name):
    sanitizer, groups, file, old, new = MISTAKES[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu"))
    path = tmp_path / "csrc/cuda" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has changed: the mistake no longer fits"
    path.write_text(text.replace(old, new))
    build = tmp_path / "build"
    shutil.copytree(built(sanitizer), build)
    changed = [path.stem] if path.suffix == ".cu" else ["backward", "forward"]
    compile_kernels(tmp_path, build, sanitizer, changed)
    compiler(*SANITIZERS[sanitizer], *build.glob("*.o"), "-o", build / "kernels_test")
    result = run(build, *groups, KERNELS_TEST_DTYPE="3", CE_EMULATOR_ORDER="forward", TSAN_OPTIONS="halt_on_error=1")
    assert result.returncode != 0, "the mistake was not found"
