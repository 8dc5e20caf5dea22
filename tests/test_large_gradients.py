"""Gradients above 8 MiB, whose memory is kept for the next one and written past the caches."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cross_entropy import cross_entropy, release_memory
from tests import reference
from tests.device import IS_HOST

ROWS = 300
# Odd rows begin at every alignment; 2 bytes · 300 · 14001 are just above 8 MiB.
CLASSES = [14001, 16384]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def grad_of(logits, target, upstream=1.0, **options):
    loss = cross_entropy(logits, target, **options)
    return torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))[0]


@pytest.fixture(autouse=True)
def nothing_kept():
    """Begins without a block in reserve: the next one is fresh, the one after it is used again."""
    gc.collect()
    release_memory()


@pytest.mark.skipif(not IS_HOST, reason="of the CPU")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_and_used_memory(dtype, classes):
    logits = torch.randn(ROWS, classes).to(dtype).requires_grad_()
    target = torch.randint(classes, (ROWS,))
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}):
        x = logits.detach().double().requires_grad_()
        expected = torch.autograd.grad(reference.cross_entropy(x, target, **options).sum(), x)[0]
        first = grad_of(logits, target, **options).clone()
        again = grad_of(logits, target, **options)
        assert torch.equal(first, again)
        atol = TOLERANCE[dtype] * float(expected.abs().max())
        torch.testing.assert_close(again.double(), expected, rtol=4 * TOLERANCE[dtype], atol=atol)


@pytest.mark.skipif(not IS_HOST, reason="of the CPU")
def test_used_memory_is_used_again():
    logits, target = torch.randn(ROWS, 14001, requires_grad=True), torch.zeros(ROWS, dtype=torch.int64)
    first = grad_of(logits, target).data_ptr()
    assert grad_of(logits, target).data_ptr() == first


def resident_kib():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not IS_HOST, reason="of the CPU")
def test_released_memory_is_no_longer_resident():
    logits, target = torch.randn(8 * ROWS, 14001, requires_grad=True), torch.zeros(8 * ROWS, dtype=torch.int64)
    grad_of(logits, target)
    before = resident_kib()
    release_memory()
    released = before - resident_kib()
    assert released > 0.8 * logits.nbytes / 1024
    release_memory()  # nothing is left
    assert torch.equal(grad_of(logits, target), grad_of(logits, target))


def test_gradients_that_live_at_the_same_time_share_nothing():
    logits = torch.randn(ROWS, 14001, requires_grad=True)
    targets = [torch.full((ROWS,), i) for i in range(3)]
    grad_of(logits, targets[0])  # leaves a block in reserve
    grads = [grad_of(logits, target) for target in targets]
    assert len({grad.data_ptr() for grad in grads}) == 3
    for target, grad in zip(targets, grads, strict=True):
        assert torch.equal(grad, grad_of(logits, target))


def test_a_gradient_can_be_resized():
    logits = torch.randn(ROWS, 14001, requires_grad=True)
    grad = grad_of(logits, torch.zeros(ROWS, dtype=torch.int64))
    kept = grad.clone()
    grad.resize_(2 * ROWS, 14001)
    assert torch.equal(grad[:ROWS], kept)


def test_channels_last_gradient_keeps_its_strides():
    logits = torch.randn(2, 21, 400, 400).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(21, (2, 400, 400))
    grad = grad_of(logits, target)
    assert grad.stride() == logits.stride()
    torch.testing.assert_close(grad, grad_of(logits.detach().contiguous().requires_grad_(), target))


def test_gradient_outlives_the_interpreter():
    code = (
        "import torch, cross_entropy; x = torch.randn(300, 14001, requires_grad=True);"
        "cross_entropy.cross_entropy(x, torch.zeros(300, dtype=torch.int64)).backward();"
        "import builtins; builtins.kept = x"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
