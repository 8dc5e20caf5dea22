"""The loss of logits whose classes lie in shards, on the processes of a group."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup
from torch.nn import _reduction as _Reduction

from cross_entropy import _C
from cross_entropy.options import NONE, Call, CallOptions, accumulator_of, shows_options

__all__ = ["vocab_parallel_cross_entropy"]

OPERATORS = torch.ops.cross_entropy
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MAX_DIMS = 8  # of rows
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name up to torch 2.12


class Shard(NamedTuple):
    """This process's part of the classes."""

    group: ProcessGroup
    first: int
    own: int  # without padding
    total: int  # of all processes'

    @classmethod
    def of(cls, group: ProcessGroup, rank: int, sizes: Sequence[int], valid_classes: int | None) -> "Shard":
        """That of the process `rank`, from the numbers of classes of all."""
        columns, first = sum(sizes), sum(sizes[:rank])
        valid = columns if valid_classes is None else valid_classes
        if not 0 < valid <= columns:
            raise ValueError(
                f"cross_entropy: valid_classes must be between 1 and the logits' {columns} classes. Got: {valid}"
            )
        return cls(group, min(first, valid), max(0, min(sizes[rank], valid - first)), valid)

    def inputs(self, logits: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> dict[str, Any]:
        """What the operators take."""
        own = None if weight is None else weight[self.first : self.first + self.own]
        return {
            "logits": logits,
            "target": target,
            "weight": own,
            **options,
            "valid_classes": None if self.own == logits.shape[class_dim(logits)] else self.own,
            "first_class": self.first,
            "all_classes": self.total,
        }


def class_dim(logits: Tensor) -> int:
    return min(1, logits.dim() - 1)


def forward(
    shard: Shard,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    z_loss: float = 0.0,
    all_rows: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Each row's loss, and the (max, sum, coefficients) of all its classes that its gradient needs.

    Those of ignored rows are there only with `all_rows`.
    """
    dim = class_dim(logits)
    if shard.own > 0:
        state = OPERATORS.shard_state(all_rows, **shard.inputs(logits, target, weight, reduction=NONE, **options))
    else:
        state = logits.new_zeros((4, *logits.shape[:dim], *logits.shape[dim + 1 :]), dtype=accumulator_of(logits))
        state[0] = -torch.inf
    states = state.new_empty((dist.get_world_size(shard.group), *state.shape))
    all_gather(states, state.unsqueeze(0), group=shard.group)
    loss, top, total, coefficients = OPERATORS.merge_shards(states, z_loss)
    if not target.is_floating_point():
        loss = loss.masked_fill_((target == options["ignore_index"]).view_as(loss), 0)
    return loss, top, total, coefficients


def backward(
    operator: Any,
    shard: Shard,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    rows: Sequence[Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    **options: Any,
) -> Tensor:
    """What one of the backward operators makes of what forward() has left of the rows; of backward_ the logits."""
    if shard.own == 0:
        operand = {OPERATORS.target_backward: target, OPERATORS.logit_scale_backward: options["logit_scale_tensor"]}
        if operator is not OPERATORS.backward_:
            return torch.zeros_like(operand.get(operator, logits))
        return logits.zero_()
    top, total, coefficients = rows
    inputs = shard.inputs(logits, target, weight, **options)
    of_rows = {"grad_lse": grad_lse, "max": top, "sum": total, "coefficients": coefficients}
    nothing = dict.fromkeys(["grad_log_prob", "grad_entropy", "entropy", "teacher_max", "teacher_sum", "mean"])
    result: Tensor | None = operator(grad_loss=grad_loss, **of_rows, **nothing, **inputs)
    return logits if result is None else result


class _Rows(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        shard: Shard,
        inplace: bool,
        options: dict[str, Any],
    ) -> Tensor:
        loss, *rows = forward(shard, logits, target, weight, logit_scale_tensor=scale, **options)
        ctx.save_for_backward(logits, target, weight, scale, *rows)
        ctx.shard, ctx.inplace, ctx.options = shard, inplace, options
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved, target, weight, scale, *rows = ctx.saved_tensors
        logits, shard = saved.detach(), ctx.shard

        def by(operator: Any) -> Tensor:
            options = {**ctx.options, "logit_scale_tensor": scale, "reduction": NONE}
            return backward(operator, shard, grad_loss, None, rows, logits, target, weight, **options)

        of_logits, of_target, _, of_scale, *_ = ctx.needs_input_grad
        target_grad = by(OPERATORS.target_backward) if of_target else None
        scale_grad = by(OPERATORS.logit_scale_backward) if of_scale else None
        if of_scale:
            dist.all_reduce(scale_grad, group=shard.group)
        logits_grad = None
        if of_logits:  # last: the others read the logits
            logits_grad = by(OPERATORS.backward_ if ctx.inplace else OPERATORS.backward)
        if of_logits and ctx.inplace:
            increment_version(logits)
        return logits_grad, target_grad, None, scale_grad, None, None, None


def _exchange(
    group: ProcessGroup, rows: tuple[int, ...], classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, ...]:
    """The processes' numbers of classes."""
    padded = [*rows, *[-1] * (MAX_DIMS - len(rows))]
    mine = torch.tensor([[classes, DTYPES.index(dtype), *padded]], device=device)
    of_all = mine.new_empty((dist.get_world_size(group), mine.shape[1]))
    all_gather(of_all, mine, group=group)
    sizes = []
    for rank, (size, number, *theirs) in enumerate(of_all.tolist()):
        sizes.append(size)
        if theirs != padded or number != DTYPES.index(dtype):
            raise ValueError(
                "vocab_parallel_cross_entropy: local_logits must have the same rows and dtype in all processes. Got "
                f"rows of shape {list(rows)} in {dtype}, and {[n for n in theirs if n >= 0]} in {DTYPES[number]} in "
                f"process {rank} of the group"
            )
    return tuple(sizes)


# A GPU would have to be waited for in every call.
_exchange_once = functools.lru_cache(maxsize=None)(_exchange)


def _shard_of(logits: Tensor, group: ProcessGroup | None, valid_classes: int | None) -> tuple[Shard, int]:
    """This process's, and how many columns all have."""
    dim = class_dim(logits)
    rows = (*logits.shape[:dim], *logits.shape[dim + 1 :])
    if logits.dtype not in DTYPES or logits.dim() == 0 or len(rows) > MAX_DIMS:
        raise ValueError(
            f"vocab_parallel_cross_entropy: there is no loss of local_logits in {logits.dtype} of shape "
            f"{list(logits.shape)}"
        )
    exchange = _exchange if logits.device.type == "cpu" else _exchange_once
    group = group or dist.group.WORLD
    assert group is not None
    sizes = exchange(group, rows, logits.shape[dim], logits.dtype, logits.device)
    return Shard.of(group, dist.get_rank(group), sizes, valid_classes), sum(sizes)


def on_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


@shows_options
def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    group: ProcessGroup | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    inplace: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor:
    r"""The cross-entropy of logits whose classes lie in shards on the processes of a group.

    It is that of :func:`cross_entropy.cross_entropy` for the logits of all processes next to each other along the
    classes, the label smoothing over all classes included. Each process reads its logits once; then four numbers a row
    are gathered from all, and merged in the order of the processes, so that all have the same loss to the bit. The
    backward pass of each reads its logits once more and writes their gradient, without communication: its upstream
    gradient is to be the same in all processes, as their losses are.

    Args:
        local_logits: this process's classes, of shape (C), (N, C) or (N, C, d1, …, dK), with ``class_dim=-1`` (…, C).
            The C of the processes may differ, and be 0; all else is the same in all processes. The classes' indices
            count through the processes in the order of their ranks in the group.
        target: class indices among all classes, the same in all processes; or this process's part of the class
            probabilities, in the shape of its logits, which may require a gradient.
        group: of the processes; by default all of them.
        weight: of each of all classes, the same in all processes, without a gradient.
        valid_classes: how many of all classes there are; the last columns of the last processes are padding.
        inplace: the backward pass writes the gradient over the local logits instead of taking as much memory again.
            What needs the logits later in a backward pass raises an error; a second backward pass is not possible.
        ignore_index, reduction, label_smoothing, options: as in :func:`cross_entropy.cross_entropy`, the same in all
            processes.

    On the CPU each call compares the shapes of all processes first. On CUDA, where that has to be waited for, it is
    done once for every shape of the local logits.

    Returns:
        The same loss in all processes.

    Raises:
        ValueError: the processes' rows or dtypes differ. Otherwise as :func:`cross_entropy.cross_entropy`, with
            `inplace` too.
    """
    number = _Reduction.get_enum(reduction)
    call = Call(local_logits, target, number, options)
    logits, target, arguments = call.input, call.target, call.arguments
    shard, columns = _shard_of(logits, group, arguments.pop("valid_classes", None))
    divisor = arguments.get("divisor_tensor")
    if divisor is not None and divisor.is_cpu and not (divisor > 0).all():
        raise ValueError(f"cross_entropy: divisor must be positive. Got: {divisor}")
    if weight is not None and weight.requires_grad:
        raise NotImplementedError("vocab_parallel_cross_entropy: weight has no gradient")
    # What is wrong with the arguments shows in the whole loss.
    dim = class_dim(logits)
    whole = torch.empty((*logits.shape[:dim], columns, *logits.shape[dim + 1 :]), dtype=logits.dtype, device="meta")
    whole_target = whole if target.is_floating_point() and target.shape == logits.shape else on_meta(target)
    of_whole = {name: on_meta(value) for name, value in arguments.items()} | {"valid_classes": shard.total}
    OPERATORS.loss(whole, whole_target, on_meta(weight), number, ignore_index, label_smoothing, **of_whole)
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        if target.requires_grad:
            raise RuntimeError("cross_entropy: inplace=True overwrites the logits that the gradient of target needs")
        _C.check_overwritable(logits)
    full_precision = arguments.pop("full_precision", False) or torch.is_autocast_enabled(logits.device.type)
    scale = arguments.pop("logit_scale_tensor", None)
    if scale is not None:  # its gradient is summed over the processes before it is rounded
        scale = scale.to(accumulator_of(logits))
    of_logits: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    of_logits |= {name: arguments.pop(name) for name in ("softcap", "logit_scale", "z_loss") if name in arguments}
    rows = _Rows.apply(logits, target, weight, scale, shard, inplace, of_logits)
    loss: Tensor = OPERATORS.reduce(
        rows, logits, target, weight, number, ignore_index, 0.0, full_precision, all_classes=shard.total, **arguments
    )
    return loss.flatten() if call.is_flat and number == NONE else loss
