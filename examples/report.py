"""The comparison as a table and as a chart."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from rich.table import Table

from examples.result import Result

FINAL_STEPS = 20

Results = Mapping[str, Mapping[str, Result]]
"""Per task, the result of either loss."""


def largest_difference(torch: Result, ours: Result) -> float:
    """Largest absolute difference between the two loss curves."""
    return max(abs(a - b) for a, b in zip(torch.losses, ours.losses, strict=True))


def relative_difference(torch: Result, ours: Result) -> float:
    """Largest difference between the two loss curves, in parts of torch's loss at that step."""
    return max(abs(a - b) / a for a, b in zip(torch.losses, ours.losses, strict=True))


def make_table(results: Results) -> Table:
    """A row for each task and loss, and the ratio of their times."""
    table = Table(
        title="The same training with either loss",
        collapse_padding=True,
        caption=f"Final loss: mean of the last {FINAL_STEPS} steps. Times: medians; the loss alone "
        "is timed after training, forward and backward. Memory: peak of training, over what was "
        "resident before.",
    )
    for column in ("task", "loss"):
        table.add_column(column, no_wrap=True)
    for column in ("final loss", "held-out accuracy", "ms a step", "in the loss", "peak MiB"):
        table.add_column(column, justify="right")
    for task, by_loss in results.items():
        for loss, result in by_loss.items():
            table.add_row(
                task if loss == "torch" else "",
                loss,
                f"{fmean(result.losses[-FINAL_STEPS:]):.5f}",
                f"{result.accuracy:.2%}",
                f"{result.step_ms:.3g}",
                f"{result.loss_ms:.3g}",
                f"{result.peak_mib:.0f}",
            )
        torch, ours = by_loss["torch"], by_loss["ours"]
        table.add_row(
            "",
            "torch/ours",
            "",
            "",
            f"{torch.step_ms / ours.step_ms:.1f} x",
            f"{torch.loss_ms / ours.loss_ms:.1f} x",
            "",
            style="bold",
            end_section=True,
        )
    return table


def save_chart(results: Results, path: Path) -> None:
    """A panel for each task, its two loss curves lying on each other."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle("Training loss, from the same seed with either loss")
    panels = figure.subplots(1, len(results))
    for axes, (task, by_loss) in zip(panels, results.items(), strict=True):
        steps = range(1, len(by_loss["torch"].losses) + 1)
        axes.plot(
            steps,
            by_loss["torch"].losses,
            color="#f2b84b",
            linewidth=5,
            label="torch.nn.CrossEntropyLoss",
        )
        axes.plot(
            steps,
            by_loss["ours"].losses,
            color="#0b3c6f",
            linewidth=1.2,
            linestyle="--",
            label="cross_entropy.CrossEntropyLoss",
        )
        axes.set(title=task, xlabel="step", ylabel="cross entropy (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
