from typing import Any

from torch import Tensor

def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    inplace: bool,
) -> Tensor: ...
def cross_entropy_with_options(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    inplace: bool,
    arguments: dict[str, Any],
) -> Tensor: ...
def row_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]: ...
def stats(
    outputs: int,
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    arguments: dict[str, Any],
) -> tuple[Tensor, ...]: ...
def check_overwritable(logits: Tensor) -> None: ...
def check_errors() -> None: ...
def release_memory() -> None: ...
def build_info() -> tuple[str, str, str | None, list[str], bool, str]: ...
