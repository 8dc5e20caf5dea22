"""Autograd without transforms."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from tests.compatibility.cells import INPLACE, Case, Run, accumulated, backward, call, upstream, way

ONCE = "after inplace=True there are no logits"

autograd = functools.partial(way, group="Autograd")
autograd("backward")(backward)


@autograd(
    "backward twice (retain_graph)",
    raises={"inplace": ONCE, "inplace, none": "modified by an inplace operation"},
)
def twice(case: Case) -> Any:
    loss, wanted = call(case)
    first = torch.autograd.grad(loss, wanted, upstream(loss), retain_graph=True)
    return first, torch.autograd.grad(loss, wanted, 2 * upstream(loss))


@autograd(
    "double backward",
    raises={"inplace": ONCE, "inplace, none": "inplace=True has no double backward"},
)
def double_backward(case: Case) -> Any:
    loss, wanted = call(case)
    factor = upstream(loss).requires_grad_()
    grads = torch.autograd.grad(loss, wanted, factor, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), [*wanted, factor])


@autograd("gradcheck and gradgradcheck", without=("bfloat16", *INPLACE))
def numerical(case: Case) -> Any:
    f, values = case.of_differentiable()
    values = tuple(value.requires_grad_() for value in values)
    assert gradcheck(f, values, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, values, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@autograd("forward-mode AD", raises=dict.fromkeys(INPLACE, "inplace=True has no forward-mode gradient"))
def forward_mode(case: Case) -> Any:
    f, values = case.of_differentiable()
    with forward_ad.dual_level():
        loss = f(*(forward_ad.make_dual(value, upstream(value)) for value in values))
        return tuple(forward_ad.unpack_dual(loss))


@autograd("is_grads_batched", without=INPLACE)
def batched_upstream(case: Case) -> Any:
    loss, wanted = call(case)
    factors = torch.stack([upstream(loss), -2 * upstream(loss)])
    return torch.autograd.grad(loss, wanted, factors, is_grads_batched=True)


def checkpointed(use_reentrant: bool) -> Run:
    return lambda case: accumulated(case.of(functools.partial(checkpoint, case.f, use_reentrant=use_reentrant)))


autograd("checkpoint")(checkpointed(use_reentrant=False))
autograd("checkpoint, reentrant")(checkpointed(use_reentrant=True))


@autograd("saved-tensor hooks")
def hooks(case: Case) -> Any:
    packed = 0

    def pack(tensor: Tensor) -> tuple[Tensor]:
        nonlocal packed
        packed += 1
        return (tensor.clone(),)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[0]):
        results = backward(case)
    assert packed or case.option.call == "inplace"
    return results


@autograd("save_on_cpu (offloading)")
def offloading(case: Case) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return backward(case)


@autograd("anomaly mode")
def anomaly(case: Case) -> Any:
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
        return backward(case)


@autograd("no_grad")
def no_grad(case: Case) -> Any:
    with torch.no_grad():
        return case.f(*case.leaves())


@autograd("inference_mode")
def inference_mode(case: Case) -> Any:
    with torch.inference_mode():
        return case.f(*case.leaves())
