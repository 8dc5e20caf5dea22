"""The loss of a model that learns from another one's logits."""

from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from cross_entropy.functional import prepare_for
from cross_entropy.options import Call, CallOptions, accumulator_of, check_names, shows_options

__all__ = ["distillation_loss", "topk_distillation_loss"]


class TaughtOptions(TypedDict, total=False):
    """Those of a loss that a teacher has too, besides the parameters."""

    valid_classes: int | None
    softcap: float | None
    z_loss: float
    row_weight: Tensor | None
    divisor: float | Tensor | None
    empty: Literal["nan", "zero"]
    loss_dtype: torch.dtype | None


# As the enumeration Divergence of csrc/ops.h.
DIVERGENCES = {"cross_entropy": 1, "kl": 2}


def _weight_of_rows(
    input: Tensor, target: Tensor, ignore_index: int, row_weight: Tensor | None, class_dim: int
) -> Tensor:
    """The rows' weights, 0 where the target is to be ignored."""
    classes = class_dim if input.dim() > 1 else 0
    rows = input.shape[:classes] + (input.shape[classes + 1 :] if classes >= 0 else ())
    if target.is_floating_point() or target.numel() != rows.numel():
        raise ValueError(
            f"distillation_loss: target must hold a class index for each row, of shape {list(rows)} or flat. "
            f"Got: {target.dtype} of shape {list(target.shape)}"
        )
    ignored = (target == ignore_index).reshape(rows)
    if row_weight is None:
        return (~ignored).to(accumulator_of(input))
    return row_weight.reshape(rows).masked_fill(ignored, 0)


def _run(
    input: Tensor,
    teacher: Tensor,
    of_rows: tuple[Tensor | None, int],
    temperature: float,
    divergence: str,
    reduction: str,
    inplace: bool,
    class_dim: int,
    given: TaughtOptions,
    **teaching: Any,
) -> Tensor:
    """What both losses do with their arguments; `of_rows` are target and ignore_index."""
    if type(input) is not Tensor:
        prepare_for(input)
    check_names("distillation_loss", given, TaughtOptions)
    if divergence not in DIVERGENCES:
        raise ValueError(f"distillation_loss: divergence must be one of {', '.join(DIVERGENCES)}. Got: {divergence!r}")
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"distillation_loss: temperature must be a number, not {type(temperature).__name__}")
    if not temperature > 0:
        raise ValueError(f"distillation_loss: temperature must be positive. Got: {temperature}")
    if class_dim not in (1, -1):
        raise ValueError(f"distillation_loss: class_dim must be -1 or 1. Got: {class_dim}")
    scale = 1.0 / temperature
    options: CallOptions = {**given, "class_dim": None if class_dim == 1 else -1, "logit_scale": scale}
    target, ignore_index = of_rows
    if target is not None:
        options["row_weight"] = _weight_of_rows(input, target, ignore_index, given.get("row_weight"), class_dim)
    softcap = given.get("softcap")
    options["softcap"] = softcap / temperature if isinstance(softcap, (int, float)) else softcap
    number = _Reduction.get_enum(reduction)
    of_teacher = {"divergence": DIVERGENCES[divergence], "teacher_scale": scale, **teaching}
    return Call(input, teacher, number, options, **of_teacher).run(None, -100, 0.0, inplace)


