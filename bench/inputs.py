"""What the competitors of a case are given."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .results import Case
from .shapes import DTYPES
from .timing import CACHES

SMALL_CALLS = 50
"""So many calls of a small shape make a sample; a single one would find the caches cold."""


@dataclass(frozen=True)
class Logits:
    """Logits, in as many copies as calls should follow each other, and class indices.

    On a CUDA device the calls take the copies in turn, which are more than its caches hold. On the CPU small logits are
    in its caches, where a model's last layer would have left them.
    """

    copies: list[Tensor]
    target: Tensor
    calls: int = 1
    """That make a sample."""

    @staticmethod
    def of(case: Case) -> "Logits":
        torch.manual_seed(0)
        count = max(1, min(8, CACHES // case.logits_bytes)) if case.device == "cuda" else 1
        first = torch.randn(case.shape, device=case.device).to(DTYPES[case.dtype])
        rows = (case.shape[0], *case.shape[2:])
        target = torch.randint(case.shape[1], rows, device=case.device)
        copies = [first, *(first.clone() for _ in range(count - 1))]
        return Logits(copies, target, SMALL_CALLS if case.is_small else count)

    @staticmethod
    def bytes_needed(case: Case) -> int:
        """With the ceilings' tensors, and a competitor that takes three of the logits' size."""
        return 6 * case.logits_bytes

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The copies, each needing a gradient."""
        return [logits.detach().requires_grad_() for logits in self.copies]

    def logits(self, call: int) -> Tensor:
        return self.copies[call % len(self.copies)]

    def leaf(self, call: int) -> Tensor:
        """Logits that need a gradient and have none yet."""
        leaf = self.leaves[call % len(self.leaves)]
        leaf.grad = None
        return leaf


@dataclass(frozen=True)
class Head:
    """A batch of features, the weight of the last layer, and class indices; the first two need a gradient."""

    hidden: Tensor
    weight: Tensor
    target: Tensor

    calls = 1

    @staticmethod
    def of(case: Case) -> "Head":
        torch.manual_seed(0)
        (rows, classes), features, dtype = case.shape, case.hidden or 1, DTYPES[case.dtype]
        hidden = torch.randn(rows, features, device=case.device).to(dtype).requires_grad_()
        # So that the logits have the unit variance of a model's first steps.
        weight = (torch.randn(classes, features, device=case.device) / math.sqrt(features)).to(dtype).requires_grad_()
        return Head(hidden, weight, torch.randint(classes, (rows,), device=case.device))

    @staticmethod
    def bytes_needed(case: Case) -> int:
        """With the head and its gradient, and float64 copies of both for the oracle."""
        weight = case.shape[1] * (case.hidden or 1)
        return 4 * case.logits_bytes + weight * (2 * DTYPES[case.dtype].itemsize + 2 * 8)

    def clear(self) -> "Head":
        """Without gradients."""
        self.hidden.grad = self.weight.grad = None
        return self
