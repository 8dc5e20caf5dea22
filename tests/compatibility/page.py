"""docs/compatibility.md, from the table that the tests run."""

import datetime
import functools
import json
import platform
from pathlib import Path

import torch

import cross_entropy
from tests.compatibility.cells import GROUPS, OPTIONS, WAYS, Option

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"


@functools.cache
def run_on_gpu() -> str:
    """Where all cells have passed on a GPU, by what `make gpu-check` has written last; empty if nowhere."""
    runs = {}
    for path in (ROOT / "bench/results").glob("*.json"):
        results = json.loads(path.read_text())
        if any(check["name"] == "compatibility" and check["passed"] for check in results.get("checks", [])):
            where = results["provenance"]
            runs[where["date"]] = (
                f"{where['gpu']}, torch {where['torch']}, commit {where['commit'][:7]}, {where['date']}"
            )
    return runs[max(runs)] if runs else ""


def notes(group: str) -> list[str]:
    if group == "Distributed":
        return ["Two processes, gloo, on the CPU. A batch that is no multiple of two.", ""]
    if group == "CUDA":
        where = f"passed on {run_on_gpu()}" if run_on_gpu() else "need a GPU and have **not been run on one yet**"
        return [f"These, and all of the above but for Distributed on CUDA tensors, {where}.", ""]
    return []


def call_of(option: Option) -> str:
    given = [f"{name}={value!r}" for name, value in option.options.items()]
    given += ['outputs=("log_prob", "entropy")'] * (option.call == "outputs")
    given += ["row_weight=…"] * (option.call == "beyond torch")
    given += ["weight=…"] * option.weighted + ["inplace=True"] * (option.call == "inplace")
    functions = {"outputs": "row_stats", "beyond torch": "cross_entropy", "inplace": "cross_entropy"}
    function = functions.get(option.call, option.call)
    if option.call == "CrossEntropyLoss":
        return f"`{function}({', '.join(given)})(…)`"
    return f"`{function}({', '.join(['…', *given])})`"


def describe(option: Option) -> str:
    shape = "(N, C, d)" if len(option.shape) > 2 else "(N, C)"
    target = "class probabilities" if option.soft else "class indices"
    target = "a teacher's logits" if option.call == "distillation_loss" else target
    return f"{call_of(option)} of {str(option.dtype).removeprefix('torch.')} {shape}, {target}"


def tables() -> str:
    lines = ["| column | the call |", "|---|---|"]
    lines += [f"| {name} | {describe(option)} |" for name, option in OPTIONS.items()]
    errors: list[str] = []

    def cell(way: str, option: str) -> str:
        if WAYS[way].group == "CUDA" and not run_on_gpu():
            return "not run"
        if message := WAYS[way].raises.get(option):
            if message not in errors:
                errors.append(message)
            return f"error {errors.index(message) + 1}"
        return "" if option in WAYS[way].without else "✓"

    for group in GROUPS:
        lines += ["", f"## {group}", "", *notes(group)]
        lines += [f"| | {' | '.join(OPTIONS)} |", f"|---|{':-:|' * len(OPTIONS)}"]
        for name in (name for name, way in WAYS.items() if way.group == group):
            shown = name.replace("__", r"\_\_")
            lines.append(f"| {shown} | {' | '.join(cell(name, option) for option in OPTIONS)} |")
    lines += ["", "## Errors", ""]
    lines += [f"{number}. … {message} …" for number, message in enumerate(errors, 1)]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# What works with what

Each cell is a test (`tests/compatibility/`): what cross_entropy computes in this way of using PyTorch, loss and
gradients, is compared with what torch.nn.functional.cross_entropy does in float64. ✓ works, "error" raises the error
below, a gap makes no sense. `make compatibility` runs them all and writes this page; `make emulate` runs them on the
CUDA kernels, emulated on the CPU. Torch's own generic tests of operators run besides: OpInfo and ModuleInfo samples,
gradcheck and gradgradcheck with their batched and forward-mode forms, composite compliance, fake tensors against real
ones, `torch.library.opcheck` of every registered operator (`tests/test_torch_samples.py`, `tests/test_operators.py`).

"""


def provenance() -> str:
    build = cross_entropy.build_info()
    kernels = "emulated CUDA kernels" if build.emulated else f"CPU kernels ({build.cpu})"
    versions = f"cross_entropy {build.version}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"Last run {datetime.date.today()}: {versions}, {kernels}, {platform.system()} {platform.machine()}.\n\n"


def write() -> None:
    PAGE.write_text(INTRODUCTION + provenance() + tables())
