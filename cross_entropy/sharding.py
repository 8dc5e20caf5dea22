"""The operators on DTensors: each rank computes the rows that it has.

Importing this module registers the rules. It is imported with the first DTensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import _reduction as _Reduction

from cross_entropy import parallel
from cross_entropy.options import NONE, accumulator_of
from cross_entropy.parallel import on_meta

__all__: list[str] = []

MEAN = _Reduction.get_enum("mean")
OPERATORS = torch.ops.cross_entropy
MIXED = (
    "cross_entropy: got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor before calling "
    "distributed operators!"
)
INPUTS = [argument.name for argument in OPERATORS.loss.default._schema.arguments]
# What the backward operators take of each row, besides the gradient of its loss.
BACKWARD_INPUTS = [argument.name for argument in OPERATORS.backward.default._schema.arguments]
BACKWARD_ROWS = BACKWARD_INPUTS[1 : BACKWARD_INPUTS.index("logits")]
# What the forward pass of shards takes of the inputs.
OF_ROWS = ["logits", "target", "weight", "ignore_index", "label_smoothing"]
OF_ROWS += ["logit_scale_tensor", "z_loss", "softcap", "logit_scale"]
Placements = list[Placement]


class Sharding:
    """How the rows of logits lie on a mesh, and with them all other operands and results."""

    def __init__(self, logits: DTensor) -> None:
        self.mesh = logits.device_mesh
        self.class_dim = min(1, logits.dim() - 1)
        self.logits: Placements = []
        self.rows: Placements = []
        self.classes_on: int | None = None  # the mesh dimension over which the classes are sharded
        for mesh_dim, placement in enumerate(logits.placements):
            if placement.is_shard(self.class_dim):
                if self.classes_on is not None:
                    raise NotImplementedError(
                        "cross_entropy: the logits are sharded over their classes on more than one mesh dimension"
                    )
                self.classes_on = mesh_dim
                self.logits.append(placement)
                self.rows.append(Replicate())
            elif isinstance(placement, Shard):
                self.logits.append(placement)
                self.rows.append(Shard(placement.dim - (placement.dim > self.class_dim)))
            else:
                self.logits.append(Replicate())
                self.rows.append(Replicate())
        self.one: Placements = [Replicate()] * len(self.rows)  # of what every rank has whole
        self.total: Placements = [Partial() if p.is_shard() else p for p in self.rows]  # of a sum over the rows
        self.total_of_all: Placements = [Partial() if p.is_shard() else p for p in self.logits]  # and the classes

    def shard(self, columns: int, valid_classes: int | None) -> parallel.Shard | None:
        """This rank's of the classes, which torch deals out as torch.chunk does."""
        if self.classes_on is None:
            return None
        ranks = self.mesh.size(self.classes_on)
        chunk = -(-columns // ranks)
        sizes = [max(0, min(chunk, columns - rank * chunk)) for rank in range(ranks)]
        rank = self.mesh.get_local_rank(self.classes_on)
        return parallel.Shard.of(self.mesh.get_group(self.classes_on), rank, sizes, valid_classes)

    def local(self, tensor: Any, placements: Placements) -> Any:
        """What this rank needs of an operand."""
        if isinstance(tensor, DTensor):
            moved: Any = tensor
            if list(tensor.placements) != placements:
                moved = moved.detach().redistribute(self.mesh, placements)
            return moved.to_local()
        if tensor is not None and tensor.dim() > 0:
            raise RuntimeError(MIXED)
        return tensor

    def whole(self, local: Tensor, placements: Placements, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
        """A result, of which this rank has computed `local`."""
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=stride)


class Call:
    """One call on this rank's rows. The mean divides by what all ranks' rows come to."""

    def __init__(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameters = operator._schema.arguments
        given = {parameter.name: parameter.default_value for parameter in parameters}
        given |= dict(zip(given, args, strict=False)) | kwargs
        logits, target, self.reduction = given["logits"], given["target"], given["reduction"]
        if not isinstance(logits, DTensor):
            raise RuntimeError(MIXED)
        self.whole_logits = logits
        self.sharding = sharding = Sharding(logits)
        self.loss_dtype = accumulator_of(logits) if given["full_precision"] else logits.dtype
        inputs = {name: given[name] for name in INPUTS}
        if "grad_loss" not in given:  # What is wrong with the shapes shows in those of the whole, and on all ranks.
            OPERATORS.loss(**{name: on_meta(value) for name, value in inputs.items()})
        has_classes = target.shape == logits.shape or given["picked"] is not None
        row_like = sharding.logits if has_classes else sharding.rows
        if given["divergence"]:
            self.check_has_all_classes("a teacher")
        placements = {"logits": sharding.logits, "target": row_like, "picked": row_like, "row_weight": sharding.rows}
        self.inputs = {
            name: sharding.local(value, placements.get(name, sharding.one)) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        self.inputs["full_precision"] = True
        self.shard = sharding.shard(logits.shape[sharding.class_dim], given["valid_classes"])
        if self.shard:
            self.inputs["all_classes"] = self.shard.total
        self.scale_is_distributed = isinstance(given["logit_scale_tensor"], DTensor)
        if self.reduction == MEAN and given["divisor"] is None and given["divisor_tensor"] is None:
            # Each rank's own divisor may be 0.
            share = OPERATORS.divisor(**{**self.inputs, "zero_if_empty": False})
            divisor = sharding.local(sharding.whole(share, sharding.total, share.shape, ()), sharding.one)
            if given["zero_if_empty"]:
                divisor = divisor.masked_fill(divisor == 0, torch.inf)
            self.inputs["divisor_tensor"] = divisor
        self.outputs = given.get("outputs", 0)
        rows = {name: sharding.local(given.get(name), sharding.rows) for name in BACKWARD_ROWS}
        upstream = sharding.rows if self.reduction == NONE else sharding.one
        self.backward_inputs = {"grad_loss": sharding.local(given.get("grad_loss"), upstream), **rows}

    # Where the classes are sharded.

    def check_has_all_classes(self, what: str) -> None:
        mesh_dim, names = self.sharding.classes_on, self.sharding.mesh.mesh_dim_names
        if mesh_dim is not None:
            raise NotImplementedError(
                f"cross_entropy: the logits are sharded over their classes (dimension {self.sharding.class_dim}) on "
                f"mesh dimension {names[mesh_dim] if names else mesh_dim!r}, and {what} needs all classes of its rows. "
                "Redistribute the logits to Replicate() or to a Shard of their rows there."
            )

    def rows_of_shards(self, shard: parallel.Shard, all_rows: bool = False) -> tuple[Tensor, ...]:
        return parallel.forward(shard, all_rows=all_rows, **{name: self.inputs[name] for name in OF_ROWS})

    def reduce(self, loss: Tensor) -> Tensor:
        return OPERATORS.reduce(loss, **self.inputs)

    def backward_of_shard(self, operator: Any, shard: parallel.Shard, rows: Sequence[Tensor]) -> Any:
        grad_loss, grad_lse = self.backward_inputs["grad_loss"], self.backward_inputs["grad_lse"]
        if grad_loss is None:
            grad_loss = rows[0].new_ones(())
        return parallel.backward(operator, shard, grad_loss, grad_lse, rows, **self.inputs)

    # Wherever they are.

    def backward(self, operator: Any) -> Any:
        if self.shard:
            _, *rows = self.rows_of_shards(self.shard, all_rows=self.backward_inputs["grad_lse"] is not None)
            return self.backward_of_shard(operator, self.shard, rows)
        return operator(**self.backward_inputs, **self.inputs)

    def whole_loss(self, loss: Tensor) -> DTensor:
        if self.reduction == NONE:
            return self.whole_rows(loss.to(self.loss_dtype))
        return self.sharding.whole(loss.to(self.loss_dtype), self.sharding.total, loss.shape, ())

    def whole_rows(self, rows: Tensor) -> DTensor:
        classes = self.sharding.class_dim
        shape = torch.Size([size for d, size in enumerate(self.whole_logits.shape) if d != classes])
        return self.sharding.whole(rows, self.sharding.rows, shape, torch.empty(shape, device="meta").stride())

    def whole_grad(self, grad: Tensor) -> DTensor:
        return self.sharding.whole(grad, self.sharding.logits, self.whole_logits.shape, self.whole_logits.stride())

    def check_overwritable(self) -> None:
        if list(self.whole_logits.placements) != self.sharding.logits:
            raise RuntimeError(
                "cross_entropy: inplace=True needs DTensor logits that are replicated or sharded over rows"
            )


def loss(call: Call) -> DTensor:
    if call.shard:
        loss, *_ = call.rows_of_shards(call.shard)
        return call.whole_loss(call.reduce(loss))
    return call.whole_loss(OPERATORS.loss(**call.inputs))


def forward(call: Call) -> tuple[DTensor, ...]:
    if call.shard:
        loss, top, total, _ = call.rows_of_shards(call.shard, all_rows=True)
        loss, *rows = call.reduce(loss), top, total, top + total.log()
    else:
        loss, *rows = OPERATORS.forward(**call.inputs)
    return call.whole_loss(loss), *map(call.whole_rows, rows)


def stats(call: Call) -> tuple[DTensor, ...]:
    call.check_has_all_classes("row_stats(outputs=…)")
    loss, *rows = OPERATORS.stats(call.outputs, **call.inputs)
    one = call.sharding.one
    # What was not asked for has no elements, whatever the rows are.
    return call.whole_loss(loss), *(
        call.whole_rows(r) if r.shape == loss.shape else call.sharding.whole(r, one, r.shape, (1,)) for r in rows
    )


def diverge(call: Call) -> tuple[DTensor, ...]:
    loss, *rows = OPERATORS.diverge(**call.inputs)
    return call.whole_loss(loss), *map(call.whole_rows, rows)


def forward_grad(call: Call) -> tuple[DTensor, DTensor]:
    if call.shard:
        loss, *rows = call.rows_of_shards(call.shard)
        grad = call.backward_of_shard(OPERATORS.backward, call.shard, rows)
        return call.whole_loss(call.reduce(loss)), call.whole_grad(grad)
    loss, grad = OPERATORS.forward_grad(**call.inputs)
    return call.whole_loss(loss), call.whole_grad(grad)


def forward_grad_(call: Call) -> DTensor:
    call.check_overwritable()
    if call.shard:
        loss, *rows = call.rows_of_shards(call.shard)
        call.backward_of_shard(OPERATORS.backward_, call.shard, rows)
        return call.whole_loss(call.reduce(loss))
    return call.whole_loss(OPERATORS.forward_grad_(**call.inputs))


def backward(call: Call) -> DTensor:
    return call.whole_grad(call.backward(OPERATORS.backward))


def backward_(call: Call) -> None:
    call.check_overwritable()
    call.backward(OPERATORS.backward_)


def target_backward(call: Call) -> DTensor:
    return call.whole_grad(call.backward(OPERATORS.target_backward))


def weight_backward(call: Call) -> DTensor:
    call.check_has_all_classes("the gradient of weight")
    grad = call.backward(OPERATORS.weight_backward)
    return call.sharding.whole(grad, call.sharding.total, grad.shape, grad.stride())


def logit_scale_backward(call: Call) -> Tensor:
    grad = call.backward(OPERATORS.logit_scale_backward)
    whole = call.sharding.whole(grad, call.sharding.total_of_all, grad.shape, ())
    return whole if call.scale_is_distributed else whole.full_tensor()


def register(rule: Callable[[Call], Any]) -> None:
    def on_dtensors(cls: type, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return rule(Call(operator, args, kwargs))

    torch.library.register_torch_dispatch(f"cross_entropy::{rule.__name__}", DTensor, on_dtensors)


for rule in (
    stats,
    diverge,
    loss,
    forward,
    forward_grad,
    forward_grad_,
    backward,
    backward_,
    target_backward,
    weight_backward,
    logit_scale_backward,
):
    register(rule)


@torch.library.register_torch_dispatch("cross_entropy::scale_", DTensor)
def scale_(cls: type, operator: Any, types: Any, args: tuple[DTensor, Tensor], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        grad, factor = args
        sharding = Sharding(grad)
        OPERATORS.scale_(grad.to_local(), sharding.local(factor, sharding.one))
