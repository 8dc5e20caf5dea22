"""Proves the CUDA kernels on this machine's GPU: `make gpu-check`.

Builds for the GPU, runs the tests on it, runs the kernels under compute-sanitizer, and measures them; `python -m
bench.gpu_check tests measure` does only what it names. What passed, what was measured and where is written to
bench/results/<GPU>.json, beside what the file already has of the same commit; a short table comes last. Bandwidths
count the bytes that have to move, N·V·size for forward and twice that for backward and for forward with the gradient,
as a share of a device-to-device copy's in the same turns.
"""

import argparse
import json
import os
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
from torch import Tensor
from torch.nn import functional as F

from .inputs import Logits
from .machine import ROOT, provenance
from .peers import on_torch
from .results import Case
from .shapes import DTYPES, shapes_of
from .timing import Operation, Timed, cuda_clock, take_turns

TESTS = ["autograd", "cross_entropy", "cuda", "deferred_errors", "errors", "special_values", "torch_samples"]
STEPS = ["build", "tests", "memcheck", "racecheck", "synccheck", "initcheck", "measure"]
MEASURED = ["bfloat16", "float16", "float32"]
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


def check(step: str) -> dict[str, Any]:
    if step == "build":
        major, minor = torch.cuda.get_device_capability()
        build = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CROSS_ENTROPY_CUDA": "1"}
        return run(step, sys.executable, "setup.py", "-q", "build_ext", "--inplace", **build)
    if step == "tests":
        files = [f"tests/test_{name}.py" for name in TESTS]
        return run(step, sys.executable, "-m", "pytest", *files, CROSS_ENTROPY_TEST_DEVICE="cuda")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    regimes = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-k", "test_regimes"]
    # Each allocation by itself shows accesses beyond it.
    options = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return run(step, sanitizer, "--tool", step, "--error-exitcode", "1", *regimes, **options)


def measure(rows: int, classes: int, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds of each operator, of a copy and of torch."""
    operators = torch.ops.cross_entropy
    case = Case("cuda", (rows, classes), str(dtype).removeprefix("torch."), torch.get_num_threads())
    inputs = Logits.of(case)
    target, grad = inputs.target, torch.empty_like(inputs.copies[0])
    options = (MEAN, -100, 0.0)
    _, maximum, total, _ = operators.forward(inputs.copies[0], target, None, *options, None)
    upstream = torch.ones((), device="cuda", dtype=dtype)
    eager = on_torch(F.cross_entropy, inputs).operations

    def on_logits(operator: Callable[[Tensor], object]) -> Operation:
        return Operation(lambda call: operator(inputs.logits(call)))

    operations = {
        "copy": on_logits(grad.copy_),
        "forward": on_logits(lambda x: operators.loss(x, target, None, *options, None)),
        "forward with gradient": on_logits(lambda x: operators.forward_grad(x, target, None, *options, None)),
        "backward": on_logits(lambda x: operators.backward(upstream, None, x, target, None, maximum, total, *options)),
        "torch forward": eager["forward"],
        "torch forward + backward": eager["both"],
    }
    timed = {name: Timed(operation, cuda_clock, inputs.calls) for name, operation in operations.items()}
    samples: dict[str, list[float]] = {name: [] for name in operations}

    def failed(name: str, error: Exception) -> None:
        raise error

    take_turns(timed, samples, failed, lambda turn, turns: None, seconds=0.5, fewest=11)
    return {name: median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; all without")
    parser.add_argument("--json", type=Path, help="where the results go instead of bench/results")
    arguments = parser.parse_args()
    chosen = arguments.steps or STEPS
    if unknown := [step for step in chosen if step not in STEPS]:
        parser.error(f"unknown step {unknown[0]}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU and a torch with CUDA: torch.cuda.is_available() is false")

    checks: list[dict[str, Any]] = []
    for step in STEPS:
        if step in chosen and step != "measure":
            checks.append(check(step))
            if step == "build" and not checks[-1]["passed"]:
                sys.exit(1)
    results: list[dict[str, Any]] = []
    here = provenance("cuda")
    for name in MEASURED if "measure" in chosen else []:
        for rows, classes in shapes_of("sweep", "cuda"):
            seconds = measure(rows, classes, DTYPES[name])
            results.append({"rows": rows, "classes": classes, "dtype": name, "seconds": seconds})
            torch.cuda.empty_cache()

    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = arguments.json or ROOT / "bench/results" / f"{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    failed = not all(result["passed"] for result in checks)
    if before and before["provenance"]["commit"] == here["commit"]:
        done = {result["name"] for result in checks}
        checks = [result for result in before["checks"] if result["name"] not in done] + checks
        results = results or before["results"]
    path.write_text(json.dumps({"provenance": here, "checks": checks, "results": results}, indent=1) + "\n")

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
    for result in checks:
        console.print(f"{result['name']}: {'passed' if result['passed'] else 'FAILED'} ({result['last_line']})")
    sys.exit(failed)


if __name__ == "__main__":
    main()
