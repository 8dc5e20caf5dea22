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
    loss = r * rows.loss(z_loss)
    if reduction == "none":
        return loss.reshape(rows.shape)
    if reduction == "sum" or divisor is not None:
        return loss.sum() / (1 if divisor is None else float(divisor))
    share = r if rows.index is None else r * rows.target_weight
    total = share.where(rows.kept, 0).sum()
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


def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: str = "kl",
    reverse: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_dim: int = -1,
    valid_classes: int | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    empty: str = "nan",
) -> Tensor:
    """As cross_entropy.distillation_loss, in float64 and differentiable."""
    classes = logits.shape[class_dim] if valid_classes is None else valid_classes

    def rows(tensor: Tensor) -> Tensor:
        return tensor.movedim(class_dim, -1)[..., :classes].reshape(-1, classes).double()

    shape = logits.movedim(class_dim, -1).shape[:-1]
    x, t = rows(logits), rows(teacher)
    kept = torch.ones(len(x), dtype=torch.bool) if target is None else target.reshape(-1) != ignore_index
    r = torch.ones(len(x), dtype=torch.float64) if row_weight is None else row_weight.reshape(-1).double()
    r = r.where(kept, 0)
    is_read = kept if row_weight is not None and row_weight.requires_grad else r != 0
    x, t = (tensor.where(is_read[:, None], 0) for tensor in (x, t))
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    of_z, of_t = log_sum_exp(z), log_sum_exp(t / temperature)
    log_p, log_q = (shifted - lse for lse, shifted, _ in (of_z, of_t))
    log_a, log_b = (log_p, log_q) if reverse else (log_q, log_p)
    a = log_a.exp()
    is_term = a != 0  # 0 · ∞ is none
    terms = -log_b.where(is_term, 0) + (log_a.where(is_term, 0) if divergence == "kl" else 0)
    loss = r * ((a * terms).sum(dim=1) + z_loss * (of_z[0] + of_z[2]).square().squeeze(1)).where(is_read, 0)
    if reduction == "none":
        return loss.reshape(shape)
    if reduction == "sum" or divisor is not None:
        return loss.sum() / (1 if divisor is None else float(divisor))
    return loss.sum() * 0 if empty == "zero" and r.sum() == 0 else loss.sum() / r.sum()
