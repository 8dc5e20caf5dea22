"""Two processes that talk by gloo, on the CPU: these ways run in each of them."""

import datetime
import functools
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from tests.compatibility.cells import (
    OPTIONS,
    Case,
    Model,
    accumulated,
    backward,
    cells,
    doubles,
    run_cell,
    upstream,
    way,
)
from tests.compatibility.compiling import compiled

WORLD = 2

distributed = functools.partial(way, group="Distributed")


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ranks",))


def gradient_of_model(case: Case, wrap: Callable[[Model], Any]) -> Tensor:
    model = wrap(Model(case))
    loss = model(*case.inputs)
    loss.backward(upstream(loss))
    gradient = next(model.parameters()).grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def average(case: Case) -> Any:
    """What processes with a batch each come to together."""
    batches = [doubles(case.option.inputs(rank)) for rank in range(WORLD)]
    return sum(gradient_of_model(case.on(batch), lambda model: model) for batch in batches) / WORLD


def on_own_batch(wrap: Callable[[Model], Any]) -> Callable[[Case], Any]:
    return lambda case: gradient_of_model(case.on(case.option.inputs(torch.distributed.get_rank())), wrap)


distributed("DistributedDataParallel", reference=average)(on_own_batch(torch.nn.parallel.DistributedDataParallel))
distributed("FSDP2 (fully_shard)", reference=average)(on_own_batch(lambda model: fully_shard(model, mesh=mesh())))


def rows_of(logits: Placement) -> Placement:
    return {Shard(1): Replicate(), Shard(2): Shard(1)}.get(logits, logits)


def distributed_leaves(case: Case, logits: Placement) -> list[Any]:
    placements = [logits, logits if case.option.soft else rows_of(logits), Replicate()]
    operands = zip(case.inputs, placements, strict=True)
    leaves = [None if t is None else distribute_tensor(t, mesh(), [placement]) for t, placement in operands]
    for i in case.differentiable:
        leaves[i].requires_grad_()
    return leaves


def on_mesh(case: Case, logits: Placement) -> Any:
    """The loss and the gradients of DTensors, whose placements are checked."""
    rows = rows_of(logits)
    total = Partial() if isinstance(rows, Shard) else Replicate()
    leaves = distributed_leaves(case, logits)
    loss = case.f(*leaves)
    assert loss.placements == (rows if loss.dim() else total,)
    factor = distribute_tensor(upstream(loss.full_tensor()), mesh(), [rows if loss.dim() else Replicate()])
    grads = torch.autograd.grad(loss, [leaves[i] for i in case.differentiable], factor)
    assert [g.placements for g in grads] == [(placement,) for placement in (logits, logits, total)][: len(grads)]
    return [t.full_tensor() for t in (loss.detach(), *grads)]


@distributed("DTensor, rows sharded", reference=backward)
def rows_sharded(case: Case) -> Any:
    return on_mesh(case, Shard(0))


@distributed("DTensor, rows sharded, loss.full_tensor()", reference=accumulated)
def rows_sharded_whole_loss(case: Case) -> Any:
    leaves = distributed_leaves(case, Shard(0))
    loss = case.f(*leaves).full_tensor()
    loss.backward(upstream(loss))
    return [loss, *(leaves[i].grad.full_tensor() for i in case.differentiable)]


@distributed("DTensor, rows sharded, torch.compile", reference=backward)
def rows_sharded_compiled(case: Case) -> Any:
    return on_mesh(case.of(compiled(case.f, backend="aot_eager")), Shard(0))


@distributed("DTensor, sharded over d", reference=backward, without=tuple(OPTIONS.keys() - {"(N, C, d)"}))
def inner_rows_sharded(case: Case) -> Any:
    return on_mesh(case, Shard(2))


@distributed("DTensor, replicated", reference=backward)
def replicated(case: Case) -> Any:
    return on_mesh(case, Replicate())


NEEDS_ALL_CLASSES = {
    option: f"the logits are sharded over their classes (dimension 1) on mesh dimension 'ranks', and {what} needs all"
    for option, what in {
        "probabilities": "the gradient of weight",
        "outputs": "row_stats(outputs=…)",
        "teacher": "a teacher",
    }.items()
}


@distributed("DTensor, classes sharded", reference=backward, raises=NEEDS_ALL_CLASSES)
def classes_sharded(case: Case) -> Any:
    return on_mesh(case, Shard(1))


def run_rank(rank: int, directory: str) -> None:
    torch.set_default_device("cpu")
    torch.distributed.init_process_group(
        "gloo", f"file://{directory}/store", rank=rank, world_size=WORLD, timeout=datetime.timedelta(minutes=1)
    )
    errors = []
    for name, option in cells(in_processes=True):
        try:
            run_cell(name, option)
            errors.append("")
        except (Exception, pytest.fail.Exception):
            errors.append(traceback.format_exc())
        torch.distributed.barrier()
    Path(directory, f"{rank}.json").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


@functools.cache
def errors_of_ranks() -> dict[tuple[str, str], str]:
    """All ranks' errors, by cell."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(run_rank, (directory,), nprocs=WORLD)
        of_ranks = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(WORLD)]
    return dict(zip(cells(in_processes=True), map("".join, zip(*of_ranks, strict=True)), strict=True))
