"""What needs a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from tests.compatibility.cells import Case, Model, backward, upstream, way
from tests.compatibility.compiling import compiled
from tests.device import DEVICE

cuda = functools.partial(way, group="CUDA")


@cuda('torch.compile(mode="reduce-overhead")', reference=backward)
def reduce_overhead(case: Case) -> Any:
    function = compiled(case.f, mode="reduce-overhead")
    for _ in range(4):  # warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        results = [t.clone() for t in backward(case.of(function))]
    return results


WARM_UP, STEPS = 3, 5


def make_step(case: Case) -> tuple[Model, Callable[[], None]]:
    model = Model(case).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = model(*case.inputs)
        loss.backward(upstream(loss))
        optimizer.step()

    return model, step


def trained(case: Case) -> Any:
    model, step = make_step(case)
    for _ in range(STEPS):
        step()
    return list(model.parameters())


@cuda("a training step in a CUDA graph", reference=trained)
def trained_by_graph(case: Case) -> Any:
    model, step = make_step(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(STEPS - WARM_UP):
        graph.replay()
    return list(model.parameters())


@cuda("another stream", reference=backward)
def another_stream(case: Case) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = backward(case)
    torch.cuda.current_stream().wait_stream(stream)
    return results
