"""Modes, tensor subclasses and wrappers of modules."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from tests.compatibility.cells import Case, Model, accumulated, backward, doubles, way
from tests.device import DEVICE
from tests.observe import LogOperators

mode = functools.partial(way, group="Modes and subclasses")
FUNCTIONS = {"cross_entropy", "row_stats", "distillation_loss", "log_softmax"}


def in_bfloat16(inputs: list[Any]) -> list[Any]:
    return [t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]


def of_rounded(case: Case) -> Any:
    return case.f(*doubles(in_bfloat16(case.inputs)))


@mode("autocast", reference=of_rounded)
def autocast(case: Case) -> Any:
    """A float32 loss of the bfloat16 logits that a layer before it leaves."""
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = backward(case.on(in_bfloat16(case.inputs)))[0]
    assert loss.dtype == torch.float32
    return loss


@mode("deterministic algorithms")
def deterministic(case: Case) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return backward(case)
    finally:
        torch.use_deterministic_algorithms(False)


class LogFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@mode("__torch_function__ mode")
def function_mode(case: Case) -> Any:
    with LogFunctions() as log:
        results = backward(case)
    assert log.names & FUNCTIONS
    return results


@mode("__torch_dispatch__ mode", reference=backward)
def dispatch_mode(case: Case) -> Any:
    with LogOperators() as log:
        results = backward(case)
    assert any(name.startswith("cross_entropy::") for name in log.names)
    return results


@mode("FLOP counter", reference=accumulated)
def flop_counter(case: Case) -> Any:
    """It counts matrix products; other operators by the formulas that it is given for them."""
    operators = torch.ops.cross_entropy
    counted = [operators.forward, operators.forward_grad, operators.forward_grad_, operators.diverge]
    formulas = dict.fromkeys(counted, lambda logits, *args, **kwargs: 5 * torch.Size(logits).numel())
    formulas[operators.stats] = lambda outputs, logits, *args, **kwargs: 5 * torch.Size(logits).numel()
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        results = accumulated(case)
    assert counter.get_total_flops() == 5 * case.inputs[0].numel()
    return results


class Functions(Tensor):
    """A subclass that sees the function."""

    seen: ClassVar[set[str]] = set()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.add(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


@mode("subclass with __torch_function__")
def function_subclass(case: Case) -> Any:
    Functions.seen.clear()
    results = backward(case.of(lambda x, *rest: case.f(x.as_subclass(Functions), *rest)))
    assert Functions.seen & FUNCTIONS
    return [t.as_subclass(Tensor) for t in results]


class Wrapper(Tensor):
    """A subclass that holds a tensor and sees the operators."""

    inner: Tensor
    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        layout = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, **layout)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(operator.name())
        args, kwargs = tree_map_only(Wrapper, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapper, operator(*args, **kwargs))


@mode("subclass with __torch_dispatch__", reference=backward)
def dispatch_subclass(case: Case) -> Any:
    Wrapper.seen.clear()
    results = backward(case.on([None if t is None else Wrapper(t) for t in case.inputs]))
    assert any(name.startswith("cross_entropy::") for name in Wrapper.seen)
    return [t.inner for t in results]


@mode("DataParallel")
def data_parallel(case: Case) -> Any:
    return torch.nn.DataParallel(Model(case).to(DEVICE))(*case.inputs)
