"""The functions of the package: argument forms around the compiled operators."""

from typing import Any, NamedTuple, Unpack, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from cross_entropy import _C
from cross_entropy.options import NONE, Call, CallOptions, RowOptions, accumulator_of, check_outputs, shows_options

__all__ = ["RowStats", "check_errors", "cross_entropy", "entropy", "log_prob", "release_memory", "row_stats"]


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


def prepare_for(logits: Tensor) -> None:
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
            multiplies the row's loss, z-loss included, and its part in what the mean divides by; that of an ignored row
            may be anything, even NaN. It may require a gradient; then that of the logits is left to the backward pass.
        divisor: what the mean divides by instead, such as the number of tokens of all batches whose gradients are
            accumulated: a positive number, or a tensor of shape (), which on the GPU is not waited for. It is taken
            for constant.
        empty: what the mean of nothing is, where all rows are ignored or their weights are 0: ``"nan"`` as in torch,
            or ``"zero"``, with a gradient of 0.
        loss_dtype: ``torch.float32`` for a loss of half-type logits that is not rounded to their type.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor of the target's shape without classes; in the input's dtype.
        DTensor logits, which may be sharded over rows, over classes or both, give a DTensor: where rows are sharded a
        partial sum, or with ``reduction="none"`` sharded as the rows.

    Raises:
        IndexError: a class index is out of bounds. On CUDA it is raised later, see :func:`check_errors`.
        ValueError: an option out of its range, or one that contradicts another.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch's function for the same mistake.

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
        prepare_for(input)
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


@overload
def row_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    outputs: None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **options: Unpack[RowOptions],
) -> RowStats: ...
@overload
def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    outputs: tuple[str, ...],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **options: Unpack[RowOptions],
) -> tuple[Tensor, ...]: ...
def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    outputs: tuple[str, ...] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **options: Unpack[RowOptions],
) -> RowStats | tuple[Tensor, ...]:
    r"""What a single read of the logits tells about each row.

    Args:
        logits, target, weight, ignore_index, label_smoothing: as in :func:`cross_entropy`. Without a target there are
            only the outputs that do not depend on it.
        outputs: what is wanted, of the logits :math:`z` after `logit_scale` and `softcap` and their softmax :math:`p`:

            - ``"loss"``: as :func:`cross_entropy` has it without a reduction; 0 in ignored rows.
            - ``"logsumexp"``: :math:`\ln \sum_c e^{z_c}`.
            - ``"maximum"``: of :math:`z`.
            - ``"log_prob"``: :math:`\ln p` of the target; 0 in ignored rows.
            - ``"entropy"``: :math:`-\sum_c p_c \ln p_c`.
            - ``"argmax"``: the first class of the largest logit, NaN left out.
            - ``"rank"``: how many classes are before the target: of a larger logit, or of an equal one and a smaller
              index; −1 in ignored rows.
            - ``"correct"``: whether the target has rank 0.
        class_dim, valid_classes, logit_scale, softcap, z_loss: as in :func:`cross_entropy`.

    Returns:
        The outputs in their order, or else a RowStats of maximum, logsumexp and loss; tensors of the shape of the rows:
        (), (N) or (N, d1, …, dK). They are float64 for float64 logits and float32 for all others; `argmax` and `rank`
        are int64, `correct` is bool. `loss`, `logsumexp`, `log_prob` and `entropy` are differentiable, all in one
        backward pass. What does not depend on the target is given of ignored rows too.

    Raises:
        ValueError: an output that is not known, asked for twice, or needs class indices; TypeError: one that needs a
            target. Otherwise as :func:`cross_entropy`.

    >>> row_stats(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
    RowStats(maximum=tensor([3.]), logsumexp=tensor([3.4076]), loss=tensor([0.4076]))
    >>> row_stats(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]), outputs=("entropy", "rank"))
    (tensor([0.8324]), tensor([1]))
    """
    if has_torch_function_variadic(logits, target, weight):
        return handle_torch_function(
            row_stats,  # type: ignore[arg-type]
            (logits, target, weight),
            logits,
            target,
            weight=weight,
            outputs=outputs,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            **options,  # type: ignore[arg-type]
        )
    if type(logits) is not Tensor:
        prepare_for(logits)
    if outputs is not None or options:
        names = ("maximum", "logsumexp", "loss") if outputs is None else tuple(outputs)
        check_outputs(names, logits, target, options)
        call = Call(logits, target, NONE, options)
        results = call.stats(names, weight, ignore_index, label_smoothing)
        return RowStats._make(results) if outputs is None else results
    if target is None:
        raise TypeError("row_stats() needs a target, or outputs that do not depend on it")
    if is_compiling():
        operator = torch.ops.cross_entropy.row_stats
        return RowStats._make(operator(logits, target, weight, ignore_index, label_smoothing))
    return RowStats._make(_C.row_stats(logits, target, weight, ignore_index, label_smoothing))


def _options_of_softmax(
    logits: Tensor, temperature: float | Tensor, class_dim: int, valid_classes: int | None
) -> RowOptions:
    if class_dim not in (1, -1):
        raise ValueError(f"cross_entropy: class_dim must be -1 or 1. Got: {class_dim}")
    if isinstance(temperature, Tensor):
        if temperature.dim() > 0:
            raise ValueError(f"cross_entropy: temperature must be of shape (). Got: {list(temperature.shape)}")
        scale: float | Tensor = temperature.to(accumulator_of(logits)).reciprocal()
    elif temperature > 0:
        scale = 1.0 / temperature
    else:
        raise ValueError(f"cross_entropy: temperature must be positive. Got: {temperature}")
    return {"class_dim": None if class_dim == 1 else -1, "valid_classes": valid_classes, "logit_scale": scale}


def log_prob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    class_dim: int = -1,
    valid_classes: int | None = None,
) -> Tensor:
    r"""The log-probability of each target, :math:`\ln \mathrm{softmax}(x / T)_t`, in one read of the logits :math:`x`.

    Args:
        logits: of shape (…, C) with the classes last, or with ``class_dim=1`` as torch has it, (N, C, …); dtypes and
            layouts as in :func:`cross_entropy`.
        target: class indices of the shape of the rows, or flat.
        temperature: :math:`T > 0`, a number or a tensor of shape (), which may require a gradient.
        ignore_index: rows with this target get 0 and no gradient.
        class_dim: -1 or 1.
        valid_classes: as in :func:`cross_entropy`.

    Returns:
        A tensor of the target's shape, float64 for float64 logits and float32 for all others. With the entropy in the
        same pass it is ``row_stats(…, outputs=("log_prob", "entropy"))``.

    >>> log_prob(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
    tensor([-0.4076])
    """
    options = _options_of_softmax(logits, temperature, class_dim, valid_classes)
    return row_stats(logits, target, outputs=("log_prob",), ignore_index=ignore_index, **options)[0]


def entropy(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    class_dim: int = -1,
    valid_classes: int | None = None,
) -> Tensor:
    r"""The entropy :math:`-\sum_c p_c \ln p_c` of each row's :math:`p = \mathrm{softmax}(x / T)`, in one read.

    Args:
        logits, temperature, class_dim, valid_classes: as in :func:`log_prob`.

    Returns:
        A tensor of the shape of the rows, float64 for float64 logits and float32 for all others. The backward pass
        reads the logits once and writes their gradient.

    >>> entropy(torch.tensor([[1.0, 1.0]]))
    tensor([0.6931])
    """
    options = _options_of_softmax(logits, temperature, class_dim, valid_classes)
    return row_stats(logits, outputs=("entropy",), **options)[0]


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
