"""How far a competitor's results are from a float64 oracle: torch's loss of the same logits in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import Head, Logits

CHUNK = 2**24
"""Logits that are taken to float64 at once."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The largest relative error of a loss or a gradient that is still called right: some roundings of the dtype."""


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    step = max(1, CHUNK // classes)
    return (slice(first, first + step) for first in range(0, rows, step))


class _Norms:
    """The norm of a gradient's error in parts of the gradient's norm, from its parts.

    What an element loses because its dtype has no smaller numbers is no error: the gradient of a float16 mean over many
    rows is that small, which is why such training scales its loss.
    """

    def __init__(self) -> None:
        self.wrong = self.right = 0.0

    def add(self, gradient: Tensor, expected: Tensor) -> None:
        limits = torch.finfo(gradient.dtype)
        unavoidable = limits.smallest_normal * limits.eps / 2
        self.wrong += ((gradient.double() - expected).abs() - unavoidable).relu().square().sum().item()
        self.right += expected.square().sum().item()

    def relative(self) -> float:
        return (self.wrong / self.right) ** 0.5 if self.right else float(self.wrong > 0)


def _loss_error(losses: list[Tensor], expected: float) -> float:
    scale = abs(expected) or 1.0
    # max() would lose a NaN.
    return torch.tensor([abs(loss.item() - expected) / scale for loss in losses]).max().item()


def errors_of(losses: list[Tensor], gradient: Tensor, expected: float, expected_gradient: Tensor) -> dict[str, float]:
    """Errors of a loss, computed in some ways, and of its gradient."""
    norms = _Norms()
    norms.add(gradient, expected_gradient)
    return {"loss": _loss_error(losses, expected), "gradient": norms.relative()}


def loss_errors(inputs: Logits, losses: list[Tensor], gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """Errors of the mean loss of the first copy, computed in some ways, and of the gradient to the logits."""
    (gradient,) = gradients
    logits, rows = inputs.copies[0], inputs.target.numel()
    expected, norms = 0.0, _Norms()
    for part in _chunks(len(logits), logits[0].numel()):
        x = logits[part].double().requires_grad_()
        loss = F.cross_entropy(x, inputs.target[part], reduction="sum") / rows
        norms.add(gradient[part], torch.autograd.grad(loss, x)[0])
        expected += loss.item()
    return {"loss": _loss_error(losses, expected), "gradient": norms.relative()}


def step_errors(inputs: Head, losses: list[Tensor], gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """Errors of the mean loss of a training step, and of the worse of its gradients to features and weight."""
    to_hidden, to_weight = gradients
    rows, classes = len(inputs.hidden), len(inputs.weight)
    weight = inputs.weight.detach().double().requires_grad_()
    expected, of_hidden, of_weight = 0.0, _Norms(), _Norms()
    for part in _chunks(rows, classes):
        x = inputs.hidden.detach()[part].double().requires_grad_()
        part_loss = F.cross_entropy(F.linear(x, weight), inputs.target[part], reduction="sum") / rows
        part_loss.backward()
        assert x.grad is not None
        of_hidden.add(to_hidden[part], x.grad)
        expected += part_loss.item()
    assert weight.grad is not None
    of_weight.add(to_weight, weight.grad)
    gradient = torch.tensor([of_hidden.relative(), of_weight.relative()]).max().item()
    return {"loss": _loss_error(losses, expected), "gradient": gradient}


def is_right(errors: dict[str, float], dtype: torch.dtype) -> bool:
    return all(error <= TOLERANCE[dtype] for error in errors.values())
