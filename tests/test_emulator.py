"""The emulator that runs CUDA kernels on a CPU: correct kernels pass, and every planted mistake is seen."""

import os
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "emulator"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DCE_EMULATE", f"-I{SOURCES}"]
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover"],
    "thread": ["-fsanitize=thread"],
}
RUNTIMES = {"plain": [], "address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
ORDERS = ["forward", "reverse", "random"]

CORRECT = [
    "block_sum",
    "sum_of_8",
    "warp_votes",
    "cluster_sum",
    "pass_on",
    "transpose",
    "count",
    "last_block_sum",
    "from_threads",
    "neighbours",
    "through_shared",
    "sum_copies",
]

# name: what the emulator says of it in any build and order.
REFUSED = {
    "barrier_in_a_branch": "__syncthreads",
    "barrier_and_cluster_barrier": "deadlock: waits at __",
    "shuffle_in_a_branch": "exit",
    "shuffle_and_barrier": "deadlock: waits at __",
    "shuffle_after_exit": "exit",
    "shuffle_in_a_partial_warp": "lane 20 has exited or never was",
    "own_lane_not_in_mask": "does not name its own lane",
    "source_not_in_mask": "reads lane 20, which its mask 0x0000ffff does not name",
    "different_operations": "lanes of its mask 0xffffffff wait at __",
    "different_widths": "lanes of its mask 0xffffffff wait at __shfl_xor_sync of 4 bytes with width",
    "different_sizes": "lanes of its mask 0xffffffff wait at __shfl_xor_sync of",
    "bad_width": "__shfl_xor_sync with width 12",
    "misaligned_load": "misaligned access of 16 bytes",
    "misaligned_store": "misaligned access of 8 bytes",
    "cluster_barrier_in_a_branch": "cluster",
    "cluster_arrive_twice": "__cluster_barrier_arrive twice",
    "cluster_arrive_alone": "exits after __cluster_barrier_arrive without __cluster_barrier_wait",
    "cluster_wait_alone": "__cluster_barrier_wait without __cluster_barrier_arrive",
    "message_too_many": "deadlock: waits at mbarrier_wait",
    "message_to_no_mbarrier": "store_async of what is no mbarrier yet",
    "mbarrier_in_global": "mbarrier_init of what is not its shared memory",
    "bad_rank": "rank 2 in a cluster of 2",
    "map_of_global": "of what is not its shared memory",
    "copy_without_wait": "exits with 1 copies that it has not waited for",
    "copy_without_commit": "exits with 1 copies that it has not waited for",
    "copy_over_copy": "__pipeline_memcpy_async to where another copy is under way",
    "copy_of_12_bytes": "__pipeline_memcpy_async of 12 bytes",
    "copy_to_global": "__pipeline_memcpy_async to what is not its shared memory",
    "misaligned_copy": "misaligned access of 16 bytes",
    "large_block": "a block of (32, 33, 1) threads",
    "empty_grid": "a grid of (0, 1, 1) blocks",
    "large_cluster": "a cluster of 32 blocks",
    "cluster_above_maximum": "a cluster of 16 blocks",
    "grid_not_of_clusters": "a grid of 6 blocks along x in clusters of 4",
    "much_shared_memory": "232449 bytes of shared memory, of which there are 232448",
    "outside": "__syncthreads outside a kernel",
    "nested": "launches mistake",
}

# (name, build, order, output): mistakes whose result is wrong in some order, or that a sanitizer reports.
CAUGHT = [
    ("missing_barrier", "plain", "forward", "wrong: neighbours"),
    ("missing_barrier", "plain", "reverse", "wrong: neighbours"),
    ("missing_barrier", "plain", "random", "wrong: neighbours"),
    ("missing_barrier", "thread", "forward", "data race"),
    ("missing_barrier_before_reuse", "plain", "forward", "wrong: neighbours"),
    ("missing_barrier_before_reuse", "thread", "forward", "data race"),
    ("missing_barrier_before_reuse", "thread", "random", "data race"),
    ("missing_syncwarp", "thread", "forward", "data race"),
    ("missing_fences", "thread", "forward", "data race"),
    ("blocks_write_one_address", "thread", "forward", "data race"),
    ("uninitialised_shared", "plain", "forward", "wrong: uninitialised_shared"),
    ("shared_overflow", "address", "forward", "heap-buffer-overflow"),
    ("global_overflow", "address", "forward", "heap-buffer-overflow"),
    ("misaligned_dereference", "address", "forward", "misaligned address"),
    ("missing_cluster_barrier", "thread", "forward", "data race"),
    ("exit_before_remote_read", "plain", "forward", "wrong: exit_before_remote_read"),
    ("exit_before_remote_read", "address", "forward", "use-after-poison"),
    ("exit_before_remote_read", "thread", "forward", "data race"),
    ("message_not_waited_for", "plain", "forward", "wrong: pass_on"),
    ("message_in_one_place", "thread", "forward", "data race"),
    ("copy_read_early", "plain", "forward", "wrong: sum_copies"),
    ("copy_over_what_is_read", "plain", "forward", "wrong: sum_copies"),
    ("copy_without_barrier", "plain", "forward", "wrong: sum_copies"),
    ("copy_without_barrier", "thread", "forward", "data race"),
    ("copy_overflow", "address", "forward", "heap-buffer-overflow"),
    ("map_after_exit", "plain", "forward", "the shared memory of rank 0, which has exited"),
]


def has_runtime(build):
    """Whether the compiler finds the sanitizer's libraries: it prints the bare name of what it does not find."""
    names = ([os.environ.get("CXX", "g++"), f"-print-file-name={name}"] for name in RUNTIMES[build])
    return all("/" in subprocess.check_output(command, text=True) for command in names)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The self-test by build, as far as the sanitizers' libraries are there."""
    directory = tmp_path_factory.mktemp("emulator")
    compiler = [os.environ.get("CXX", "g++"), *FLAGS]
    emulator = directory / "emulator.o"
    subprocess.run([*compiler, "-c", SOURCES / "emulator.cpp", "-o", emulator], check=True)
    built = {}
    for build in filter(has_runtime, SANITIZERS):
        program = directory / build
        command = [*compiler, *SANITIZERS[build], SOURCES / "self_test.cpp", emulator, "-pthread", "-o", program]
        built[build] = program, subprocess.Popen(command)
    for _, process in built.values():
        assert process.wait() == 0
    return {build: program for build, (program, _) in built.items()}


def run(programs, build, order, *cases, **environment):
    if build not in programs:
        pytest.skip(f"no library of the {build} sanitizer")
    environment = os.environ | {"CE_EMULATOR_ORDER": order} | environment
    return subprocess.run([programs[build], *cases], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("build", SANITIZERS)
def test_correct(programs, build, order):
    # ThreadSanitizer takes seconds to make as many fibers.
    large = [] if build == "thread" else ["block_sum_of_1024_threads"]
    result = run(programs, build, order, *CORRECT, *large)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(programs, name, order):
    result = run(programs, "plain", order, name)
    assert result.returncode < 0
    assert result.stderr.startswith("emulator: ") and result.stderr.count("\n") == 1
    assert REFUSED[name] in result.stderr


@pytest.mark.parametrize(("name", "build", "order", "output"), CAUGHT)
def test_caught(programs, name, build, order, output):
    result = run(programs, build, order, name)
    assert result.returncode != 0
    assert output in result.stderr


def test_environment(programs):
    assert run(programs, "plain", "forward", "cluster_sum", CE_EMULATOR_MAX_CLUSTER="16").returncode == 0
    for variable, value, output in [
        ("CE_EMULATOR_MAX_CLUSTER", "8", "cluster_sum: a cluster of 16 blocks"),
        ("CE_EMULATOR_SHARED_MEMORY", "100", "132 bytes of shared memory, of which there are 100"),
        ("CE_EMULATOR_SHARED_MEMORY", "many", "CE_EMULATOR_SHARED_MEMORY=many"),
        ("CE_EMULATOR_ORDER", "sideways", "CE_EMULATOR_ORDER=sideways"),
    ]:
        result = run(programs, "plain", "forward", "cluster_sum", **{variable: value})
        assert result.returncode < 0 and output in result.stderr


def test_names_the_kernel_block_and_thread(programs):
    result = run(programs, "plain", "reverse", "bad_rank")
    where = "emulator: mistake: block (1, 0, 0), thread (31, 0, 0): "
    assert result.stderr == where + "the shared memory of rank 2 in a cluster of 2\n"
