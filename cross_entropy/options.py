"""The options that torch's loss does not have: their forms, and the operators' arguments that they become."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeVar, get_args

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction

from cross_entropy import _C

__all__: list[str] = []

NONE = _Reduction.get_enum("none")


class RowOptions(TypedDict, total=False):
    """What is to be done with each row, for all functions; :func:`cross_entropy.cross_entropy` describes them."""

    class_dim: int | None
    valid_classes: int | None
    logit_scale: float | Tensor
    softcap: float | None
    z_loss: float


class Options(RowOptions, total=False):
    """Of a loss, and so of the module."""

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

# Where an output is among the results of the operator `stats`, and the bits that ask for what is not always there.
PLACES = {
    "loss": 0,
    "maximum": 1,
    "logsumexp": 3,
    "log_prob": 4,
    "entropy": 5,
    "argmax": 6,
    "rank": 7,
    "correct": 7,  # a rank of 0
}
BITS = {"log_prob": 1, "entropy": 2, "argmax": 4, "rank": 8, "correct": 8}
OUTPUTS = ("loss", "logsumexp", "maximum", "log_prob", "entropy", "argmax", "correct", "rank")
OF_THE_TARGET = ("loss", "log_prob", "correct", "rank")
OF_AN_INDEX = ("log_prob", "correct", "rank")

F = TypeVar("F", bound=Callable[..., Any])


def shows_options(function: F) -> F:
    """Lets the signature of a function of ``**options`` name them. As parameters they would cost every call time."""
    signature = inspect.signature(function)
    *parameters, options = signature.parameters.values()
    annotations = get_args(options.annotation)[0].__annotations__
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[name])
        for name, default in DEFAULTS.items()
        if name in annotations
    ]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def check_outputs(outputs: tuple[str, ...], logits: Tensor, target: Tensor | None, options: RowOptions) -> None:
    check_names("row_stats", options, RowOptions)
    if not outputs:
        raise ValueError("row_stats: outputs is empty")
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"row_stats: outputs are {', '.join(OUTPUTS)}. Got: {name!r}")
        if outputs.count(name) > 1:
            raise ValueError(f"row_stats: {name!r} is asked for twice in outputs")
        if target is None and name in OF_THE_TARGET:
            raise TypeError(f"row_stats() needs a target for the output {name!r}")
        if target is not None and target.shape == logits.shape and name in OF_AN_INDEX:
            raise ValueError(
                f"row_stats: the output {name!r} is of class indices, and target holds class probabilities"
            )


def unexpected(function: str, name: str) -> TypeError:
    return TypeError(f"{function}() got an unexpected keyword argument '{name}'")


def check_names(function: str, given: Mapping[str, Any], known: type) -> None:
    if unknown := given.keys() - known.__annotations__.keys():
        raise unexpected(function, min(unknown))


def accumulator_of(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# What of an option is a tensor has an argument of its own.
TENSORS = {"logit_scale": "logit_scale_tensor", "divisor": "divisor_tensor"}


class Call:
    """One call with options: the operands as the operators take them, and the arguments that were given by name."""

    def __init__(
        self,
        input: Tensor,
        target: Tensor | None,
        reduction: int,
        given: CallOptions | RowOptions,
        **arguments: Any,
    ) -> None:
        self.arguments = arguments
        is_last = False
        for name, value in given.items():
            if name == "class_dim":
                if value is not None and value != -1:
                    raise ValueError(f"cross_entropy: class_dim must be None or -1. Got: {value}")
                is_last = value is not None
            elif name == "empty":
                if value not in ("nan", "zero"):
                    raise ValueError(f"cross_entropy: empty must be 'nan' or 'zero'. Got: {value!r}")
                arguments["zero_if_empty"] = value == "zero"
            elif name == "loss_dtype":
                accumulator = accumulator_of(input)
                if value not in (None, input.dtype, accumulator):
                    raise ValueError(
                        f"cross_entropy: loss_dtype must be {accumulator} for logits of {input.dtype}. Got: {value}"
                    )
                arguments["full_precision"] = value == accumulator
            elif name in TENSORS and isinstance(value, Tensor):
                arguments[TENSORS[name]] = value
            elif name in DEFAULTS:
                arguments[name] = value
            else:
                raise unexpected("cross_entropy", name)
        self.input, self.reduction, self.is_flat = input, reduction, False
        self.target: Any = target  # None where nothing depends on it
        if is_last:
            self.move_classes()

    def move_classes(self) -> None:
        """From the last dimension to where torch has them. Nothing is copied."""
        rows = self.input.shape[:-1]
        is_moved = self.input.dim() > 2
        picked, row_weight = self.arguments.get("picked"), self.arguments.get("row_weight")
        if self.target is None:
            pass
        elif picked is not None:
            if is_moved and self.target.dim() == picked.dim() == self.input.dim():
                self.target, self.arguments["picked"] = self.target.movedim(-1, 1), picked.movedim(-1, 1)
        elif self.target.shape == self.input.shape:
            self.target = self.target.movedim(-1, 1) if is_moved else self.target
        elif self.target.dim() == 1 and len(rows) != 1:
            if self.target.numel() != rows.numel():
                raise ValueError(
                    f"Expected input batch_size ({rows.numel()}) to match target batch_size ({self.target.numel()})."
                )
            self.is_flat = True
            self.target = self.target.view(rows)
            if row_weight is not None and row_weight.dim() == 1:
                self.arguments["row_weight"] = row_weight.view(rows)
        if is_moved:
            self.input = self.input.movedim(-1, 1)

    def run(self, weight: Tensor | None, ignore_index: int, label_smoothing: float, inplace: bool) -> Tensor:
        operands = self.input, self.target, weight, self.reduction, ignore_index, label_smoothing
        if is_compiling():
            operators = torch.ops.cross_entropy
            operator = operators.cross_entropy_ if inplace else operators.cross_entropy
            loss: Tensor = operator(*operands, **self.arguments)
        else:
            loss = _C.cross_entropy_with_options(*operands, inplace, self.arguments)
        return loss.flatten() if self.is_flat and self.reduction == NONE else loss

    def stats(
        self, names: tuple[str, ...], weight: Tensor | None, ignore_index: int, label_smoothing: float
    ) -> tuple[Tensor, ...]:
        bits = 0
        for name in names:
            bits |= BITS.get(name, 0)
        if is_compiling():
            target = self.target
            if target is None:
                target = torch.zeros_like(self.input.select(min(1, self.input.dim() - 1), 0), dtype=torch.long)
            operands = self.input, target, weight, NONE, ignore_index, label_smoothing
            results = torch.ops.cross_entropy.stats(bits, *operands, True, **self.arguments)
        else:
            results = _C.stats(bits, self.input, self.target, weight, ignore_index, label_smoothing, self.arguments)
        asked = [results[PLACES[name]] for name in names]
        if "correct" in names:
            place = names.index("correct")
            asked[place] = asked[place] == 0
        return tuple([result.flatten() for result in asked] if self.is_flat else asked)
