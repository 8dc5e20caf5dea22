"""What the options and outputs beyond torch's cost, and what they take from torch's operators.

Each is measured twice: by this library, and put together from torch's operators as one would write it without. The
latter, of float64 logits, is also the oracle of both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cross_entropy
from cross_entropy import distillation_loss, row_stats, topk_distillation_loss

from .inputs import Logits
from .oracle import errors_of
from .peers import Entrant, Loss, Peer, on_torch
from .refusal import Refusal
from .results import OURS, Case

SOFTCAP = 30.0
Z_LOSS = 1e-4
LOGIT_SCALE = 0.7
PICKS = 64
"""Classes of a teacher that tells only the most probable ones."""
IN_TORCH = " in torch"
"""What the names of the others end in."""


@dataclass(frozen=True, kw_only=True)
class Given(Logits):
    """Logits and targets, and what the options take besides."""

    valid_classes: int
    row_weight: Tensor
    divisor: Tensor
    teacher: Tensor

    @staticmethod
    def of(case: Case) -> "Given":
        logits = Logits.of(case)
        rows, classes = case.shape
        valid_classes = classes - classes // 100
        return Given(
            copies=logits.copies,
            target=logits.target % valid_classes,
            calls=logits.calls,
            valid_classes=valid_classes,
            row_weight=torch.rand(rows, device=case.device),
            divisor=torch.full((), 2.0 * rows, device=case.device),
            teacher=torch.randn(case.shape, device=case.device).to(logits.copies[0].dtype),
        )

    @staticmethod
    def bytes_needed(case: Case) -> int:
        """With the teacher, and what the oracle keeps in float64."""
        return Logits.bytes_needed(case) + case.logits_bytes + 8 * 8 * math.prod(case.shape)

    def in_float64(self) -> "Given":
        return replace(
            self,
            copies=[self.copies[0].double()],
            row_weight=self.row_weight.double(),
            divisor=self.divisor.double(),
            teacher=self.teacher.double(),
        )

    def picked(self) -> tuple[Tensor, Tensor]:
        """The teacher's most probable classes of each row, and their probabilities."""
        probabilities, indices = _wide(self.teacher).softmax(1).topk(min(PICKS, self.teacher.shape[1]), 1)
        return indices, probabilities


@dataclass(frozen=True)
class Option:
    """What is measured. Both make a loss of (logits, target) that the other has too."""

    what: str
    ours: Callable[[Given], Loss]
    in_torch: Callable[[Given], Loss]


def _wide(x: Tensor) -> Tensor:
    """In the type that the library computes in, as one has to do with torch's operators for figures as good."""
    return x if x.dtype == torch.float64 else x.float()


def _loss(*names: str, **options: Any) -> Callable[[Given], Loss]:
    """With these options, and those of these names as they are given."""
    return lambda given: partial(
        cross_entropy.cross_entropy, **{name: getattr(given, name) for name in names}, **options
    )


def _of_logits(change: Callable[[Tensor, Given], Tensor]) -> Callable[[Given], Loss]:
    """Torch's loss of logits that were changed before."""
    return lambda given: lambda logits, target: F.cross_entropy(change(_wide(logits), given), target)


def _z_loss_in_torch(given: Given) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        z = _wide(logits)
        return F.cross_entropy(z, target) + Z_LOSS * z.logsumexp(1).square().mean()

    return loss


def _row_weight_in_torch(given: Given) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        of_rows = F.cross_entropy(_wide(logits), target, reduction="none")
        return (of_rows * given.row_weight).sum() / given.row_weight.sum()

    return loss


def _of_int32(loss: Loss) -> Callable[[Given], Loss]:
    def make(given: Given) -> Loss:
        indices = given.target.int()
        return lambda logits, target: loss(logits, indices)

    return make


def _softcapped(x: Tensor, given: Given) -> Tensor:
    return SOFTCAP * torch.tanh(x / SOFTCAP)


def _all_options_in_torch(given: Given) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        z = _softcapped(_wide(logits[:, : given.valid_classes]) * LOGIT_SCALE, given)
        of_rows = F.cross_entropy(z, target, reduction="none", label_smoothing=0.1) + Z_LOSS * z.logsumexp(1).square()
        return (of_rows * given.row_weight).sum() / given.divisor

    return loss


