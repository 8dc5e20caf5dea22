"""torch.func."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, functionalize, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.compatibility.cells import INPLACE, NAMES, Case, Function, Model, Run, scalar, upstream, way

BATCH = 3
Transform = Callable[..., Any]

transform = functools.partial(way, group="torch.func")


@transform("grad")
def gradient(case: Case) -> Any:
    return grad(scalar(case.f), case.differentiable)(*case.inputs)


@transform("grad of grad_and_value")
def gradient_of_gradient(case: Case) -> Any:
    def inner(*inputs: Any) -> Tensor:
        grads, value = grad_and_value(scalar(case.f), case.differentiable)(*inputs)
        return value.square() + sum(g.square().sum() for g in grads)

    return grad(inner, case.differentiable)(*case.inputs)


@transform("vjp")
def pulled_back(case: Case) -> Any:
    f, values = case.of_differentiable()
    result, pull = vjp(f, *values)
    return result, pull(upstream(result))


@transform("jvp")
def pushed_forward(case: Case) -> Any:
    f, values = case.of_differentiable()
    return jvp(f, values, tuple(map(upstream, values)))


@transform("jvp of grad_and_value")
def gradient_pushed_forward(case: Case) -> Any:
    f, values = case.of_differentiable()
    return jvp(grad_and_value(scalar(f), tuple(range(len(values)))), values, tuple(map(upstream, values)))


@transform("linearize", raises=dict.fromkeys(INPLACE, "inplace=True has no forward-mode gradient"))
def linearized(case: Case) -> Any:
    f, values = case.of_differentiable()
    result, push = torch.func.linearize(f, *values)
    return result, push(*map(upstream, values))


def of_logits(apply: Transform) -> Run:
    return lambda case: apply(lambda x: case.f(x, *case.inputs[1:]))(case.inputs[0])


transform("jacrev")(of_logits(jacrev))
transform("jacfwd")(of_logits(jacfwd))
transform("hessian")(of_logits(hessian))
transform("jacrev of jacrev")(of_logits(lambda f: jacrev(jacrev(f))))
transform("jacfwd of jacfwd")(of_logits(lambda f: jacfwd(jacfwd(f))))
transform(
    "functionalize", raises=dict.fromkeys(INPLACE, "only support functionalizing operators whose outputs do not")
)(of_logits(functionalize))


# vmap, against the loop that it stands for.


def batch_of(case: Case) -> list[Any]:
    columns = zip(*(case.option.inputs(seed) for seed in range(BATCH)), strict=True)
    batch = [None if column[0] is None else torch.stack(column) for column in columns]
    return [t if t is None or not t.is_floating_point() else t.to(case.inputs[0].dtype) for t in batch]


def loop(f: Function, in_dims: tuple[int | None, ...]) -> Function:
    def mapped(*inputs: Any) -> Any:
        operands = list(zip(inputs, in_dims, strict=True))
        (size,) = {t.shape[d] for t, d in operands if d is not None}
        results = [f(*(t if d is None else t.select(d, i) for t, d in operands)) for i in range(size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(map(torch.stack, zip(*results, strict=True)))

    return mapped


def mapping(name: str, make: Callable[[Transform], Run]) -> None:
    """What `make` makes of a transform, which is vmap or the loop."""
    transform(name, reference=make(loop))(make(vmap))


def loss_of(case: Case) -> Function:
    return case.f


def gradient_of(case: Case) -> Function:
    return grad(scalar(case.f), case.differentiable)


def over(names: str, inner: Callable[[Case], Function] = loss_of) -> Callable[[Transform], Run]:
    """A function of the case mapped over the operands that are named."""

    def make(map_: Transform) -> Run:
        def run(case: Case) -> Any:
            one_or_many = zip(NAMES, case.inputs, batch_of(case), strict=True)
            inputs = [many if name in names else one for name, one, many in one_or_many]
            in_dims = tuple(
                0 if name in names and t is not None else None for name, t in zip(NAMES, inputs, strict=True)
            )
            return map_(inner(case), in_dims)(*inputs)

        return run

    return make


mapping("vmap over logits", over("logits"))
mapping("vmap over targets", over("target"))
mapping("vmap over logits and targets", over("logits target"))
mapping("vmap over everything", over("logits target weight"))
mapping("vmap of grad (per-sample gradients)", over("logits target", gradient_of))
mapping("vmap of grad, over everything", over("logits target weight", gradient_of))
mapping("vmap of hessian", over("logits target", lambda case: hessian(scalar(case.f))))
mapping("vmap of jacrev of jacrev", over("logits target", lambda case: jacrev(jacrev(scalar(case.f)))))
mapping("vmap of jvp", over("logits", lambda case: lambda x, *rest: jvp(lambda x: case.f(x, *rest), (x,), (x,))))


def in_other_dims(map_: Transform) -> Run:
    def run(case: Case) -> Any:
        logits, target, _ = batch_of(case)
        return map_(case.f, (2, 1, None))(logits.movedim(0, 2), target.movedim(0, 1), case.inputs[2])

    return run


def nested(map_: Transform, inner_of: Callable[[Case], Function] = loss_of) -> Run:
    def run(case: Case) -> Any:
        logits, target, _ = batch_of(case)
        inner = map_(inner_of(case), (0, 0, None))
        return map_(inner, (0, None, None))(torch.stack([logits, logits * 2]), target, case.inputs[2])

    return run


def gradient_of_mapped(map_: Transform) -> Run:
    def run(case: Case) -> Any:
        logits, target, _ = batch_of(case)
        places = (0, 1) if case.option.soft else (0,)
        return grad(scalar(map_(case.f, (0, 0, None))), places)(logits, target, case.inputs[2])

    return run


mapping("vmap with in_dims other than 0", in_other_dims)
mapping("vmap of vmap", nested)
mapping("vmap of vmap of grad", lambda map_: nested(map_, gradient_of))
mapping("grad of vmap", gradient_of_mapped)


@transform("vmap of grad of functional_call", without=("module",))
def per_sample_gradients_of_a_model(case: Case) -> Any:
    model = Model(case)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def of_sample(parameters: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return scalar(lambda: functional_call(model, parameters, (x[None], t[None], case.inputs[2])))()

    logits, target, _ = case.inputs
    if not case.option.soft:  # the mean of no row is NaN
        target = target.clamp(0, 1)
    return vmap(grad(of_sample), (None, 0, 0))(parameters, logits, target)
