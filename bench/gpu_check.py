"""Proves the CUDA kernels on this machine's GPU: `make gpu-check`.

Builds for the GPU, runs the tests on it and the kernels under compute-sanitizer, side by side, and measures them;
`python -m bench.gpu_check tests measure` does only what it names. Where pytest-xdist is installed, PYTEST_ADDOPTS="-n 6
--dist loadgroup" makes the tests faster. What passed, what was measured and where is written to
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .shapes import shapes_of

ROOT = Path(__file__).parents[1]
TESTS = ["autograd", "cross_entropy", "cuda", "deferred_errors", "distillation", "errors", "large_gradients"]
TESTS += ["operators", "options", "parallel", "row_stats", "special_values", "torch_samples"]
SANITIZERS = ["memcheck", "racecheck", "synccheck", "initcheck"]
STEPS = ["build", "tests", "compatibility", *SANITIZERS, "measure"]
MEASURED = ["bfloat16", "float16", "float32"]


def run(name: str, *command: str, **environment: str) -> dict[str, Any]:
    """Runs a command, whose output goes to build/gpu-check."""
    print(f"{name} …", flush=True)
    started = time.perf_counter()
    log = ROOT / "build/gpu-check" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    seconds = time.perf_counter() - started
    output = log.read_text().strip()
    print(f"{name}: {'passed' if status == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
    if status != 0:
        print(output[-6000:], flush=True)
    last = output.splitlines()[-1] if output else ""
    return {"name": name, "passed": status == 0, "seconds": round(seconds), "last_line": last}


def check(step: str) -> dict[str, Any]:
    if step == "build":
        major, minor = torch.cuda.get_device_capability()
        build = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CROSS_ENTROPY_CUDA": "1"}
        return run(step, sys.executable, "setup.py", "-q", "build_ext", "--inplace", **build)
    on_gpu = {"CROSS_ENTROPY_TEST_DEVICE": "cuda"}
    if step in ("tests", "compatibility"):
        files = [f"tests/test_{name}.py" for name in (TESTS if step == "tests" else [step])]
        return run(step, sys.executable, "-m", "pytest", *files, **on_gpu)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    regimes = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-k", "test_regimes"]
    # Each allocation by itself shows accesses beyond it.
    options = on_gpu | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_ADDOPTS": ""}
    return run(step, sanitizer, "--tool", step, "--error-exitcode", "1", *regimes, **options)


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
    if "build" in chosen:
        checks.append(check("build"))
        if not checks[-1]["passed"]:
            sys.exit(1)
    with ThreadPoolExecutor(len(STEPS)) as pool:
        checks += pool.map(check, [step for step in STEPS if step in chosen and step not in ("build", "measure")])
    from .machine import provenance  # imports what has just been built
    from .operators import FIGURES, bandwidth, figures, measure
    from .results import Case

    results: list[dict[str, Any]] = []
    here = provenance("cuda", "bench.gpu_check")
    for name in MEASURED if "measure" in chosen else []:
        for rows, classes in shapes_of("sweep", "cuda"):
            seconds = measure(Case("cuda", (rows, classes), name, torch.get_num_threads()), seconds=0.5)
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

    table = Table("rows", "classes", "dtype", "copy, GB/s", *FIGURES)
    for result in results:
        case = [str(result["rows"]), str(result["classes"]), result["dtype"], f"{bandwidth(result, 'copy') / 1e9:.0f}"]
        table.add_row(*case, *figures(result))
    console = Console(width=120)
    console.print(table)
    for result in checks:
        console.print(f"{result['name']}: {'passed' if result['passed'] else 'FAILED'} ({result['last_line']})")
    sys.exit(failed)


if __name__ == "__main__":
    main()