def _outputs(*names: str) -> Callable[[Given], Loss]:
    """The mean of the outputs' sum, so that there is a gradient of them all."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        values = row_stats(logits, target, outputs=names)
        return reduce(add, [value.mean() for value in values])

    return lambda given: loss


def _log_prob_of(log_p: Tensor, target: Tensor) -> Tensor:
    return log_p.gather(1, target[:, None]).mean()


def _entropy_of(log_p: Tensor, target: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(1).mean()


def _outputs_in_torch(*outputs: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Given], Loss]:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        log_p = _wide(logits).log_softmax(1)
        return reduce(add, [output(log_p, target) for output in outputs])

    return lambda given: loss


def _teacher(reverse: bool) -> Callable[[Given], Loss]:
    return lambda given: lambda logits, target: distillation_loss(logits, given.teacher, class_dim=1, reverse=reverse)


def _teacher_in_torch(reverse: bool) -> Callable[[Given], Loss]:
    def make(given: Given) -> Loss:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            ln_p, ln_q = (_wide(x).log_softmax(1) for x in (logits, given.teacher))
            first, second = (ln_q, ln_p) if reverse else (ln_p, ln_q)
            return F.kl_div(first, second, reduction="batchmean", log_target=True)

        return loss

    return make


def _picks(given: Given) -> Loss:
    indices, probabilities = given.picked()
    return lambda logits, target: topk_distillation_loss(logits, indices, probabilities, class_dim=1)


def _picks_in_torch(given: Given) -> Loss:
    indices, q = given.picked()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        ln_p = _wide(logits).log_softmax(1).gather(1, indices)
        return (q * (q.log() - ln_p)).sum(1).mean()

    return loss


OPTIONS = {
    OURS: Option("the loss without any of them", _loss(), lambda given: F.cross_entropy),
    "z_loss": Option(f"z_loss={Z_LOSS}", _loss(z_loss=Z_LOSS), _z_loss_in_torch),
    "softcap": Option(f"softcap={SOFTCAP}", _loss(softcap=SOFTCAP), _of_logits(_softcapped)),
    "logit_scale": Option(
        f"logit_scale={LOGIT_SCALE}", _loss(logit_scale=LOGIT_SCALE), _of_logits(lambda x, given: x * LOGIT_SCALE)
    ),
    "row_weight": Option(
        "a weight for each row",
        _loss("row_weight"),
        _row_weight_in_torch,
    ),
    "divisor": Option(
        "a divisor that is a tensor",
        _loss("divisor"),
        lambda given: lambda logits, target: F.cross_entropy(_wide(logits), target, reduction="sum") / given.divisor,
    ),
    "valid_classes": Option(
        "a hundredth of the classes is padding",
        _loss("valid_classes"),
        _of_logits(lambda x, given: x[:, : given.valid_classes]),
    ),
    "empty": Option(
        'empty="zero"',
        _loss(empty="zero"),
        lambda given: lambda logits, target: F.cross_entropy(_wide(logits), target).nan_to_num(),
    ),
    "loss_dtype": Option(
        "a loss in the type it is computed in",
        lambda given: partial(cross_entropy.cross_entropy, loss_dtype=_wide(given.copies[0][:1]).dtype),
        _of_logits(lambda x, given: x),
    ),
    "int32": Option(
        "a target in int32",
        _of_int32(cross_entropy.cross_entropy),
        _of_int32(lambda logits, indices: F.cross_entropy(logits, indices.long())),
    ),
    "class_dim": Option(
        "class_dim=-1 of logits (1, rows, classes)",
        lambda given: lambda logits, target: cross_entropy.cross_entropy(logits[None], target[None], class_dim=-1),
        lambda given: lambda logits, target: F.cross_entropy(logits[None].flatten(0, 1), target[None].flatten()),
    ),
    "all": Option(
        "z_loss, softcap, logit_scale, row_weight, divisor, valid_classes and label smoothing",
        _loss(
            *("row_weight", "divisor", "valid_classes"),
            z_loss=Z_LOSS,
            softcap=SOFTCAP,
            logit_scale=LOGIT_SCALE,
            label_smoothing=0.1,
        ),
        _all_options_in_torch,
    ),
    "loss": Option(
        "the loss as an output: of each row, with its gradient in the backward pass",
        _outputs("loss"),
        lambda given: lambda logits, target: F.cross_entropy(_wide(logits), target, reduction="none").mean(),
    ),
    "log_prob": Option("the target's log-probability", _outputs("log_prob"), _outputs_in_torch(_log_prob_of)),
    "entropy": Option("the entropy", _outputs("entropy"), _outputs_in_torch(_entropy_of)),
    "log_prob+entropy": Option(
        "both in one pass", _outputs("log_prob", "entropy"), _outputs_in_torch(_log_prob_of, _entropy_of)
    ),
    "distillation": Option(
        "the divergence from a teacher's logits, which are read too", _teacher(False), _teacher_in_torch(False)
    ),
    "reverse": Option("the reverse divergence from a teacher's logits", _teacher(True), _teacher_in_torch(True)),
    "topk": Option(f"the divergence from a teacher's {PICKS} most probable classes", _picks, _picks_in_torch),
}


def competitors(names: list[str] | None) -> list[Peer]:
    """The loss without options, and each of the named options, or all, by this library and by torch's operators."""
    for name in names or []:
        if name not in OPTIONS:
            raise Refusal(f"unknown option {name!r}; there are {', '.join(OPTIONS)}")
    shown = {name: option for name, option in OPTIONS.items() if not names or name in (OURS, *names)}

    def peer(name: str, what: str, make: Callable[[Given], Loss]) -> Peer:
        return Peer(name, what, loss=lambda: make, enter=_enter)

    return [
        competitor
        for name, option in shown.items()
        for competitor in (
            peer(name, option.what, option.ours),
            peer(name + IN_TORCH, f"{option.what}, put together from torch's operators", option.in_torch),
        )
    ]


def _enter(make: Callable[[Given], Loss], given: Any) -> Entrant:
    return on_torch(make(given), given)


def option_errors(peer: Peer, given: Given, losses: list[Tensor], gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """Errors of the loss and of the gradient to the logits."""
    right = given.in_float64()
    x = right.copies[0].requires_grad_()
    expected = OPTIONS[peer.name.removesuffix(IN_TORCH)].in_torch(right)(x, right.target)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    return errors_of(losses, gradients[0], expected.item(), expected_gradient)
