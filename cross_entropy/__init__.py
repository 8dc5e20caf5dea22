"""Cross-entropy for PyTorch in one read of the logits.

>>> import torch, cross_entropy
>>> loss = cross_entropy.CrossEntropyLoss()
>>> loss(torch.tensor([100.0, 1, 1, 1]), torch.tensor([1.0, 0, 0, 0]))
tensor(-0.)
>>> loss(torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0]))
tensor(0.7437)
>>> loss(torch.tensor([[1.0, 1, 100, 1]]), torch.tensor([2]))
tensor(-0.)
"""

import torch

from cross_entropy.distillation import distillation_loss, topk_distillation_loss
from cross_entropy.functional import (
    RowStats,
    check_errors,
    cross_entropy,
    entropy,
    log_prob,
    release_memory,
    row_stats,
)
from cross_entropy.info import BuildInfo, __version__, build_info
from cross_entropy.modules import CrossEntropyLoss

if torch.distributed.is_available():
    from cross_entropy import parallel

__all__ = [
    "BuildInfo",
    "CrossEntropyLoss",
    "RowStats",
    "__version__",
    "build_info",
    "check_errors",
    "cross_entropy",
    "distillation_loss",
    "entropy",
    "log_prob",
    "parallel",
    "release_memory",
    "row_stats",
    "topk_distillation_loss",
]
