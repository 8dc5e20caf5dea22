"""What the loss has to work with: ways of using PyTorch times options of the loss, each cell a comparison with
torch.nn.functional.cross_entropy in float64.

tests/test_compatibility.py and tests/test_distributed.py run the cells; `python -m tests.compatibility` runs them and
writes docs/compatibility.md.
"""

import dataclasses
import datetime
import functools
import io
import itertools
import json
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._functorch.config
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cross_entropy
from tests.device import DEVICE

CLASSES = 7
BATCH = 3  # of vmap


# The options.


@dataclasses.dataclass(frozen=True)
class Option:
    """One way of calling the loss; its inputs are the logits, the target and the class weights."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (5, CLASSES)
    weighted: bool = False
    soft: bool = False  # probabilities, which have gradients as have their weights
    dtype: torch.dtype = torch.float64
    call: str = "function"

    def inputs(self, seed: int = 0) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.shape, generator=generator).mul(2)
        rows = self.shape[:1] + self.shape[2:]
        if self.soft:
            target = torch.rand(self.shape, generator=generator).to(self.dtype)
        else:
            target = torch.randint(self.shape[1], rows, generator=generator)
            target.view(-1)[1] = self.options.get("ignore_index", -100)
        weight = torch.rand(self.shape[1], generator=generator).add(0.5).to(self.dtype) if self.weighted else None
        return [None if t is None else t.to(DEVICE) for t in (logits.to(self.dtype), target, weight)]

    def differentiable(self, inputs: list[Any]) -> list[int]:
        return [i for i, t in enumerate(inputs) if t is not None and (i == 0 or self.soft)]

    def ours(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        if self.call == "row_stats":
            stats = cross_entropy.row_stats(logits, target, weight, **self.options)
            return stats.loss + stats.logsumexp.square()
        if self.call == "module":
            return cross_entropy.CrossEntropyLoss(weight, **self.options)(logits, target)
        if self.call == "inplace":
            return cross_entropy.cross_entropy(logits * 1, target, weight, inplace=True, **self.options)
        return cross_entropy.cross_entropy(logits, target, weight, **self.options)

    def theirs(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        if self.call == "row_stats":
            return F.cross_entropy(logits, target, weight, reduction="none") + logits.logsumexp(1).square()
        return F.cross_entropy(logits, target, weight, **self.options)


NAMES = ("logits", "target", "weight")
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
    "module": Option({"reduction": "sum"}, weighted=True, call="module"),
    "row_stats": Option(call="row_stats"),
    "inplace": Option(call="inplace"),
    "inplace, none": Option({"reduction": "none"}, call="inplace"),
}
INPLACE = ("inplace", "inplace, none")

Function = Callable[..., Tensor]


def upstream(result: Tensor) -> Tensor:
    """A gradient that is not 1, the same for every result of a shape."""
    return torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device).view(result.shape)


def leaves_of(option: Option, inputs: list[Any]) -> list[Any]:
    leaves = [None if t is None else t.detach().clone() for t in inputs]
    for i in option.differentiable(leaves):
        leaves[i].requires_grad_()
    return leaves


def backward(f: Function, option: Option, inputs: list[Any]) -> list[Tensor]:
    """The loss and the gradients of all that can have one."""
    leaves = leaves_of(option, inputs)
    loss = f(*leaves)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [leaves[i] for i in option.differentiable(leaves)], upstream(loss)),
    ]


def accumulated(f: Function, option: Option, inputs: list[Any]) -> list[Tensor]:
    """The same by loss.backward()."""
    leaves = leaves_of(option, inputs)
    loss = f(*leaves)
    loss.backward(upstream(loss))
    return [loss.detach(), *(leaves[i].grad for i in option.differentiable(leaves))]


def scalar(f: Function) -> Function:
    def total(*inputs: Any) -> Tensor:
        result = f(*inputs)
        return (result * upstream(result)).sum()

    return total


# The ways of using PyTorch. Each returns what it computes with a function of logits, target and weight.


@dataclasses.dataclass(frozen=True)
class Way:
    run: Callable[[Function, Option, list[Any]], Any]
    group: str
    # What torch's function is run with instead; by default the same.
    reference: Callable[[Function, Option, list[Any]], Any]
    # Options that raise an error, and its text.
    raises: dict[str, str]
    # Options that it makes no sense for.
    without: tuple[str, ...]


WAYS: dict[str, Way] = {}


def way(
    name: str,
    group: str,
    reference: Callable[..., Any] | None = None,
    raises: dict[str, str] | None = None,
    without: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        WAYS[name] = Way(run, group, reference or run, raises or {}, without)
        return run

    return add


# Compiling and tracing.

compiling = functools.partial(way, group="compile and export", reference=backward)


torch._functorch.config.enable_autograd_cache = False  # it does not notice that operators have changed


def compiled(f: Function, **options: Any) -> Function:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, **options)


@compiling("torch.compile(fullgraph=True)")
def compile_(f: Function, option: Option, inputs: list[Any]) -> Any:
    return backward(compiled(f), option, inputs)


@compiling("torch.compile(dynamic=True)")
def compile_dynamic(f: Function, option: Option, inputs: list[Any]) -> Any:
    return backward(compiled(f, dynamic=True), option, inputs)


def gradients_inside(f: Function, option: Option, inputs: list[Any]) -> Any:
    """Without torch.autograd.grad, which dynamo does not take into its graph."""
    return grad_and_value(scalar(f), tuple(option.differentiable(inputs)))(*inputs)


@way("torch.compile of torch.func.grad", "compile and export", reference=gradients_inside)
def compile_grad(f: Function, option: Option, inputs: list[Any]) -> Any:
    return compiled(lambda *inputs: gradients_inside(f, option, inputs), backend="aot_eager")(*inputs)


@compiling("compiled autograd", raises={"inplace": "inplace=True does not work with compiled autograd"})
def compiled_backward(f: Function, option: Option, inputs: list[Any]) -> Any:
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        return accumulated(f, option, inputs)


class Model(torch.nn.Module):
    """A model that ends in the loss."""

    def __init__(self, f: Function, dtype: torch.dtype) -> None:
        super().__init__()
        self.f = f
        self.head = torch.nn.Linear(CLASSES, CLASSES, bias=False, dtype=dtype)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(CLASSES).add(0.25))

    def forward(self, features: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return self.f(self.head(features.movedim(1, -1)).movedim(-1, 1), target, weight)


def model_loss(f: Function, option: Option, inputs: list[Any]) -> Any:
    return Model(f, inputs[0].dtype)(*inputs).detach()


def exported(f: Function, option: Option, inputs: list[Any]) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    dynamic = (batch, batch, None if inputs[2] is None else {})
    return torch.export.export(Model(f, inputs[0].dtype), tuple(inputs), dynamic_shapes=dynamic)


@way("torch.export, saved and loaded", "compile and export", reference=model_loss)
def export(f: Function, option: Option, inputs: list[Any]) -> Any:
    file = io.BytesIO()
    torch.export.save(exported(f, option, inputs), file)
    file.seek(0)
    return torch.export.load(file).module()(*inputs).detach()


class AllOptions(torch.nn.Module):
    """A model with a loss for each option, since a package takes a C++ compiler's time."""

    def __init__(self) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(Model(option.ours, option.dtype) for option in OPTIONS.values())

    def forward(self, inputs: list[list[Tensor | None]]) -> list[Tensor]:
        return [model(*given) for model, given in zip(self.models, inputs, strict=True)]


