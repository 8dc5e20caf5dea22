"""Targets out of bounds on a device, which nobody waits for: NaN in the row, and an error later."""

import pytest
import torch

import cross_entropy
from tests.device import DEFERS_ERRORS

pytestmark = pytest.mark.skipif(not DEFERS_ERRORS, reason="the CPU raises at once")


def make(rows=6, classes=9):
    logits = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(classes, (rows,))
    target[2], target[4] = 77, -5
    return logits, target


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    cross_entropy.check_errors()


def expect_error(message, call=cross_entropy.check_errors):
    with pytest.raises(IndexError, match=message):
        call()


FIRST = r"Target 77 is out of bounds\. It belongs to row 2 of a call of cross_entropy on cuda:0"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_rows_are_nan_and_no_others(reduction, smoothing):
    logits, target = make()
    bad = (target < 0) | (target >= 9)
    loss = cross_entropy.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
    expect_error(FIRST)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    good = cross_entropy.cross_entropy(logits, target.where(~bad, -100), reduction=reduction, label_smoothing=smoothing)
    if reduction == "none":
        assert loss[bad].isnan().all()
        assert torch.equal(loss[~bad], good[~bad])
    else:
        assert loss.isnan()
    (good_grad,) = torch.autograd.grad(good.sum(), logits)
    assert grad[bad].isnan().all()
    torch.testing.assert_close(grad[~bad], good_grad[~bad])


def test_it_is_raised_once_and_by_the_next_call():
    logits, target = make()
    cross_entropy.cross_entropy(logits, target)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    good = torch.zeros_like(target)
    expect_error(FIRST, lambda: cross_entropy.cross_entropy(logits, good))
    assert cross_entropy.cross_entropy(logits, good).isfinite()
    cross_entropy.check_errors()


def test_the_first_row_is_named_whatever_comes_first():
    logits = torch.randn(5000, 3)
    target = torch.randint(3, (5000,))
    target[[4321, 17, 999]] = torch.tensor([5, 6, 7])
    cross_entropy.cross_entropy(logits, target)
    expect_error("Target 6 is out of bounds. It belongs to row 17 ")


def test_rows_are_counted_through_the_target():
    logits = torch.randn(2, 7, 3, 4).to(memory_format=torch.channels_last)
    target = torch.zeros(2, 3, 4, dtype=torch.long)
    target[1, 2, 3] = 8
    cross_entropy.cross_entropy(logits, target)
    expect_error("Target 8 is out of bounds. It belongs to row 23 ")


def test_row_stats():
    logits, target = make()
    stats = cross_entropy.row_stats(logits, target)
    expect_error(FIRST)
    torch.testing.assert_close(stats.logsumexp, logits.logsumexp(1))
    assert stats.loss.isnan().tolist() == [False, False, True, False, True, False]


def test_backward_reports_nothing():
    logits, target = make()
    loss = cross_entropy.cross_entropy(logits, target, reduction="none")
    expect_error(FIRST)
    torch.autograd.grad(loss.sum(), logits)
    cross_entropy.check_errors()
