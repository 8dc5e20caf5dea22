"""The options, the register of the ways, and what runs a cell."""

import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cross_entropy
from tests.device import DEVICE

CLASSES = 7
NAMES = ("logits", "target", "weight")
Function = Callable[..., Tensor]  # of these three


def row_weight(logits: Tensor) -> Tensor:
    """A constant for each row, which lies as the logits do."""
    return torch.zeros_like(logits.detach().select(1, 0)).add(0.75)


@dataclasses.dataclass(frozen=True)
class Option:
    """One way of calling the loss."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (5, CLASSES)
    weighted: bool = False
    soft: bool = False  # class probabilities or a teacher's logits, which have gradients, and so have their weights
    dtype: torch.dtype = torch.float64
    call: str = "cross_entropy"

    def inputs(self, seed: int = 0) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.shape, generator=generator, device="cpu").mul(2).to(self.dtype)
        if self.soft:
            target = torch.rand(self.shape, generator=generator, device="cpu").to(self.dtype)
        else:
            rows = self.shape[:1] + self.shape[2:]
            target = torch.randint(CLASSES, rows, generator=generator, device="cpu")
            target.view(-1)[1] = self.options.get("ignore_index", -100)
        weight = torch.rand(CLASSES, generator=generator, device="cpu").add(0.5).to(self.dtype)
        return [logits.to(DEVICE), target.to(DEVICE), weight.to(DEVICE) if self.weighted else None]

    def ours(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        if self.call == "row_stats":
            stats = cross_entropy.row_stats(logits, target, weight, **self.options)
            return stats.loss + stats.logsumexp.square()
        if self.call == "outputs":
            log_prob, entropy = cross_entropy.row_stats(logits, target, outputs=("log_prob", "entropy"), **self.options)
            return log_prob + entropy.square()
        if self.call == "CrossEntropyLoss":
            return cross_entropy.CrossEntropyLoss(weight, **self.options)(logits, target)
        if self.call == "distillation_loss":
            return cross_entropy.distillation_loss(logits, target, class_dim=1, **self.options)
        if self.call == "inplace":
            return cross_entropy.cross_entropy(logits * 1, target, weight, inplace=True, **self.options)
        options = self.options | ({"row_weight": row_weight(logits)} if self.call == "beyond torch" else {})
        return cross_entropy.cross_entropy(logits, target, weight, **options)

    def theirs(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        if self.call == "row_stats":
            return F.cross_entropy(logits, target, weight, reduction="none") + logits.logsumexp(1).square()
        if self.call == "outputs":
            log_p = (self.options["logit_scale"] * logits).log_softmax(1)
            log_prob = log_p.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
            return log_prob.where(target != -100, 0) + (log_p.exp() * log_p).sum(1).square()
        if self.call == "distillation_loss":
            log_p, log_q = ((x / self.options["temperature"]).log_softmax(1) for x in (logits, target))
            return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        if self.call == "beyond torch":
            o = self.options
            z = o["softcap"] * (o["logit_scale"] / o["softcap"] * logits).tanh()
            rows = F.cross_entropy(z, target, weight, reduction="none", label_smoothing=o["label_smoothing"])
            rows = rows + o["z_loss"] * z.logsumexp(1).square().where(target != -100, 0)
            return (rows * row_weight(logits)).sum() / o["divisor"]
        return F.cross_entropy(logits, target, weight, **self.options)


OPTIONS = {
    "mean": Option(),
    "sum": Option({"reduction": "sum"}),
    "none": Option({"reduction": "none"}),
    "weight": Option(weighted=True),
    "ignore_index": Option({"ignore_index": 2, "reduction": "sum"}),
    "label_smoothing": Option({"label_smoothing": 0.1}, weighted=True),
    "probabilities": Option({"label_smoothing": 0.1}, weighted=True, soft=True),
    "(N, C, d)": Option({"reduction": "none", "label_smoothing": 0.1}, shape=(5, CLASSES, 3), weighted=True),
    "bfloat16": Option(dtype=torch.bfloat16),
    "module": Option({"reduction": "sum"}, weighted=True, call="CrossEntropyLoss"),
    "row_stats": Option(call="row_stats"),
    "outputs": Option({"logit_scale": 0.75}, call="outputs"),
    "beyond torch": Option(
        {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0, "logit_scale": 0.75, "divisor": 2.5},
        weighted=True,
        call="beyond torch",
    ),
    "teacher": Option({"temperature": 2.0, "reverse": True}, soft=True, call="distillation_loss"),
    "inplace": Option(call="inplace"),
    "inplace, none": Option({"reduction": "none"}, call="inplace"),
}
INPLACE = ("inplace", "inplace, none")


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, ours or torch's, and what it is called with."""

    option: Option
    f: Function
    inputs: list[Any]

    def of(self, f: Function) -> "Case":
        return dataclasses.replace(self, f=f)

    def on(self, inputs: list[Any]) -> "Case":
        return dataclasses.replace(self, inputs=inputs)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """The places of those inputs that have a gradient."""
        return tuple(i for i, t in enumerate(self.inputs) if t is not None and (i == 0 or self.option.soft))

    def leaves(self) -> list[Any]:
        leaves = [None if t is None else t.detach().clone() for t in self.inputs]
        for i in self.differentiable:
            leaves[i].requires_grad_()
        return leaves

    def of_differentiable(self) -> tuple[Function, tuple[Tensor, ...]]:
        """The loss as a function of these inputs alone, and their values."""

        def f(*values: Tensor) -> Tensor:
            inputs = list(self.inputs)
            for i, value in zip(self.differentiable, values, strict=True):
                inputs[i] = value
            return self.f(*inputs)

        return f, tuple(self.inputs[i] for i in self.differentiable)


