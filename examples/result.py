"""What one training run measured; kept free of torch, so that the comparison stays light."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One model trained with one loss."""

    losses: list[float]
    """The training loss of every step."""
    accuracy: float
    """Share of the held-out targets that the trained model predicts."""
    step_ms: float
    """Median milliseconds of a training step."""
    loss_ms: float
    """Median milliseconds of the loss alone, forward and backward."""
    peak_mib: float
    """Peak memory of training, over what was resident just before it."""
