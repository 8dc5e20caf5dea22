"""The operators on DTensors: each rank computes the rows that it has.

Importing this module registers the rules. It is imported with the first DTensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import _reduction as _Reduction

__all__: list[str] = []

NONE, MEAN, SUM = map(_Reduction.get_enum, ("none", "mean", "sum"))
OPERATORS = torch.ops.cross_entropy
MIXED = (
    "cross_entropy: got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor before calling "
    "distributed operators!"
)
Placements = list[Placement]


class Sharding:
    """How the rows of logits lie on a mesh, and with them all other operands and results."""

    def __init__(self, logits: DTensor) -> None:
        self.mesh = logits.device_mesh
        self.class_dim = min(1, logits.dim() - 1)
        self.logits: Placements = []
        self.rows: Placements = []
        for mesh_dim, placement in enumerate(logits.placements):
            if placement.is_shard(self.class_dim):
                names = self.mesh.mesh_dim_names
                raise NotImplementedError(
                    f"cross_entropy: the logits are sharded over their classes (dimension {self.class_dim}) on mesh "
                    f"dimension {names[mesh_dim] if names else mesh_dim!r}. A loss that is parallel over the "
                    "vocabulary is not implemented: every rank needs all classes of its rows. Redistribute the logits "
                    "to Replicate() or to a Shard of their rows there."
                )
            if isinstance(placement, Shard):
                self.logits.append(placement)
                self.rows.append(Shard(placement.dim - (placement.dim > self.class_dim)))
            else:
                self.logits.append(Replicate())
                self.rows.append(Replicate())
        self.one: Placements = [Replicate()] * len(self.rows)  # of what every rank has whole
        self.total: Placements = [Partial() if p.is_shard() else p for p in self.rows]  # of a sum over the rows

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
    """The operands of one call on this rank's rows. The mean is a sum, divided by what all ranks' rows come to."""

    def __init__(self, operator: Any, args: tuple[Any, ...]) -> None:
        given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=True))
        logits, target, weight = given["logits"], given["target"], given["weight"]
        if not isinstance(logits, DTensor):
            raise RuntimeError(MIXED)
        self.whole_logits = logits
        self.sharding = sharding = Sharding(logits)
        accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.loss_dtype = accumulator if given.get("full_precision") else logits.dtype
        self.reduction, self.label_smoothing = given["reduction"], given["label_smoothing"]
        self.ignore_index = given.get("ignore_index", -100)
        if "full_precision" in given:  # What is wrong with the shapes shows in those of the whole, and on all ranks.
            whole = (
                t if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (logits, target, weight)
            )
            OPERATORS.loss(*whole, self.reduction, self.ignore_index, self.label_smoothing, given["full_precision"])
        row_like = sharding.logits if target.shape == logits.shape else sharding.rows
        self.operands = (
            sharding.local(logits, sharding.logits),
            sharding.local(target, row_like),
            sharding.local(weight, sharding.one),
        )
        self.max, self.sum, self.grad_lse = (
            sharding.local(given.get(name), sharding.rows) for name in ("max", "sum", "grad_lse")
        )
        upstream = sharding.rows if self.reduction == NONE else sharding.one
        self.grad_loss = sharding.local(given.get("grad_loss"), upstream)
        self.divisor: Tensor | None = None
        if self.reduction == MEAN:
            share = OPERATORS.divisor(*self.operands, self.ignore_index)
            divisor = sharding.local(sharding.whole(share, sharding.total, share.shape, ()), sharding.one)
            self.divisor = divisor
            self.reduction = SUM
            if self.grad_loss is not None:
                self.grad_loss = self.grad_loss / divisor

    @property
    def options(self) -> tuple[int, int, float]:
        return self.reduction, self.ignore_index, self.label_smoothing

    @property
    def forward_options(self) -> tuple[Any, ...]:
        return *self.options, True

    def whole_loss(self, loss: Tensor) -> DTensor:
        if self.reduction == NONE:
            return self.whole_rows(loss.to(self.loss_dtype))
        total = loss if self.divisor is None else loss / self.divisor
        return self.sharding.whole(total.to(self.loss_dtype), self.sharding.total, total.shape, ())

    def whole_rows(self, rows: Tensor) -> DTensor:
        classes = self.sharding.class_dim
        shape = torch.Size([size for d, size in enumerate(self.whole_logits.shape) if d != classes])
        return self.sharding.whole(rows, self.sharding.rows, shape, torch.empty(shape, device="meta").stride())

    def whole_grad(self, grad: Tensor) -> DTensor:
        return self.sharding.whole(grad, self.sharding.logits, self.whole_logits.shape, self.whole_logits.stride())


def logits_to_overwrite(call: Call) -> Tensor:
    if list(call.whole_logits.placements) != call.sharding.logits:
        raise RuntimeError("cross_entropy: inplace=True needs DTensor logits that are replicated or sharded over rows")
    return call.operands[0]


def loss(call: Call) -> DTensor:
    return call.whole_loss(OPERATORS.loss(*call.operands, *call.forward_options))


def forward(call: Call) -> tuple[DTensor, ...]:
    loss, *rows = OPERATORS.forward(*call.operands, *call.forward_options)
    return call.whole_loss(loss), *map(call.whole_rows, rows)


def forward_grad(call: Call) -> tuple[DTensor, DTensor]:
    if call.divisor is None:
        loss, grad = OPERATORS.forward_grad(*call.operands, *call.forward_options)
        return call.whole_loss(loss), call.whole_grad(grad)
    loss, row_max, row_sum, _ = OPERATORS.forward(*call.operands, *call.forward_options)
    grad = OPERATORS.backward(call.divisor.reciprocal(), None, *call.operands, row_max, row_sum, *call.options)
    return call.whole_loss(loss), call.whole_grad(grad)


def forward_grad_(call: Call) -> DTensor:
    logits, (_, target, weight) = logits_to_overwrite(call), call.operands
    if call.divisor is None:
        return call.whole_loss(OPERATORS.forward_grad_(logits, target, weight, *call.forward_options))
    loss, row_max, row_sum, _ = OPERATORS.forward(logits, target, weight, *call.forward_options)
    OPERATORS.backward_(logits, call.divisor.reciprocal(), target, weight, row_max, row_sum, *call.options)
    return call.whole_loss(loss)


def backward(call: Call) -> DTensor:
    rows = call.max, call.sum
    return call.whole_grad(OPERATORS.backward(call.grad_loss, call.grad_lse, *call.operands, *rows, *call.options))


def backward_(call: Call) -> None:
    logits, (_, target, weight) = logits_to_overwrite(call), call.operands
    OPERATORS.backward_(logits, call.grad_loss, target, weight, call.max, call.sum, *call.options)


def target_backward(call: Call) -> DTensor:
    rows = call.max, call.sum
    return call.whole_grad(
        OPERATORS.target_backward(call.grad_loss, *call.operands, *rows, call.reduction, call.label_smoothing)
    )


def weight_backward(call: Call) -> DTensor:
    rows = call.max, call.sum
    grad = OPERATORS.weight_backward(call.grad_loss, *call.operands, *rows, call.reduction, call.label_smoothing)
    return call.sharding.whole(grad, call.sharding.total, grad.shape, grad.stride())


def register(rule: Callable[[Call], Any]) -> None:
    def on_dtensors(cls: type, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return rule(Call(operator, args))

    torch.library.register_torch_dispatch(f"cross_entropy::{rule.__name__}", DTensor, on_dtensors)


for rule in (loss, forward, forward_grad, forward_grad_, backward, backward_, target_backward, weight_backward):
    register(rule)


@torch.library.register_torch_dispatch("cross_entropy::scale_", DTensor)
def scale_(cls: type, operator: Any, types: Any, args: tuple[DTensor, Tensor], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        grad, factor = args
        sharding = Sharding(grad)
        OPERATORS.scale_(grad.to_local(), sharding.local(factor, sharding.one))
