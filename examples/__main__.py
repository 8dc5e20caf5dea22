"""Train both examples with torch's loss and with ours, and compare: `python -m examples`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from examples.report import largest_difference, make_table, relative_difference, save_chart
from examples.result import Result

TASKS = {"digits": "examples.digits", "language model": "examples.language_model"}
TOLERANCE = 1e-3


def run(module: str, loss: str, quick: bool, progress: Progress, description: str) -> Result:
    """Train in a fresh process, whose peak memory is then its own, and show its progress."""
    bar = progress.add_task(description, total=None, loss="reading the data")
    command = [sys.executable, "-m", module, "--json", "--loss", loss]
    if quick:
        command.append("--quick")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if "result" in event:
                return Result(**event["result"])
            progress.update(
                bar,
                completed=event["step"],
                total=event["steps"],
                loss=f"loss {event['loss']:.4f}",
            )
    sys.exit(f"{description} failed with status {process.returncode}")


def main() -> int:
    """Compare; the exit status is 1 if the loss curves of a task differ."""
    parser = argparse.ArgumentParser(prog="python -m examples", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"), help="the chart")
    arguments = parser.parse_args()

    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        results: dict[str, dict[str, Result]] = {}
        for task, module in TASKS.items():
            results[task] = {}
            for loss in ("torch", "ours"):
                description = f"{task}, {loss}"
                results[task][loss] = run(module, loss, arguments.quick, progress, description)

    console.print(make_table(results))
    status = 0
    for task, by_loss in results.items():
        absolute, relative = largest_difference(**by_loss), relative_difference(**by_loss)
        console.print(f"{task}: the loss curves differ by {absolute:.2g} at most (relative {relative:.2g})")
        if relative > TOLERANCE:
            console.print(f"{task}: the losses do not agree, {TOLERANCE:g} relative is the limit")
            status = 1
    save_chart(results, arguments.output)
    console.print(f"chart: {arguments.output}")
    return status


if __name__ == "__main__":
    sys.exit(main())
