"""The float64 oracle: everything written from its formula, without torch's loss functions or softmax."""

from typing import Any

import torch
from torch import Tensor


class Rows:
    """The logits z of each row, as the formulas have them, and the coefficients a of its loss."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor | None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        *,
        class_dim: int | None = None,
        valid_classes: int | None = None,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
    ) -> None:
        dim = min(1, logits.dim() - 1) if class_dim is None else class_dim
        classes = logits.shape[dim] if valid_classes is None else valid_classes

        def rows(tensor: Tensor) -> Tensor:
            return tensor.movedim(dim, -1)[..., :classes].reshape(-1, classes).double()

        def transformed(x: Tensor) -> Tensor:
            z = x * torch.as_tensor(logit_scale, dtype=torch.float64)
            return z if softcap is None else softcap * torch.tanh(z / softcap)

        x = rows(logits)
        self.shape = logits.movedim(dim, -1).shape[:-1]
        self.own_z = transformed(x)  # of ignored rows too, which may be NaN
        if target is None:
            return
        self.kept = torch.ones(len(x), dtype=torch.bool)
        self.index = None
        if target.is_floating_point():
            q = rows(target)
        else:
            self.shape = self.shape if class_dim is None else target.shape
            index = target.reshape(-1).long()
            self.kept = index != ignore_index
            self.index = index.where(self.kept, 0)
            q = torch.nn.functional.one_hot(self.index, classes).double()
        w = torch.ones(classes, dtype=torch.float64) if weight is None else weight[:classes].double()
        self.target_weight = (w * q).sum(dim=1)
        self.a = w * ((1 - label_smoothing) * q + label_smoothing / classes)
        self.z = transformed(x.where(self.kept[:, None], 0))

    def loss(self, z_loss: float) -> Tensor:
        lse, shifted, top = log_sum_exp(self.z)
        is_term = (self.a != 0) | shifted.isfinite()  # 0 · ∞ is none
        loss = (self.a * (lse - shifted).where(is_term, 0)).sum(dim=1)
        if z_loss:
            loss = loss + z_loss * (lse + top).square().squeeze(1)
        return loss.where(self.kept, 0)


def log_sum_exp(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ln Σ exp(z − max), z − max, and max, which is a constant."""
    top = z.max(dim=1, keepdim=True).values.detach()
    shifted = z - top
    return shifted.exp().sum(dim=1, keepdim=True).log(), shifted, top


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    empty: str = "nan",
    **of_rows: Any,
) -> Tensor:
    """As cross_entropy.cross_entropy, in float64 and differentiable."""
    rows = Rows(logits, target, weight, ignore_index, label_smoothing, **of_rows)
    r = torch.ones(len(rows.z), dtype=torch.float64) if row_weight is None else row_weight.reshape(-1).double()
    r = r.where(rows.kept, 0)
    loss = r * rows.loss(z_loss)
    if reduction == "none":
        return loss.reshape(rows.shape)
    if reduction == "sum" or divisor is not None:
        return loss.sum() / (1 if divisor is None else float(divisor))
    share = r if rows.index is None else r * rows.target_weight
    total = share.sum()
    if empty == "zero" and total == 0:
        return loss.sum() * 0
    return loss.sum() / total


def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    **of_rows: Any,
) -> dict[str, Tensor]:
    """All outputs of cross_entropy.row_stats that there are for such a target, in float64 and differentiable."""
    rows = Rows(logits, target, weight, **of_rows)
    lse, shifted, top = log_sum_exp(rows.own_z)
    log_p = shifted - lse
    p = log_p.exp()
    classes = torch.arange(p.shape[1])
    stats = {
        "maximum": top.squeeze(1),
        "logsumexp": (lse + top).squeeze(1),
        "entropy": -(p * log_p.where(p != 0, 0)).sum(dim=1),
        # The first one, which argmax of equal logits need not be.
        "argmax": torch.where(rows.own_z == top, classes, len(classes) - 1).amin(dim=1),
    }
    if target is not None:
        stats["loss"] = rows.loss(z_loss)
    if target is not None and rows.index is not None:
        index = rows.index[:, None]
        lse, shifted, _ = log_sum_exp(rows.z)
        of_target = rows.z.gather(1, index)
        before = (rows.z > of_target) | ((rows.z == of_target) & (classes < index))
        rank = before.sum(dim=1).where(rows.kept, -1)
        log_prob = (shifted.gather(1, index) - lse).squeeze(1).where(rows.kept, 0)
        stats |= {"log_prob": log_prob, "rank": rank, "correct": rank == 0}
    return {name: value.reshape(rows.shape) for name, value in stats.items()}


