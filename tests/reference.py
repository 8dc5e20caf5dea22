"""The float64 oracle: the loss written from its formula, one row at a time, without torch's loss functions."""

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As cross_entropy.cross_entropy, in float64 and differentiable."""
    probabilities = logits.shape == target.shape
    rows = (logits if logits.dim() > 1 else logits[None]).movedim(1, -1)
    classes = rows.shape[-1]
    z = rows.reshape(-1, classes).double()
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    if probabilities:
        q = (target if target.dim() > 1 else target[None]).movedim(1, -1).reshape(-1, classes)
        q = q.double()
        kept = torch.ones(len(z), dtype=torch.bool)
    else:
        index = target.reshape(-1).long()
        kept = index != ignore_index
        q = torch.nn.functional.one_hot(index.where(kept, 0), classes).double()
    z = z.where(kept[:, None], 0)
    a = w * ((1 - label_smoothing) * q + label_smoothing / classes)
    shifted = z - z.max(dim=1, keepdim=True).values.detach()
    lse = shifted.exp().sum(dim=1, keepdim=True).log()
    loss = (a * (lse - shifted)).sum(dim=1).where(kept, 0)
    if reduction == "none":
        return loss.reshape(rows.shape[:-1] if logits.dim() > 1 else ())
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (len(z) if probabilities else (w * q).sum(dim=1).where(kept, 0).sum())