@shows_options
def distillation_loss(
    input: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: Literal["kl", "cross_entropy"] = "kl",
    reverse: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    class_dim: int = -1,
    **options: Unpack[TaughtOptions],
) -> Tensor:
    r"""How far the softmax of each row of logits is from that of a teacher's logits.

    With the input :math:`x`, the teacher's logits :math:`t` and a temperature :math:`T`, of
    :math:`p = \mathrm{softmax}(x / T)` and :math:`q = \mathrm{softmax}(t / T)` a row's loss is

    ======================  ===========================================  ===========================
    ``divergence``          ``reverse=False``                            ``reverse=True``
    ======================  ===========================================  ===========================
    ``"kl"``                :math:`\sum_c q_c (\ln q_c - \ln p_c)`       :math:`\sum_c p_c (\ln p_c - \ln q_c)`
    ``"cross_entropy"``     :math:`-\sum_c q_c \ln p_c`                  :math:`-\sum_c p_c \ln q_c`
    ======================  ===========================================  ===========================

    Both rows of logits are read once; neither softmax is written to memory. If only the input needs a gradient and the
    reduction is ``"mean"`` or ``"sum"``, it is computed in the same pass (float16 excepted). The gradient shrinks with
    :math:`1 / T^2` in the temperature; whoever wants it not to multiplies the loss by :math:`T^2`.

    Args:
        input: logits of shape (…, C) with the classes last, or with ``class_dim=1`` as torch has it, (N, C, …); dtypes
            and layouts as in :func:`cross_entropy.cross_entropy`.
        teacher: the teacher's logits, in the shape of the input. They may require a gradient.
        target: class indices of the shape of the rows, or flat, of which only matters which are `ignore_index`: those
            rows have no loss, no gradient and no part in the mean, and are not read.
        temperature: :math:`T > 0`, of both.
        divergence: see above.
        reverse: see above.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, which divides by the number of rows, or by what `target` and
            `row_weight` leave of them. It is what torch calls ``"batchmean"``.
        softcap: :math:`k > 0`, for logits :math:`k \tanh(x / k)` in place of the input :math:`x`. The teacher's are
            taken as they are.
        z_loss: :math:`\zeta \ge 0`, which adds :math:`\zeta\,(\ln \sum_c e^{x_c / T})^2` to the loss of each row.
        row_weight: of each row, as in :func:`cross_entropy.cross_entropy`. Rows of weight 0 are not read, unless it
            requires a gradient.
        inplace, class_dim, valid_classes, divisor, empty, loss_dtype: as in :func:`cross_entropy.cross_entropy`.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor of the shape of the rows; in the input's dtype.

    Raises:
        ValueError: shapes that differ, an option out of its range, or one that contradicts another.

    >>> distillation_loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 3.5]]))
    tensor(0.0243)
    """
    if has_torch_function_variadic(input, teacher, target):
        return handle_torch_function(  # type: ignore[no-any-return]
            distillation_loss,
            (input, teacher, target),
            input,
            teacher,
            target,
            temperature=temperature,
            divergence=divergence,
            reverse=reverse,
            ignore_index=ignore_index,
            reduction=reduction,
            inplace=inplace,
            class_dim=class_dim,
            **options,
        )
    if teacher.shape != input.shape:
        raise ValueError(
            f"distillation_loss: teacher must have the shape of the input, {list(input.shape)}. "
            f"Got: {list(teacher.shape)}"
        )
    of_rows = target, ignore_index
    call = input, teacher, of_rows, temperature, divergence, reduction, inplace, class_dim, options
    return _run(*call, reverse=reverse)


@shows_options
def topk_distillation_loss(
    input: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    target: Tensor | None = None,
    *,
    rest: Literal["drop", "spread"] = "drop",
    temperature: float = 1.0,
    divergence: Literal["kl", "cross_entropy"] = "kl",
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    class_dim: int = -1,
    **options: Unpack[TaughtOptions],
) -> Tensor:
    r"""The same from the top of a teacher's softmax: for each row the indices of k classes and their probabilities.

    With :math:`p = \mathrm{softmax}(x / T)` of the input :math:`x` a row's loss is :math:`-\sum_c q_c \ln p_c`, and for
    ``divergence="kl"`` that plus :math:`\sum_c q_c \ln q_c`. :math:`q` is as given at the k classes. What their
    probabilities leave of 1 belongs to nobody, or with ``rest="spread"`` to the other classes, in equal parts.

    The logits are read once, and the gradient is computed in the same pass, as in :func:`distillation_loss`.

    Args:
        input: logits of shape (…, C) with the classes last, or with ``class_dim=1`` as torch has it, (N, C, …).
        indices: of shape (…, k), or with ``class_dim=1`` (N, k, …); int64 or int32. A class that a row names twice has
            both probabilities.
        probabilities: of the shape of the indices, in any floating point dtype, without a gradient; the teacher's own
            temperature is in them.
        rest: ``"drop"`` or ``"spread"``.
        temperature: :math:`T > 0`.
        divergence: ``"kl"`` or ``"cross_entropy"``, which have the same gradient.
        target, ignore_index, reduction, inplace, class_dim: as in :func:`distillation_loss`, and so are all others.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor of the shape of the rows; in the input's dtype.

    Raises:
        IndexError: an index is out of bounds. On CUDA it is raised later, see :func:`cross_entropy.check_errors`.
        ValueError: shapes that do not fit, an option out of its range, or one that contradicts another.

    >>> topk_distillation_loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, 1]]), torch.tensor([[0.7, 0.3]]))
    tensor(0.0967)
    """
    if has_torch_function_variadic(input, indices, probabilities, target):
        return handle_torch_function(  # type: ignore[no-any-return]
            topk_distillation_loss,
            (input, indices, probabilities, target),
            input,
            indices,
            probabilities,
            target,
            rest=rest,
            temperature=temperature,
            divergence=divergence,
            ignore_index=ignore_index,
            reduction=reduction,
            inplace=inplace,
            class_dim=class_dim,
            **options,
        )
    if rest not in ("drop", "spread"):
        raise ValueError(f"topk_distillation_loss: rest must be 'drop' or 'spread'. Got: {rest!r}")
    of_rows = target, ignore_index
    call = input, indices, of_rows, temperature, divergence, reduction, inplace, class_dim, options
    return _run(*call, picked=probabilities, spreads=rest == "spread")
