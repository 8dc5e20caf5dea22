"""Comparisons with the oracle."""

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float, equal_nan: bool = False) -> None:
    """As torch.testing.assert_close, which takes ten times as long to find nothing wrong."""
    if actual.shape == expected.shape and actual.dtype == expected.dtype and actual.numel() > 0:
        actual, expected = actual.detach(), expected.detach()
        excess = (actual - expected).abs() - (atol + rtol * expected.abs())
        if excess.max() <= 0:  # which NaN is not, and where there is an infinity there is NaN
            return
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=equal_nan)