@functools.cache
def packaged() -> list[Tensor]:
    inputs = [option.inputs() for option in OPTIONS.values()]
    with tempfile.TemporaryDirectory() as directory:
        program = torch.export.export(AllOptions(), (inputs,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{directory}/model.pt2")
        return torch._inductor.aoti_load_package(path)(inputs)


@way("AOTInductor package", "compile and export", reference=model_loss)
def aot_inductor(f: Function, option: Option, inputs: list[Any]) -> Any:
    return packaged()[list(OPTIONS.values()).index(option)]


@compiling("make_fx, symbolic shapes")
def make_fx_(f: Function, option: Option, inputs: list[Any]) -> Any:
    given = [t for t in inputs if t is not None]

    def step(*given: Tensor) -> Any:
        return backward(f, option, [*given, None][:3])

    return make_fx(step, tracing_mode="symbolic")(*given)(*given)


@way("torch.fx.symbolic_trace", "compile and export", reference=model_loss, without=("module",))
def fx_trace(f: Function, option: Option, inputs: list[Any]) -> Any:
    model = Model(f, inputs[0].dtype)
    traced = torch.fx.Tracer().trace(model, {} if inputs[2] is not None else {"weight": None})
    return torch.fx.GraphModule(model, traced)(*inputs).detach()


def shapes(f: Function, option: Option, inputs: list[Any]) -> Any:
    return [torch.tensor([*t.shape, *t.stride()]) for t in backward(f, option, inputs)]


@way("FakeTensorMode", "compile and export", reference=shapes)
def fake(f: Function, option: Option, inputs: list[Any]) -> Any:
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in inputs]
        results = backward(f, option, fakes)
    return [torch.tensor([*t.shape, *t.stride()]) for t in results]


@way("meta tensors", "compile and export", reference=shapes)
def meta(f: Function, option: Option, inputs: list[Any]) -> Any:
    with torch.device("meta"):
        results = backward(f, option, [None if t is None else t.to("meta") for t in inputs])
    return [torch.tensor([*t.shape, *t.stride()]) for t in results]


@compiling("torch.jit.trace")
def jit_trace(f: Function, option: Option, inputs: list[Any]) -> Any:
    given = tuple(t for t in leaves_of(option, inputs) if t is not None)
    traced = torch.jit.trace(lambda *given: f(*[*given, None][:3]), given, check_trace=False)
    return backward(lambda *inputs: traced(*[t for t in inputs if t is not None]), option, inputs)


# torch.func.

func = functools.partial(way, group="torch.func")
FORWARD_MODE = dict.fromkeys(INPLACE, "inplace=True has no forward-mode gradient")


@func("grad")
def grad_(f: Function, option: Option, inputs: list[Any]) -> Any:
    return grad(scalar(f), tuple(option.differentiable(inputs)))(*inputs)


@func("grad of grad_and_value")
def grad_of_grad_and_value(f: Function, option: Option, inputs: list[Any]) -> Any:
    argnums = tuple(option.differentiable(inputs))

    def inner(*inputs: Any) -> Tensor:
        grads, value = grad_and_value(scalar(f), argnums)(*inputs)
        return value.square() + sum(g.square().sum() for g in grads)

    return grad(inner, argnums)(*inputs)


@func("vjp")
def vjp_(f: Function, option: Option, inputs: list[Any]) -> Any:
    value, pull = vjp(lambda x: f(x, *inputs[1:]), inputs[0])
    return value, pull(upstream(value))


def tangents(inputs: list[Any], which: list[int]) -> tuple[Tensor, ...]:
    return tuple(upstream(inputs[i]) for i in which)


def of_differentiable(f: Function, option: Option, inputs: list[Any]) -> tuple[Function, tuple[Tensor, ...]]:
    which = option.differentiable(inputs)

    def of_them(*values: Tensor) -> Tensor:
        given = list(inputs)
        for i, value in zip(which, values, strict=True):
            given[i] = value
        return f(*given)

    return of_them, tuple(inputs[i] for i in which)


@func("jvp")
def jvp_(f: Function, option: Option, inputs: list[Any]) -> Any:
    g, values = of_differentiable(f, option, inputs)
    return jvp(g, values, tangents(inputs, option.differentiable(inputs)))


@func("jvp of grad_and_value")
def jvp_of_grad(f: Function, option: Option, inputs: list[Any]) -> Any:
    g, values = of_differentiable(scalar(f), option, inputs)
    which = option.differentiable(inputs)
    return jvp(grad_and_value(g, tuple(range(len(which)))), values, tangents(inputs, which))


@func("linearize", raises=FORWARD_MODE)
def linearize_(f: Function, option: Option, inputs: list[Any]) -> Any:
    value, push = linearize(lambda x: f(x, *inputs[1:]), inputs[0])
    return value, push(upstream(inputs[0]))


def of_logits(transform: Callable[..., Any]) -> Callable[..., Any]:
    def run(f: Function, option: Option, inputs: list[Any]) -> Any:
        return transform(lambda x: f(x, *inputs[1:]))(inputs[0])

    return run


func("jacrev")(of_logits(jacrev))
func("jacfwd")(of_logits(jacfwd))
func("hessian")(of_logits(hessian))
func("jacrev of jacrev")(of_logits(lambda f: jacrev(jacrev(f))))
func("jacfwd of jacfwd")(of_logits(lambda f: jacfwd(jacfwd(f))))


def batch_of(option: Option, n: int = BATCH) -> list[Any]:
    columns = zip(*(option.inputs(seed) for seed in range(n)), strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


def looped(f: Function, in_dims: tuple[int | None, ...]) -> Function:
    """vmap by its definition."""

    def loop(*inputs: Any) -> Any:
        sizes = {t.shape[d] for t, d in zip(inputs, in_dims, strict=True) if d is not None}
        (size,) = sizes
        results = [
            f(*(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True))) for i in range(size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    return loop


def map_by(
    mapped: Callable[..., Function], which: str, inner: Callable[..., Any] = lambda f, option: f
) -> Callable[..., Any]:
    """A function of the loss, mapped over the operands that `which` names."""

    def run(f: Function, option: Option, inputs: list[Any]) -> Any:
        inputs = [batch if name in which else t for name, batch, t in zip(NAMES, batch_of(option), inputs, strict=True)]
        in_dims = tuple(0 if name in which and t is not None else None for name, t in zip(NAMES, inputs, strict=True))
        return mapped(inner(f, option), in_dims)(*inputs)

    return run


def mapping(name: str, *args: Any) -> None:
    WAYS[name] = Way(map_by(vmap, *args), "torch.func", map_by(looped, *args), {}, ())


mapping("vmap over logits", "logits")
mapping("vmap over targets", "target")
mapping("vmap over logits and targets", "logits target")
mapping("vmap over everything", "logits target weight")


def gradients_of(f: Function, option: Option) -> Function:
    which = tuple(i for i in range(3) if i == 0 or (option.soft and (i == 1 or option.weighted)))
    return grad(scalar(f), which)


mapping("vmap of grad: per-sample gradients", "logits target", gradients_of)
mapping("vmap of grad over everything", "logits target weight", gradients_of)
mapping("vmap of jvp", "logits", lambda f, option: lambda x, *rest: jvp(lambda x: f(x, *rest), (x,), (x,)))
mapping("vmap of hessian", "logits target", lambda f, option: hessian(scalar(f)))


def in_other_dims(mapped: Callable[..., Function]) -> Callable[..., Any]:
    def run(f: Function, option: Option, inputs: list[Any]) -> Any:
        logits, target, weight = batch_of(option)
        in_dims = (2, 1, None)
        return mapped(f, in_dims)(logits.movedim(0, 2), target.movedim(0, 1), None if weight is None else weight[0])

    return run


func("vmap, in_dims other than 0", reference=in_other_dims(looped))(in_other_dims(vmap))


def nested(mapped: Callable[..., Function]) -> Callable[..., Any]:
    def run(f: Function, option: Option, inputs: list[Any]) -> Any:
        logits, target, _ = batch_of(option)
        inner = mapped(f, (0, 0, None))
        return mapped(inner, (0, None, None))(torch.stack([logits, logits * 2]), target, inputs[2])

    return run


func("vmap of vmap", reference=nested(looped))(nested(vmap))


def grad_of(mapped: Callable[..., Function]) -> Callable[..., Any]:
    def run(f: Function, option: Option, inputs: list[Any]) -> Any:
        logits, target, _ = batch_of(option)
        return grad(scalar(mapped(f, (0, 0, None))), (0, 1) if option.soft else (0,))(logits, target, inputs[2])

    return run


func("grad of vmap", reference=grad_of(looped))(grad_of(vmap))


@func("functional_call, per-sample gradients of a model", without=("module",))
def per_sample_of_model(f: Function, option: Option, inputs: list[Any]) -> Any:
    model = Model(f, inputs[0].dtype)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_sample(parameters: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return scalar(lambda: functional_call(model, parameters, (x[None], t[None], inputs[2])))()

    logits, target, _ = inputs
    if not option.soft:  # torch's mean over no row is NaN under vmap
        target = target.clamp(0, 1)
    return vmap(grad(of_sample), (None, 0, 0))(parameters, logits, target)


func(
    "functionalize", raises=dict.fromkeys(INPLACE, "only support functionalizing operators whose outputs do not have")
)(lambda f, option, inputs: torch.func.functionalize(lambda x: f(x, *inputs[1:]))(inputs[0]))


# Autograd.

autograd = functools.partial(way, group="autograd")
autograd("backward")(backward)


@autograd(
    "backward twice (retain_graph)",
    raises={"inplace": "no logits from which a gradient could be", "inplace, none": "modified by an inplace operation"},
)
def backward_twice(f: Function, option: Option, inputs: list[Any]) -> Any:
    leaves = leaves_of(option, inputs)
    loss = f(*leaves)
    which = [leaves[i] for i in option.differentiable(leaves)]
    first = torch.autograd.grad(loss, which, upstream(loss), retain_graph=True)
    return *first, *torch.autograd.grad(loss, which, 2 * upstream(loss))


@autograd(
    "double backward",
    raises={
        "inplace": "no logits from which a gradient could be",
        "inplace, none": "inplace=True has no double backward",
    },
)
def double_backward(f: Function, option: Option, inputs: list[Any]) -> Any:
    leaves = leaves_of(option, inputs)
    loss = f(*leaves)
    which = [leaves[i] for i in option.differentiable(leaves)]
    factor = upstream(loss).requires_grad_()
    grads = torch.autograd.grad(loss, which, factor, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), [*which, factor])


@autograd("gradcheck and gradgradcheck", without=("bfloat16", *INPLACE))
def checks(f: Function, option: Option, inputs: list[Any]) -> Any:
    g, values = of_differentiable(f, option, inputs)
    values = tuple(value.requires_grad_() for value in values)
    assert gradcheck(g, values, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(g, values, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@autograd("forward-mode AD", raises=FORWARD_MODE)
def forward_mode(f: Function, option: Option, inputs: list[Any]) -> Any:
    which = option.differentiable(inputs)
    with forward_ad.dual_level():
        duals = list(inputs)
        for i in which:
            duals[i] = forward_ad.make_dual(inputs[i], upstream(inputs[i]))
        return tuple(forward_ad.unpack_dual(f(*duals)))


@autograd("is_grads_batched", without=INPLACE)
def batched_upstream(f: Function, option: Option, inputs: list[Any]) -> Any:
    leaves = leaves_of(option, inputs)
    loss = f(*leaves)
    upstreams = torch.stack([upstream(loss), -2 * upstream(loss)])
    return torch.autograd.grad(
        loss, [leaves[i] for i in option.differentiable(leaves)], upstreams, is_grads_batched=True
    )


def checkpointed(use_reentrant: bool) -> Callable[..., Any]:
    def run(f: Function, option: Option, inputs: list[Any]) -> Any:
        def with_checkpoint(*inputs: Any) -> Tensor:
            return torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=use_reentrant)

        return accumulated(with_checkpoint, option, inputs)

    return run


autograd("checkpoint")(checkpointed(use_reentrant=False))
autograd("checkpoint(use_reentrant=True)")(checkpointed(use_reentrant=True))


@autograd("saved-tensor hooks")
def saved_tensor_hooks(f: Function, option: Option, inputs: list[Any]) -> Any:
    packed = []

    def pack(tensor: Tensor) -> tuple[Tensor]:
        packed.append(tensor)
        return (tensor.clone(),)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[0]):
        leaves = leaves_of(option, inputs)
        loss = f(*leaves)
    assert packed or option.call == "inplace"
    return torch.autograd.grad(loss, [leaves[i] for i in option.differentiable(leaves)], upstream(loss))


@autograd("save_on_cpu: offloading")
def save_on_cpu(f: Function, option: Option, inputs: list[Any]) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return backward(f, option, inputs)


@autograd("anomaly mode")
def anomaly(f: Function, option: Option, inputs: list[Any]) -> Any:
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
        return backward(f, option, inputs)


@autograd("no_grad")
def no_grad(f: Function, option: Option, inputs: list[Any]) -> Any:
    with torch.no_grad():
        return f(*leaves_of(option, inputs))


@autograd("inference_mode")
def inference_mode(f: Function, option: Option, inputs: list[Any]) -> Any:
    with torch.inference_mode():
        return f(*inputs)


# Modes, subclasses and modules.

modes = functools.partial(way, group="modes and subclasses")


def rounded(f: Function, option: Option, inputs: list[Any]) -> Any:
    logits, target, weight = inputs
    return f(logits.bfloat16().double(), target, None if weight is None else weight.float().double())


@modes("autocast", reference=rounded, without=("probabilities", "bfloat16"))
def autocast(f: Function, option: Option, inputs: list[Any]) -> Any:
    """A float32 loss of the bfloat16 logits that a layer before it leaves."""
    logits, target, weight = inputs
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = f(logits.bfloat16(), target, None if weight is None else weight.float())
    assert loss.dtype == torch.float32
    return loss


@modes("deterministic algorithms")
def deterministic(f: Function, option: Option, inputs: list[Any]) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return backward(f, option, inputs)
    finally:
        torch.use_deterministic_algorithms(False)


class LogFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@modes("__torch_function__ mode")
def torch_function_mode(f: Function, option: Option, inputs: list[Any]) -> Any:
    with LogFunctions() as log:
        results = backward(f, option, inputs)
    assert {"cross_entropy", "row_stats"} & set(log.names)
    return results


class LogOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@modes("__torch_dispatch__ mode", reference=backward)
def torch_dispatch_mode(f: Function, option: Option, inputs: list[Any]) -> Any:
    with LogOperators() as log:
        results = backward(f, option, inputs)
    assert any(name.startswith("cross_entropy::") for name in log.names)
    return results


@modes("FLOP counter", reference=backward)
def flop_counter(f: Function, option: Option, inputs: list[Any]) -> Any:
    """The loss has no matrix product; given a formula, it is counted as any operator is."""
    operators = torch.ops.cross_entropy
    counted = [operators.forward_grad, operators.forward_grad_, operators.forward]
    formulas = dict.fromkeys(counted, lambda logits, *args, **kwargs: 5 * torch.Size(logits).numel())
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        results = accumulated(f, option, inputs)
    assert counter.get_total_flops() == 5 * inputs[0].numel()
    return results


class Functions(Tensor):
    """A subclass that sees the function."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


@modes("subclass with __torch_function__")
def function_subclass(f: Function, option: Option, inputs: list[Any]) -> Any:
    Functions.seen.clear()
    results = backward(lambda x, *rest: f(x.as_subclass(Functions), *rest), option, inputs)
    assert {"cross_entropy", "row_stats"} & set(Functions.seen)
    return [t.as_subclass(Tensor) for t in results]


class Wrapper(Tensor):
    """A subclass that wraps a tensor and sees the operators."""

    inner: Tensor
    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(operator.name())
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapper, lambda w: w.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, Wrapper, operator(*args, **kwargs))


@modes("subclass with __torch_dispatch__", reference=backward)
def dispatch_subclass(f: Function, option: Option, inputs: list[Any]) -> Any:
    Wrapper.seen.clear()
    results = backward(f, option, [None if t is None else Wrapper(t) for t in inputs])
    assert any(name.startswith("cross_entropy::") for name in Wrapper.seen)
    return [t.inner for t in results]


@modes("DataParallel")
def data_parallel(f: Function, option: Option, inputs: list[Any]) -> Any:
    return torch.nn.DataParallel(Model(f, inputs[0].dtype))(*inputs).detach()


# Several processes: the cells of this group run in each of WORLD of them, on CPUs with gloo.

WORLD = 2
distributed_way = functools.partial(way, group="distributed")


def accumulated_by_model(f: Function, option: Option, inputs: list[Any], wrap: Callable[[Model], Any]) -> Tensor:
    model = wrap(Model(f, inputs[0].dtype))
    loss = model(*inputs)
    loss.backward(upstream(loss))
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def averaged(f: Function, option: Option, inputs: list[Any]) -> Any:
    """What processes come to together that have a batch each."""
    batches = [doubles(option.inputs(rank)) for rank in range(WORLD)]
    return sum(accumulated_by_model(f, option, batch, lambda model: model) for batch in batches) / WORLD


@distributed_way("DistributedDataParallel", reference=averaged)
def ddp(f: Function, option: Option, inputs: list[Any]) -> Any:
    inputs = option.inputs(torch.distributed.get_rank())
    return accumulated_by_model(f, option, inputs, torch.nn.parallel.DistributedDataParallel)


@distributed_way("FSDP2: fully_shard", reference=averaged)
def fsdp(f: Function, option: Option, inputs: list[Any]) -> Any:
    inputs = option.inputs(torch.distributed.get_rank())
    return accumulated_by_model(f, option, inputs, lambda model: fully_shard(model, mesh=mesh()))


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ranks",))


def on_mesh(f: Function, option: Option, inputs: list[Any], logits: Placement) -> Any:
    """The loss and the gradients of DTensors whose rows are together or shared out, with their placements."""
    rows = {Shard(1): Replicate(), Shard(2): Shard(1)}.get(logits, logits)
    placements = [logits, logits if option.soft else rows, Replicate()]
    leaves = [
        None if t is None else distribute_tensor(t.detach(), mesh(), [placement])
        for t, placement in zip(inputs, placements, strict=True)
    ]
    for i in option.differentiable(leaves):
        leaves[i].requires_grad_()
    loss = f(*leaves)
    sharded = isinstance(logits, Shard)
    of_loss = rows if loss.dim() > 0 else Partial() if sharded else Replicate()
    assert loss.placements == (of_loss,), loss.placements
    grads = torch.autograd.grad(
        loss,
        [leaves[i] for i in option.differentiable(leaves)],
        distribute_tensor(upstream(loss.full_tensor()), mesh(), [rows if loss.dim() > 0 else Replicate()]),
    )
    expected = [logits, logits, Partial() if sharded else Replicate()]
    assert [g.placements for g in grads] == [(placement,) for placement in expected[: len(grads)]]
    return [t.full_tensor() for t in (loss.detach(), *grads)]


@distributed_way("DTensor, rows sharded", reference=backward)
def dtensor_rows(f: Function, option: Option, inputs: list[Any]) -> Any:
    return on_mesh(f, option, inputs, Shard(0))


@distributed_way("DTensor, (N, C, d) sharded over d", reference=backward, without=tuple(set(OPTIONS) - {"(N, C, d)"}))
def dtensor_inner_rows(f: Function, option: Option, inputs: list[Any]) -> Any:
    return on_mesh(f, option, inputs, Shard(2))


@distributed_way("DTensor, replicated", reference=backward)
def dtensor_replicated(f: Function, option: Option, inputs: list[Any]) -> Any:
    return on_mesh(f, option, inputs, Replicate())


@distributed_way(
    "DTensor, classes sharded",
    raises=dict.fromkeys(OPTIONS, r"(?s)sharded over their classes.*mesh dimension 'ranks'.*is not implemented"),
)
def dtensor_classes(f: Function, option: Option, inputs: list[Any]) -> Any:
    return on_mesh(f, option, inputs, Shard(1))


def rank(number: int, directory: str) -> None:
    torch.set_default_device(DEVICE)
    torch.distributed.init_process_group(
        "gloo", f"file://{directory}/store", rank=number, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    outcomes = {}
    for name, option in itertools.product(WAYS, OPTIONS):
        if WAYS[name].group == "distributed" and applies(name, option):
            try:
                run_cell(name, option)
                outcomes[f"{name} / {option}"] = ""
            except Exception:
                outcomes[f"{name} / {option}"] = traceback.format_exc()
            torch.distributed.barrier()
    Path(directory, f"rank{number}.json").write_text(json.dumps(outcomes))
    torch.distributed.destroy_process_group()


@functools.cache
def outcomes_of_ranks() -> list[dict[str, str]]:
    """Each rank's errors, by cell."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(rank, (directory,), nprocs=WORLD)
        return [json.loads(Path(directory, f"rank{number}.json").read_text()) for number in range(WORLD)]


# The cells.


def as_doubles(result: Any) -> list[Tensor]:
    return [t.detach().double() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def applies(way: str, option: str) -> bool:
    return option not in WAYS[way].without


def doubles(inputs: list[Any]) -> list[Any]:
    return [t if t is None or not t.is_floating_point() else t.double() for t in inputs]


def run_cell(way: str, name: str) -> None:
    """Raises whatever is wrong with it."""
    how, option = WAYS[way], OPTIONS[name]
    inputs = option.inputs()
    if message := how.raises.get(name):
        try:
            how.run(option.ours, option, inputs)
        except Exception as error:
            if re.search(message, str(error)):
                return
            raise
        raise AssertionError(f"did not raise {message!r}")
    with warnings.catch_warnings():
        # What torch has no batching rule for it runs in a loop, and says so.
        warnings.filterwarnings("error", "There is a performance drop")
        warnings.filterwarnings("error", ".*an autograd kernel was not registered")
        ours = as_doubles(how.run(option.ours, option, inputs))
    theirs = as_doubles(how.reference(option.theirs, option, doubles(inputs)))
    tolerance = 2**-6 if option.dtype == torch.bfloat16 else 1e-6 if way == "autocast" else 1e-10
    for our, their in zip(ours, theirs, strict=True):
        largest = float(their.abs().max()) if their.numel() else 0.0
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * max(1.0, largest))
