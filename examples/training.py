"""The training loop that both examples share, and what it measures.

- A step is timed whole: forward, loss, backward and optimizer; the median over all steps counts.
- The loss is timed after training, forward and backward by itself on one batch's detached logits.
  A clock inside the step could not tell the loss's backward from the model's.
- Memory is the process's peak during training minus its resident size just before. That is why
  each run that is to be compared gets a process of its own.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import cross_entropy
from examples.result import Result

SEED = 0
LOSS_TIMINGS = 50
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "torch": nn.CrossEntropyLoss,
    "ours": cross_entropy.CrossEntropyLoss,
}


@dataclass(frozen=True)
class Task:
    """A model, its loss, its data (inputs and targets) and how long to train."""

    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    training: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    batch_size: int
    steps: int


def train_step(task: Task, inputs: Tensor, targets: Tensor) -> float:
    """Improve the model on one batch; returns the loss."""
    task.optimizer.zero_grad()
    loss = task.loss(task.model(inputs), targets)
    loss.backward()
    task.optimizer.step()
    return loss.item()


def train(task: Task, report: Callable[[int, float], None]) -> Result:
    """Train on random batches, calling `report(step, loss)` after each."""
    inputs, targets = task.training
    generator = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    seconds: list[float] = []
    resident_before = resident_mib()
    for step in range(1, task.steps + 1):
        batch = torch.randint(len(targets), (task.batch_size,), generator=generator)
        started = time.perf_counter()
        loss = train_step(task, inputs[batch], targets[batch])
        seconds.append(time.perf_counter() - started)
        losses.append(loss)
        report(step, loss)
    peak = peak_mib()

    return Result(
        losses=losses,
        accuracy=accuracy(task),
        step_ms=1000 * median(seconds),
        loss_ms=loss_ms(task.loss, task.model(inputs[batch]).detach(), targets[batch]),
        peak_mib=peak - resident_before,
    )


@torch.no_grad()
def accuracy(task: Task) -> float:
    """Share of the held-out targets that the model ranks first."""
    batches = zip(*(tensor.split(task.batch_size) for tensor in task.held_out), strict=True)
    correct = sum(int((task.model(x).argmax(dim=1) == y).sum()) for x, y in batches)
    return correct / len(task.held_out[1])


def loss_ms(loss: nn.Module, logits: Tensor, targets: Tensor) -> float:
    """Median milliseconds of the loss's forward and backward."""
    logits.requires_grad_()
    seconds = []
    for _ in range(LOSS_TIMINGS):
        started = time.perf_counter()
        torch.autograd.grad(loss(logits, targets), logits)
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds)


def resident_mib() -> float:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """Largest resident memory this process ever had; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(make_task: Callable[[Callable[..., nn.Module], bool], Task]) -> None:
    """Train `make_task(loss class, quick)` as the command line asks and print how it goes."""
    parser = argparse.ArgumentParser(description="Train one model with one of the two losses.")
    parser.add_argument("--loss", choices=LOSSES, default="ours")
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    task = make_task(LOSSES[arguments.loss], arguments.quick)

    def report(step: int, loss: float) -> None:
        if arguments.json:
            print(json.dumps({"step": step, "steps": task.steps, "loss": loss}), flush=True)
        else:
            print(f"step {step}/{task.steps}  loss {loss:.4f}")

    result = train(task, report)
    if arguments.json:
        print(json.dumps({"result": asdict(result)}))
    else:
        print(
            f"held-out accuracy {result.accuracy:.1%}, {result.step_ms:.3g} ms a step, "
            f"{result.loss_ms:.3g} ms of it in the loss, peak memory {result.peak_mib:.0f} MiB"
        )
