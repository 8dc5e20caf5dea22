"""The functions of the package: argument forms around the compiled operators."""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from cross_entropy import _C
from cross_entropy.options import Call, CallOptions, shows_options

__all__ = ["RowStats", "check_errors", "cross_entropy", "row_stats"]


class _RowStats(NamedTuple):
    maximum: Tensor
    logsumexp: Tensor
    loss: Tensor


class RowStats(_RowStats):
    """What one read of the logits tells about each row; see :func:`row_stats`."""

    __slots__ = ()

    def __new__(cls, *results: Any) -> "RowStats":
        # Tensor.__torch_function__ makes what a subclass gets back from a single iterable, as torch's own are made.
        return super().__new__(cls, *(results[0] if len(results) == 1 else results))


def _prepare_for(logits: Tensor) -> None:
    """Whoever has a DTensor has imported torch.distributed.tensor, which takes too long for all others."""
    if type(logits).__name__ == "DTensor":
        import cross_entropy.sharding  # noqa: F401


@shows_options
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor:
    r"""Cross-entropy between logits and targets: a drop-in for :func:`torch.nn.functional.cross_entropy`.

    With logits :math:`z`, coefficients :math:`a_c = w_c\,((1-\varepsilon)\,q_c + \varepsilon/C)` and
    :math:`q` the target's probabilities (1 at a class index), a row's loss is
    :math:`\sum_c a_c\,(\ln \sum_k e^{z_k} - z_c)`. The options behind `inplace` are this package's own.

    The logits are read once. If they need a gradient and the reduction is ``"mean"`` or ``"sum"``, it is computed
    in the same pass (float16 excepted: its range cannot hold a gradient before the loss scale is known).

    Args:
        input: unnormalised logits of shape (C), (N, C) or (N, C, d1, …, dK), in any memory layout; float32, float64,
            float16 or bfloat16. Half types are computed in float32.
        target: class indices of shape (), (N) or (N, d1, …, dK), int64, int32 or, for (C) and (N, C), uint8; or class
            probabilities of the input's shape. Probabilities may require a gradient.
        weight: of each class, shape (C). With probabilities it may require a gradient.
        size_average: deprecated, see `reduction`.
        ignore_index: rows with this target have no loss, no gradient and no part in the mean, and are not read. Not
            for probabilities.
        reduce: deprecated, see `reduction`.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, which divides by the kept rows' total class weight, or for
            probabilities by the number of rows.
        label_smoothing: ε in [0, 1].
        inplace: the gradient replaces the logits in memory instead of taking as much again. It is there after this
            call (float16, or ``reduction="none"``: after the backward pass). What needs the logits later in a
            backward pass raises an error; a second backward pass is not possible. Without a gradient to compute, and
            inside transforms of torch.func, the logits are left alone.
        class_dim: -1 for input of shape (…, C) with its classes last; index targets then have the shape (…), or are
            flat. By default torch's rule: dimension 1, or 0 of (C).
        valid_classes: how many of the C classes there are; the other columns are padding. They are not read, their
            gradient is 0, and label smoothing leaves them out. `weight` may be of the valid classes only.
        logit_scale: :math:`s` in :math:`z = s x`, with :math:`x` the input: an inverse temperature. A number, or a
            tensor of shape (), which may require a gradient.
        softcap: :math:`k > 0` in :math:`z = k \tanh(s x / k)`.
        z_loss: :math:`\zeta \ge 0`, which adds :math:`\zeta\,(\ln \sum_k e^{z_k})^2` to the loss of each kept row,
            whatever its class weight.
        row_weight: :math:`r` of each row, in the shape of the loss without a reduction; any floating point dtype. It
            multiplies the row's loss, z-loss included, and its part in what the mean divides by. It may require a
            gradient; then that of the logits is left to the backward pass.
        divisor: what the mean divides by instead, such as the number of tokens of all batches whose gradients are
            accumulated: a positive number, or a tensor of shape (), which on the GPU is not waited for. It is taken
            for constant.
        empty: what the mean of nothing is, where all rows are ignored or their weights are 0: ``"nan"`` as in torch,
            or ``"zero"``, with a gradient of 0.
        loss_dtype: ``torch.float32`` for a loss of half-type logits that is not rounded to their type.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor of the target's shape without classes; in the input's dtype.

    Raises:
        IndexError: a class index is out of bounds. On CUDA it is raised later, see :func:`check_errors`.
        ValueError: an option out of its range, or one that contradicts another.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch's function for the same mistake;
            NotImplementedError for DTensor logits that are sharded over their classes. Sharded over rows, they give a
            DTensor loss: a partial sum, or with ``reduction="none"`` sharded as the rows.

    >>> cross_entropy(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
    tensor(0.4076)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            inplace=inplace,
            **options,
        )
    if type(input) is not Tensor:
        _prepare_for(input)
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    number = _Reduction.get_enum(reduction)
    if options:
        return Call(input, target, number, options).run(weight, ignore_index, label_smoothing, inplace)
    if is_compiling():
        operators = torch.ops.cross_entropy
        operator = operators.cross_entropy_ if inplace else operators.cross_entropy
        return operator(input, target, weight, number, ignore_index, label_smoothing)
    return _C.cross_entropy(input, target, weight, number, ignore_index, label_smoothing, inplace)


def row_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> RowStats:
    """Each row's maximum, logsumexp and loss, from a single read of the logits.

    Args:
        logits, target, weight, ignore_index, label_smoothing: as in :func:`cross_entropy`.

    Returns:
        RowStats of three tensors of the shape of the rows, (), (N) or (N, d1, …, dK), in float64 for float64 logits
        and float32 for all others. `logsumexp` and `loss` are differentiable. In an ignored row the loss is 0; the
        maximum and the logsumexp are its own.

    >>> row_stats(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
    RowStats(maximum=tensor([3.]), logsumexp=tensor([3.4076]), loss=tensor([0.4076]))
    """
    if has_torch_function_variadic(logits, target, weight):
        return handle_torch_function(
            row_stats,
            (logits, target, weight),
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    if type(logits) is not Tensor:
        _prepare_for(logits)
    if is_compiling():
        operator = torch.ops.cross_entropy.row_stats
        return RowStats._make(operator(logits, target, weight, ignore_index, label_smoothing))
    return RowStats._make(_C.row_stats(logits, target, weight, ignore_index, label_smoothing))


def check_errors() -> None:
    """Waits for all CUDA devices in use and raises what the kernels have found wrong with their targets.

    A call on CUDA tensors does not wait for its kernels, so it cannot raise an error for a class index that is out of
    bounds. Such a row is not read; its loss and its gradient become NaN, and with them the mean and the sum. The device
    stays usable. The error itself is raised by the next call of this package on that device that begins after the
    kernel has run, or by this function. Without CUDA there is nothing to wait for.

    Raises:
        IndexError: names the first such row (counted through the target's elements), its target and the device. It is
            raised once; what later kernels find is new.

    >>> check_errors()
    """
    _C.check_errors()


def release_memory() -> None:
    """Gives the memory that is kept for the next large gradient on the CPU back to the system.

    The memory of the last gradient above 8 MiB that was freed is kept, since touching fresh memory takes longer than
    computing the gradient. The system takes it back by itself when memory runs short. The next gradient is slower.

    >>> release_memory()
    """
    _C.release_memory()
