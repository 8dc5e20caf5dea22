"""torch.compile, torch.export and what traces."""

import functools
import io
import tempfile
import warnings
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.func import grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx

import cross_entropy
from tests.compatibility.cells import OPTIONS, Case, Function, Model, accumulated, backward, scalar, way

# It does not notice that operators have changed.
torch._functorch.config.enable_autograd_cache = False

compiling = functools.partial(way, group="Compile and export")


def compiled(f: Function, **options: Any) -> Function:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, **options)


@compiling("torch.compile(fullgraph=True)", reference=backward)
def static(case: Case) -> Any:
    return backward(case.of(compiled(case.f)))


@compiling("torch.compile(fullgraph=True, dynamic=True)", reference=backward)
def dynamic(case: Case) -> Any:
    return backward(case.of(compiled(case.f, dynamic=True)))


def gradients_inside(case: Case) -> Any:
    return grad_and_value(scalar(case.f), case.differentiable)(*case.inputs)


@compiling("torch.compile of torch.func.grad", reference=gradients_inside)
def with_gradients_inside(case: Case) -> Any:
    return compiled(lambda *inputs: gradients_inside(case.on(list(inputs))), backend="aot_eager")(*case.inputs)


@compiling(
    "compiled autograd",
    reference=accumulated,
    raises={"inplace": "inplace=True does not work with compiled autograd"},
)
def compiled_backward(case: Case) -> Any:
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        return accumulated(case)


def model_loss(case: Case) -> Any:
    return Model(case)(*case.inputs)


@compiling("torch.export, saved and loaded", reference=model_loss)
def export(case: Case) -> Any:
    batch = {0: torch.export.Dim("batch")}
    shapes = (batch, batch, None if case.inputs[2] is None else {})
    program = torch.export.export(Model(case), tuple(case.inputs), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()(*case.inputs)


class AllOptions(torch.nn.Module):
    """A model with a loss for each option, since a package takes a C++ compiler's time."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(map(Model, cases))

    def forward(self, inputs: list[list[Tensor | None]]) -> list[Tensor]:
        return [model(*given) for model, given in zip(self.models, inputs, strict=True)]


@functools.cache
def results_of_package() -> list[Tensor]:
    cases = [Case(option, option.ours, option.inputs()) for option in OPTIONS.values()]
    inputs = ([case.inputs for case in cases],)
    with tempfile.TemporaryDirectory() as directory:
        program = torch.export.export(AllOptions(cases).to(cases[0].inputs[0].device), inputs)
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{directory}/model.pt2")
        return torch._inductor.aoti_load_package(path)(*inputs)


@compiling("AOTInductor package", reference=model_loss)
def aot_inductor(case: Case) -> Any:
    return results_of_package()[list(OPTIONS.values()).index(case.option)]


@compiling("make_fx, symbolic shapes", reference=backward)
def fx_of_step(case: Case) -> Any:
    def step(*given: Tensor) -> Any:
        return backward(case.on([*given, None][:3]))

    given = [t for t in case.inputs if t is not None]
    return make_fx(step, tracing_mode="symbolic")(*given)(*given)


# The module asks whether its weight is None, and fx.Tracer puts a proxy in its place.
@compiling("torch.fx.symbolic_trace", reference=model_loss, without=("module",))
def fx_of_model(case: Case) -> Any:
    constants = {"weight": None} if case.inputs[2] is None else {}
    model = Model(case)
    return torch.fx.GraphModule(model, torch.fx.Tracer().trace(model, constants))(*case.inputs)


def layouts(results: list[Tensor]) -> list[Tensor]:
    return [torch.tensor([*t.shape, *t.stride()]) for t in results]


def layouts_of_results(case: Case) -> Any:
    return layouts(backward(case))


@compiling("FakeTensorMode", reference=layouts_of_results)
def fake(case: Case) -> Any:
    with FakeTensorMode() as mode:
        results = backward(case.on([None if t is None else mode.from_tensor(t) for t in case.inputs]))
    return layouts(results)


@compiling("meta tensors", reference=layouts_of_results)
def meta(case: Case) -> Any:
    with torch.device("meta"):
        results = backward(case.on([None if t is None else t.to("meta") for t in case.inputs]))
    return layouts(results)


@compiling("torch.jit.trace", reference=backward)
def jit_trace(case: Case) -> Any:
    given = tuple(t for t in case.leaves() if t is not None)
    traced = torch.jit.trace(lambda *given: case.f(*[*given, None][:3]), given, check_trace=False)
    return backward(case.of(lambda *inputs: traced(*[t for t in inputs if t is not None])))


@compiling(
    "torch.jit.script: use torch.compile or torch.export",
    raises=dict.fromkeys(OPTIONS, "keyword-only arguments with defaults")
    | {"module": "cross_entropy does not support TorchScript"},
)
def jit_script(case: Case) -> Any:
    scripted = {"CrossEntropyLoss": cross_entropy.CrossEntropyLoss(), "row_stats": cross_entropy.row_stats}
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(scripted.get(case.option.call, cross_entropy.cross_entropy))
