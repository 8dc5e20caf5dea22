"""The options that torch's loss does not have: their forms, and the operators' arguments that they become."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction

from cross_entropy import _C

__all__: list[str] = []

NONE = _Reduction.get_enum("none")


class Options(TypedDict, total=False):
    """Of :func:`cross_entropy.cross_entropy`, where they are described, and the module."""

    class_dim: int | None
    valid_classes: int | None
    logit_scale: float | Tensor
    softcap: float | None
    z_loss: float
    empty: Literal["nan", "zero"]
    loss_dtype: torch.dtype | None


class CallOptions(Options, total=False):
    """Those that differ from call to call too."""

    row_weight: Tensor | None
    divisor: float | Tensor | None


DEFAULTS: CallOptions = {
    "class_dim": None,
    "valid_classes": None,
    "logit_scale": 1.0,
    "softcap": None,
    "z_loss": 0.0,
    "row_weight": None,
    "divisor": None,
    "empty": "nan",
    "loss_dtype": None,
}

F = TypeVar("F", bound=Callable[..., Any])


def shows_options(function: F) -> F:
    """Lets the signature of a function of ``**options`` name them. As parameters they would cost every call time."""
    signature = inspect.signature(function)
    *parameters, _ = signature.parameters.values()
    parameters += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=CallOptions.__annotations__[name]
        )
        for name, default in DEFAULTS.items()
    ]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"cross_entropy(): argument '{name}' must be float, not {type(value).__name__}")
    return float(value)


def _number_or_tensor(name: str, value: Any, default: float | None) -> tuple[float | None, Tensor | None]:
    if isinstance(value, Tensor):
        return default, value
    return _number(name, value), None


class Call:
    """One call with options."""

    def __init__(self, input: Tensor, target: Tensor, reduction: int, given: CallOptions) -> None:
        if unknown := given.keys() - DEFAULTS.keys():
            raise TypeError(f"cross_entropy() got an unexpected keyword argument '{min(unknown)}'")
        options: dict[str, Any] = {**DEFAULTS, **given}
        self.input, self.target, self.reduction = input, target, reduction
        self.row_weight = options["row_weight"]
        self.is_flat = False
        if options["class_dim"] not in (None, -1):
            raise ValueError(f"cross_entropy: class_dim must be None or -1. Got: {options['class_dim']}")
        if options["class_dim"] == -1:
            self.move_classes()
        if options["empty"] not in ("nan", "zero"):
            raise ValueError(f"cross_entropy: empty must be 'nan' or 'zero'. Got: {options['empty']!r}")
        accumulator = torch.float64 if input.dtype == torch.float64 else torch.float32
        if options["loss_dtype"] not in (None, input.dtype, accumulator):
            raise ValueError(
                f"cross_entropy: loss_dtype must be {accumulator} for logits of {input.dtype}. "
                f"Got: {options['loss_dtype']}"
            )
        self.full_precision = options["loss_dtype"] == accumulator
        scale, scale_tensor = _number_or_tensor("logit_scale", options["logit_scale"], 1.0)
        by, by_tensor = (
            (None, None) if options["divisor"] is None else _number_or_tensor("divisor", options["divisor"], None)
        )
        self.arguments: dict[str, Any] = {
            "row_weight": self.row_weight,
            "logit_scale_tensor": scale_tensor,
            "divisor_tensor": by_tensor,
            "z_loss": _number("z_loss", options["z_loss"]),
            "softcap": None if options["softcap"] is None else _number("softcap", options["softcap"]),
            "logit_scale": scale,
            "divisor": by,
            "valid_classes": options["valid_classes"],
            "zero_if_empty": options["empty"] == "zero",
        }

    def move_classes(self) -> None:
        """From the last dimension to where torch has them. Nothing is copied."""
        rows = self.input.shape[:-1]
        is_moved = self.input.dim() > 2
        if self.target.shape == self.input.shape:
            self.target = self.target.movedim(-1, 1) if is_moved else self.target
        elif self.target.dim() == 1 and len(rows) != 1:
            if self.target.numel() != rows.numel():
                raise ValueError(
                    f"Expected input batch_size ({rows.numel()}) to match target batch_size ({self.target.numel()})."
                )
            self.is_flat = True
            self.target = self.target.view(rows)
            if self.row_weight is not None and self.row_weight.dim() == 1:
                self.row_weight = self.row_weight.view(rows)
        if is_moved:
            self.input = self.input.movedim(-1, 1)

    def run(self, weight: Tensor | None, ignore_index: int, label_smoothing: float, inplace: bool) -> Tensor:
        operands = self.input, self.target, weight, self.reduction, ignore_index, label_smoothing
        if is_compiling():
            operators = torch.ops.cross_entropy
            operator = operators.cross_entropy_ if inplace else operators.cross_entropy
            loss: Tensor = operator(*operands, self.full_precision, **self.arguments)
        else:
            loss = _C.cross_entropy_with_options(*operands, inplace, self.full_precision, *self.arguments.values())
        return loss.flatten() if self.is_flat and self.reduction == NONE else loss