def upstream(result: Tensor) -> Tensor:
    """A gradient that is not 1, the same for all results of a shape."""
    return torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device).view(result.shape)


def scalar(f: Function) -> Function:
    def total(*inputs: Any) -> Tensor:
        result = f(*inputs)
        return (result * upstream(result)).sum()

    return total


def call(case: Case) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the leaves that it has gradients for."""
    leaves = case.leaves()
    return case.f(*leaves), [leaves[i] for i in case.differentiable]


def backward(case: Case) -> list[Tensor]:
    """The loss and its gradients, by torch.autograd.grad."""
    loss, wanted = call(case)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream(loss))]


def accumulated(case: Case) -> list[Tensor]:
    """The same by loss.backward()."""
    loss, wanted = call(case)
    loss.backward(upstream(loss))
    return [loss.detach(), *(leaf.grad for leaf in wanted)]


class Model(torch.nn.Module):
    """A model that ends in the loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.f = case.f
        self.head = torch.nn.Linear(CLASSES, CLASSES, bias=False, dtype=case.inputs[0].dtype)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(CLASSES).add(0.25))

    def forward(self, features: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return self.f(self.head(features.movedim(1, -1)).movedim(-1, 1), target, weight)


Run = Callable[[Case], Any]


@dataclasses.dataclass(frozen=True)
class Way:
    group: str
    run: Run
    reference: Run  # what torch's loss is run with
    raises: dict[str, str]  # options that raise an error, with a part of its text
    without: tuple[str, ...]  # options that it makes no sense for

    @property
    def runs_here(self) -> bool:
        return {"CUDA": "cuda", "Distributed": "cpu"}.get(self.group, DEVICE) == DEVICE


GROUPS = ("Compile and export", "torch.func", "Autograd", "Modes and subclasses", "Distributed", "CUDA")
WAYS: dict[str, Way] = {}


def way(
    name: str,
    group: str,
    reference: Run | None = None,
    raises: dict[str, str] | None = None,
    without: tuple[str, ...] = (),
) -> Callable[[Run], Run]:
    """Registers a function that uses PyTorch in some way on a case, and returns what came of it."""

    def add(run: Run) -> Run:
        WAYS[name] = Way(group, run, reference or run, raises or {}, without)
        return run

    return add


def cells(in_processes: bool) -> list[tuple[str, str]]:
    """Those of several processes, or all others."""
    return [
        (name, option)
        for name, how in WAYS.items()
        for option in OPTIONS
        if option not in how.without and (how.group == "Distributed") == in_processes
    ]


def doubles(inputs: list[Any]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]


def run_cell(name: str, option_name: str) -> None:
    """Raises whatever is wrong with it."""
    how, option = WAYS[name], OPTIONS[option_name]
    inputs = option.inputs()
    ours = Case(option, option.ours, inputs)
    if message := how.raises.get(option_name):
        with pytest.raises(Exception, match=re.escape(message)):
            how.run(ours)
        return
    with warnings.catch_warnings():
        # Torch says so when it has no batching rule and loops instead, or no derivative.
        warnings.filterwarnings("error", "There is a performance drop")
        warnings.filterwarnings("error", ".*an autograd kernel was not registered")
        actual = [t for t in tree_leaves(how.run(ours)) if isinstance(t, Tensor)]
    expected = tree_leaves(how.reference(Case(option, option.theirs, doubles(inputs))))
    tolerance = 1e-6 if name == "autocast" else 2**-6 if option.dtype == torch.bfloat16 else 1e-10
    for our, their in zip(actual, (t for t in expected if isinstance(t, Tensor)), strict=True):
        largest = float(their.detach().abs().max()) if their.numel() else 0.0
        atol = tolerance * max(1.0, largest)
        torch.testing.assert_close(our.detach().double(), their.detach().double(), rtol=tolerance, atol=atol)
