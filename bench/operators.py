"""Times the operators one by one, which the loss calls together."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import Logits
from .peers import on_torch
from .results import CEILINGS, PASSES, Case
from .shapes import DTYPES
from .timing import Operation, Timed, clock_of, take_turns

MEAN = 1  # torch's number for the reduction
# How often each has to move the logits' bytes between memory and processor.
_PASSES = {
    "copy": CEILINGS["copy"],
    "forward": PASSES["forward"],
    "forward with gradient": PASSES["both"],
    "backward": PASSES["backward"],
    "torch forward": PASSES["forward"],
    "torch forward + backward": PASSES["both"],
}
FIGURES = ["forward", "with gradient", "backward", "× torch", "× torch both"]


def bandwidth(result: dict[str, Any], name: str) -> float:
    """Bytes a second, of those that have to move."""
    size = result["rows"] * result["classes"] * DTYPES[result["dtype"]].itemsize
    return _PASSES[name] * size / float(result["seconds"][name])


def share(result: dict[str, Any], name: str) -> float:
    """A bandwidth in parts of the copy's."""
    return bandwidth(result, name) / bandwidth(result, "copy")


def figures(result: dict[str, Any]) -> list[str]:
    """Of a case's times: shares of the copy's bandwidth, and ratios to torch."""
    s = result["seconds"]
    return [
        *(f"{share(result, name):.0%}" for name in ("forward", "forward with gradient", "backward")),
        f"{s['torch forward'] / s['forward']:.1f}",
        f"{s['torch forward + backward'] / s['forward with gradient']:.1f}",
    ]


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Median seconds of each operator, of a copy and of torch, all in turns for so long."""
    operators = torch.ops.cross_entropy
    inputs = Logits.of(case)
    target, grad = inputs.target, torch.empty_like(inputs.copies[0])
    options = (MEAN, -100, 0.0)
    _, maximum, total, _ = operators.forward(inputs.copies[0], target, None, *options)
    upstream = torch.ones((), device=case.device, dtype=inputs.copies[0].dtype)
    eager = on_torch(F.cross_entropy, inputs).operations

    def on_logits(operator: Callable[[Tensor], object]) -> Operation:
        return Operation(lambda call: operator(inputs.logits(call)))

    operations = {
        "copy": on_logits(grad.copy_),
        "forward": on_logits(lambda x: operators.loss(x, target, None, *options)),
        "forward with gradient": on_logits(lambda x: operators.forward_grad(x, target, None, *options)),
        "backward": on_logits(
            lambda x: operators.backward(upstream, None, maximum, total, *[None] * 7, x, target, None, *options)
        ),
        "torch forward": eager["forward"],
        "torch forward + backward": eager["both"],
    }
    timed = {name: Timed(operation, clock_of(case.device), inputs.calls) for name, operation in operations.items()}
    samples: dict[str, list[float]] = {name: [] for name in operations}

    def failed(name: str, error: Exception) -> None:
        raise error

    take_turns(timed, samples, failed, lambda turn, turns: None, seconds, fewest=11)
    return {name: median(values) for name, values in samples.items()}
