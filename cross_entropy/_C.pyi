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
    full_precision: bool,
    row_weight: Tensor | None,
    logit_scale_tensor: Tensor | None,
    divisor_tensor: Tensor | None,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    divisor: float | None,
    valid_classes: int | None,
    zero_if_empty: bool,
    divergence: int,
    reverse: bool,
    teacher_scale: float,
    picked: Tensor | None,
    spreads: bool,
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
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    logit_scale_tensor: Tensor | None,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    valid_classes: int | None,
) -> tuple[Tensor, ...]: ...
def check_errors() -> None: ...
def release_memory() -> None: ...
def build_info() -> tuple[str, str, str | None, list[str], bool, str]: ...
