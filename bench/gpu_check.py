"""Proves the CUDA kernels on this machine's GPU: `make gpu-check`.

Builds for the GPU, runs the tests on it, runs the kernels under compute-sanitizer, and measures them. What is measured,
what passed and where is written to bench/results/<GPU>.json; a short table comes last. Bandwidths count the bytes that
have to move, N·V·size for forward and twice that for backward and for forward with the gradient, as a share of a
device-to-device copy's in the same turns.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
TESTS = ["autograd", "cross_entropy", "cuda", "deferred_errors", "errors", "special_values", "torch_samples"]
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
CLASSES = [128, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 262144]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEAN = 1  # torch's number for the reduction


def run(name: str, *command: str, **environment: str) -> dict[str, Any]:
    print(f"{name} …", flush=True)
    started = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    output = (result.stdout + result.stderr).strip()
    print(f"{name}: {'passed' if result.returncode == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
    if result.returncode != 0:
        print(output[-6000:], flush=True)
    last = output.splitlines()[-1] if output else ""
    return {"name": name, "passed": result.returncode == 0, "seconds": round(seconds), "last_line": last}


def steps(quick: bool) -> list[dict[str, Any]]:
    python = sys.executable
    major, minor = torch.cuda.get_device_capability()
    build = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CROSS_ENTROPY_CUDA": "1"}
    results = [run("build", python, "setup.py", "-q", "build_ext", "--inplace", **build)]
    if not results[0]["passed"]:
        return results
    files = [f"tests/test_{name}.py" for name in TESTS]
    results.append(run("tests", python, "-m", "pytest", *files, CROSS_ENTROPY_TEST_DEVICE="cuda"))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    regimes = ["-m", "pytest", "tests/test_cuda.py", "-k", "test_regimes"]
    for tool in TOOLS[:1] if quick else TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", python, *regimes]
        # Allocations of their own show accesses beyond them; initcheck does not know torch's allocator.
        results.append(run(tool, *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return results


def seconds_of(functions: dict[str, Callable[[int], object]], turns: int, calls: int) -> dict[str, float]:
    """Median seconds a call; all take turns, and `calls` follow each other so that no launch is waited for."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            started.record()
            for call in range(calls):
                function(call)
            ended.record()
            ended.synchronize()
            if turn > 0:
                times[name].append(started.elapsed_time(ended) / 1e3 / calls)
    return {name: median(values) for name, values in times.items()}


def measure(rows: int, classes: int, dtype: torch.dtype) -> dict[str, float]:
    operators = torch.ops.cross_entropy
    size = rows * classes * dtype.itemsize
    copies = max(1, min(8, 2**28 // size))  # more than the caches hold
    logits = [torch.randn(rows, classes, device="cuda", dtype=dtype) for _ in range(copies)]
    leaves = [x.detach().requires_grad_() for x in logits]
    grad = torch.empty_like(logits[0])
    target = torch.randint(classes, (rows,), device="cuda")
    options = (MEAN, -100, 0.0)
    _, maximum, total, _ = operators.forward(logits[0], target, None, *options, None)
    upstream = torch.ones((), device="cuda", dtype=dtype)

    def eager(i: int) -> None:
        leaf = leaves[i % copies]
        torch.autograd.grad(F.cross_entropy(leaf, target), leaf)

    functions: dict[str, Callable[[int], object]] = {
        "copy": lambda i: grad.copy_(logits[i % copies]),
        "forward": lambda i: operators.loss(logits[i % copies], target, None, *options, None),
        "forward with gradient": lambda i: operators.forward_grad(logits[i % copies], target, None, *options, None),
        "backward": lambda i: operators.backward(
            upstream, None, logits[i % copies], target, None, maximum, total, *options
        ),
        "torch forward": lambda i: F.cross_entropy(logits[i % copies], target),
        "torch forward + backward": eager,
    }
    return seconds_of(functions, turns=11, calls=max(copies, 4))


def provenance() -> dict[str, Any]:
    import cross_entropy

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": gpu,
        "commit": commit,
        "command": "make gpu-check",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": cross_entropy.build_info()._asdict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one of compute-sanitizer's tools, few sizes")
    parser.add_argument("--measure-only", action="store_true", help="no build and no tests")
    parser.add_argument("--json", type=Path, help="where the results go instead of bench/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU and a torch with CUDA: torch.cuda.is_available() is false")

    checks = [] if arguments.measure_only else steps(arguments.quick)
    results: list[dict[str, Any]] = []
    if all(check["passed"] for check in checks[:1]):
        import cross_entropy  # noqa: F401 (its operators are measured; it may just have been built)

        for name, dtype in DTYPES.items():
            for classes in CLASSES[::4] if arguments.quick else CLASSES:
                rows = max(4096, min(32768, 2**31 // (classes * dtype.itemsize)))
                seconds = measure(rows, classes, dtype)
                results.append({"rows": rows, "classes": classes, "dtype": name, "seconds": seconds})
                torch.cuda.empty_cache()

    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = arguments.json or ROOT / "bench/results" / f"{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance(), "checks": checks, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")

    table = Table(
        "rows", "classes", "dtype", "copy, GB/s", "forward", "with gradient", "backward", "× torch", "× torch both"
    )
    for result in results:
        s = result["seconds"]
        size = result["rows"] * result["classes"] * DTYPES[result["dtype"]].itemsize
        copy = 2 * size / s["copy"]
        table.add_row(
            str(result["rows"]),
            str(result["classes"]),
            result["dtype"],
            f"{copy / 1e9:.0f}",
            f"{size / s['forward'] / copy:.0%}",
            f"{2 * size / s['forward with gradient'] / copy:.0%}",
            f"{2 * size / s['backward'] / copy:.0%}",
            f"{s['torch forward'] / s['forward']:.1f}",
            f"{s['torch forward + backward'] / s['forward with gradient']:.1f}",
        )
    console = Console(width=120)
    console.print(table)
    for check in checks:
        console.print(f"{check['name']}: {'passed' if check['passed'] else 'FAILED'} ({check['last_line']})")
    sys.exit(0 if all(check["passed"] for check in checks) else 1)


if __name__ == "__main__":
    main()
