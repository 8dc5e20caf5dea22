"""The loss against torch eager and torch.compile on this machine's CPU: `python -m bench`.

All competitors are timed in one process, taking turns, and the median counts. Forward is without a gradient; forward +
backward includes the time of autograd and the memory of the gradient. GB/s count the bytes of the logits, once; the
ceiling is a sum over as many bytes of float32, the fastest way to read them that torch has, in the same turns.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import cross_entropy

SHAPES = [(512, 32000), (256, 128256), (1024, 1000), (32, 10)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Loss = Callable[[Tensor, Tensor], Tensor]


def take_turns(functions: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Median seconds of each function; each returns the seconds that count."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            seconds[name].append(function())
    return {name: median(values) for name, values in seconds.items()}


def timed(function: Callable[[], object], calls: int = 1) -> float:
    """Seconds a call."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def measure(shape: tuple[int, int], dtype: torch.dtype, compiled: Loss) -> dict[str, float]:
    """Median seconds of every competitor at one shape."""
    rows, classes = shape
    torch.manual_seed(0)
    logits = torch.randn(shape).to(dtype)
    leaf = logits.clone().requires_grad_()
    target = torch.randint(classes, (rows,))
    same_bytes = torch.ones(max(1, logits.nbytes // 16384), 4096)
    losses: dict[str, Loss] = {"torch": F.cross_entropy, "compile": compiled, "ours": cross_entropy.cross_entropy}

    size = rows * classes
    calls = 50 if size < 10**4 else 1  # a turn of one small call would find the caches cold

    def forward(loss: Loss) -> float:
        return timed(lambda: loss(logits, target), calls)

    def step(loss: Loss) -> None:
        leaf.grad = None
        loss(leaf, target).backward()

    def both(loss: Loss) -> float:
        leaf.grad = None  # the time that freeing takes is not counted
        return timed(lambda: step(loss), calls)

    def both_in_fresh_memory() -> float:
        kept = torch.autograd.grad(losses["ours"](leaf, target), leaf)  # so that its memory cannot be used again
        seconds = timed(lambda: torch.autograd.grad(losses["ours"](leaf, target), leaf))
        del kept
        return seconds

    def both_inplace() -> float:
        copy = leaf * 1  # a leaf cannot be overwritten
        edge = torch.autograd.graph.get_gradient_edge(copy)
        return timed(lambda: torch.autograd.grad(cross_entropy.cross_entropy(copy, target, inplace=True), edge))

    def with_one_thread(function: Callable[[], float]) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    turns = 41 if size < 10**7 else 9
    functions: dict[str, Callable[[], float]] = {"read": lambda: timed(lambda: same_bytes.sum(1))}
    for name, loss in losses.items():
        functions[f"{name} forward"] = lambda loss=loss: forward(loss)  # type: ignore[misc]
        functions[f"{name} both"] = lambda loss=loss: both(loss)  # type: ignore[misc]
    functions["inplace both"] = both_inplace
    functions["fresh both"] = both_in_fresh_memory
    if torch.get_num_threads() > 1 and calls == 1:
        functions["ours forward, 1 thread"] = lambda: with_one_thread(lambda: forward(losses["ours"]))
        functions["ours both, 1 thread"] = lambda: with_one_thread(lambda: both(losses["ours"]))
    return take_turns(functions, turns)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the medians and where they were measured to this file")
    arguments = parser.parse_args()

    results = []
    cases = [(t, shape, name) for t in arguments.threads for shape in SHAPES for name in DTYPES]
    for threads, shape, name in track(cases, description="measuring"):
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        seconds = measure(shape, DTYPES[name], torch.compile(F.cross_entropy))
        results.append({"threads": threads, "shape": shape, "dtype": name, "seconds": seconds})

    table = Table(
        title="Times faster than torch eager (than torch.compile); in place: than ours in memory used before (in fresh "
        "memory); threads: than ours with 1"
    )
    columns = ["threads", "shape", "dtype", "forward", "ms", "GB/s", "of ceiling", "forward + backward", "ms"]
    for column in [*columns, "in place", "threads"]:
        table.add_column(column, justify="right")
    for result in results:
        s, shape = result["seconds"], result["shape"]
        size = shape[0] * shape[1] * DTYPES[result["dtype"]].itemsize
        alone = [(s.get(f"ours {what}, 1 thread"), s[f"ours {what}"]) for what in ("forward", "both")]
        table.add_row(
            str(result["threads"]),
            str(shape),
            result["dtype"],
            f"{s['torch forward'] / s['ours forward']:.1f} ({s['compile forward'] / s['ours forward']:.1f})",
            f"{s['ours forward'] * 1e3:.3f}",
            f"{size / s['ours forward'] / 1e9:.1f}",
            f"{s['read'] / s['ours forward']:.0%}",
            f"{s['torch both'] / s['ours both']:.1f} ({s['compile both'] / s['ours both']:.1f})",
            f"{s['ours both'] * 1e3:.3f}",
            f"{s['ours both'] / s['inplace both']:.1f} ({s['fresh both'] / s['inplace both']:.1f})",
            ", ".join(f"{one / several:.1f}" for one, several in alone if one is not None),
        )
    Console(width=150).print(table)
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        provenance = {"cpu": cpu[0], "cores": len(cpu), "python": platform.python_version(), "commit": commit}
        provenance |= {"torch": torch.__version__, "isa": cross_entropy.build_info().cpu, "command": "python -m bench"}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"provenance": provenance, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
