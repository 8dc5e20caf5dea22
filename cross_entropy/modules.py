"""The loss as a module."""

from typing import Never, Unpack

import torch
from torch import Tensor

from cross_entropy.functional import cross_entropy
from cross_entropy.options import CallOptions, Options, check_names

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """A drop-in for :class:`torch.nn.CrossEntropyLoss`; the arguments are those of :func:`cross_entropy.cross_entropy`.

    `weight` is a buffer of the module, and a `logit_scale` that is a parameter one of its parameters. What differs from
    call to call, `row_weight` and `divisor`, is given with the input and the target.

    >>> CrossEntropyLoss()(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
    tensor(0.4076)
    """

    inplace: bool

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_names("CrossEntropyLoss", options, Options)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace = inplace
        self.options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def __prepare_scriptable__(self) -> Never:
        raise NotImplementedError(
            "cross_entropy does not support TorchScript, which torch has deprecated: use torch.compile or "
            "torch.export. Code that has to be scripted can call torch.ops.cross_entropy.cross_entropy"
        )

    def forward(self, input: Tensor, target: Tensor, **of_call: Unpack[CallOptions]) -> Tensor:
        options = {name: getattr(self, name) for name in self.options}
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace=self.inplace,
            **options,
            **of_call,
        )