class Taught:
    """The rows that a teacher's softmax is compared with, what they weigh, and what becomes of their losses."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor | None = None,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        class_dim: int = -1,
        valid_classes: int | None = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
        row_weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
        empty: str = "nan",
    ) -> None:
        self.class_dim = class_dim
        self.classes = logits.shape[class_dim] if valid_classes is None else valid_classes
        self.shape = logits.movedim(class_dim, -1).shape[:-1]
        kept = torch.ones(self.shape.numel(), dtype=torch.bool)
        if target is not None:
            kept = target.reshape(-1) != ignore_index
        r = torch.ones(len(kept), dtype=torch.float64) if row_weight is None else row_weight.reshape(-1).double()
        self.r = r.where(kept, 0)
        self.is_read = kept if row_weight is not None and row_weight.requires_grad else self.r != 0
        x = self.rows(logits)
        z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
        lse, shifted, top = log_sum_exp(z)
        self.log_p = shifted - lse
        self.z_loss = z_loss * (lse + top).square().squeeze(1)
        self.temperature, self.reduction, self.divisor, self.empty = temperature, reduction, divisor, empty

    def rows(self, logits: Tensor) -> Tensor:
        rows = logits.movedim(self.class_dim, -1)[..., : self.classes].reshape(-1, self.classes).double()
        return rows.where(self.is_read[:, None], 0)

    def reduce(self, divergence: Tensor) -> Tensor:
        loss = self.r * (divergence + self.z_loss).where(self.is_read, 0)
        if self.reduction == "none":
            return loss.reshape(self.shape)
        if self.reduction == "sum" or self.divisor is not None:
            return loss.sum() / (1 if self.divisor is None else float(self.divisor))
        return loss.sum() * 0 if self.empty == "zero" and self.r.sum() == 0 else loss.sum() / self.r.sum()


def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    divergence: str = "kl",
    reverse: bool = False,
    **options: Any,
) -> Tensor:
    """As cross_entropy.distillation_loss, in float64 and differentiable."""
    taught = Taught(logits, target, **options)
    lse, shifted, _ = log_sum_exp(taught.rows(teacher) / taught.temperature)
    log_p, log_q = taught.log_p, shifted - lse
    log_a, log_b = (log_p, log_q) if reverse else (log_q, log_p)
    a = log_a.exp()
    is_term = a != 0  # 0 · ∞ is none
    terms = -log_b.where(is_term, 0) + (log_a.where(is_term, 0) if divergence == "kl" else 0)
    return taught.reduce((a * terms).sum(dim=1))


def topk_distillation_loss(
    logits: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    target: Tensor | None = None,
    *,
    rest: str = "drop",
    divergence: str = "kl",
    **options: Any,
) -> Tensor:
    """As cross_entropy.topk_distillation_loss, from the probabilities of all classes."""
    taught = Taught(logits, target, **options)
    picks = indices.shape[taught.class_dim]
    i = indices.movedim(taught.class_dim, -1).reshape(-1, picks).long()
    q = probabilities.movedim(taught.class_dim, -1).reshape(-1, picks).double()
    others = taught.classes - picks
    background = torch.zeros(len(q), dtype=torch.float64)
    if rest == "spread" and others:
        background = (1 - q.sum(dim=1)).clamp(min=0) / others
    of_all = background[:, None].repeat(1, taught.classes).scatter_add(1, i, q - background[:, None])
    loss = -(of_all * taught.log_p.where(of_all != 0, 0)).sum(dim=1)
    if divergence == "kl":
        loss = loss + torch.special.xlogy(q, q).sum(dim=1) + others * torch.special.xlogy(background, background)
    return taught.reduce(loss)
