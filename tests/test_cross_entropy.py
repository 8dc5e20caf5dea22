"""Every option crossed with every layout and dtype, against the float64 oracle."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import cross_entropy
from tests import closeness, reference
from tests.device import DEVICE, IS_HOST

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Half types round the result once; float32 is held to a few units in the last place of sums.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}

SHAPES = [
    (7,),  # one row without a batch
    (33, 10),  # narrow rows, which are transposed, with a rest
    (5, 1),  # one class
    (3, 4, 20),  # lanes across rows, with a rest
    (2, 21, 4, 9),  # segmentation
    (2, 3, 2, 2, 2),  # too few neighbouring rows for lanes across them
    (2, 70, 300),  # more neighbouring rows than the CPU stages at a time
    (2100, 12),  # more classes than it stages, where they are apart
    (3, 40000),  # three pieces, shared by the threads
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "classes last": lambda x: x.movedim(min(1, x.dim() - 1), -1).contiguous().movedim(-1, min(1, x.dim() - 1)),
    "sliced": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
}
OPTIONS = [
    dict(zip(("reduction", "label_smoothing", "weighted", "target"), values, strict=True))
    for values in itertools.product(("mean", "sum", "none"), (0.0, 0.1), (False, True), ("index", "probabilities"))
]


def class_dim(shape):
    return min(1, len(shape) - 1)


def make_target(shape, kind, dtype):
    if kind == "probabilities":
        return torch.rand(shape).div(shape[class_dim(shape)]).to(dtype)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(shape[class_dim(shape)], rows)
    if target.numel() > 2:
        target.view(-1)[1] = -100
    return target


def assert_close(actual, expected, dtype, scale=1.0):
    assert actual.dtype == dtype and actual.shape == expected.shape
    relative = TOLERANCE[dtype] * scale
    # What cancels to nothing leaves the rounding error of the terms, which are computed in at least float32.
    cancelled = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    absolute = TOLERANCE[dtype] * float(expected.detach().abs().max()) + cancelled
    closeness.assert_close(actual.double(), expected, rtol=relative, atol=absolute, equal_nan=True)


def compare(logits, target, dtype, weighted, **options):
    """Loss and all gradients of one call against the oracle's."""
    classes = logits.shape[class_dim(logits.shape)]
    weight = torch.rand(classes).to(dtype) + 0.5 if weighted else None
    soft = target.is_floating_point()

    def run(function, convert):
        leaves = [logits] + [target] * soft + [weight] * (soft and weighted)
        leaves = [convert(leaf.detach()).requires_grad_() for leaf in leaves]
        x, q, w = leaves[0], leaves[1] if soft else target, leaves[-1] if soft else weight
        loss = function(x, q, w if weighted else None, **options)
        return loss, leaves

    loss, leaves = run(cross_entropy.cross_entropy, lambda leaf: leaf)
    expected, oracle_leaves = run(reference.cross_entropy, lambda leaf: leaf.double())
    assert_close(loss, expected, dtype)
    upstream = torch.randn(expected.shape).to(dtype)
    grads = torch.autograd.grad(loss, leaves, upstream)
    expected_grads = torch.autograd.grad(expected, oracle_leaves, upstream.double())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, dtype, scale=4)
    if soft:  # without gradients of target and weight the logits' own takes another way
        x = logits.detach().requires_grad_()
        loss = cross_entropy.cross_entropy(x, target, weight, **options)
        assert_close(torch.autograd.grad(loss, x, upstream)[0], expected_grads[0], dtype, scale=4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_and_layouts(dtype, shape, layout):
    logits = LAYOUTS[layout](torch.randn(shape).mul(3).to(dtype))
    for options in OPTIONS:
        kind, options = options["target"], {k: v for k, v in options.items() if k != "target"}
        if dtype == torch.float16 and shape[-1] > 10000 and options["reduction"] == "sum":
            continue  # the true sum overflows float16
        compare(logits, make_target(shape, kind, dtype), dtype, **options)


# Every rest of a vector of 4 to 16 lanes and of a group of 8 vectors, the edge of narrow rows at 8 vectors, and those
# of a piece of 16384 classes.
TAILS = [*range(1, 40), 63, 64, 65, *range(120, 146), 16383, 16384, 16385, 32769]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails(dtype):
    for classes, options in itertools.product(TAILS, OPTIONS[:4]):
        kind, options = options["target"], {k: v for k, v in options.items() if k != "target"}
        few = torch.randn(3, classes).to(dtype)
        rows = torch.randn(19, classes).to(dtype)  # narrow ones: lanes across 16 rows and a rest
        columns = torch.randn(classes, 19).to(dtype).t()
        for logits in (few, rows, columns):
            compare(logits, make_target(logits.shape, kind, dtype), dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(dtype):
    """The CPU sums losses and weights in blocks of 16384 rows."""
    logits, target = torch.randn(40000, 3).to(dtype), make_target((40000, 3), "index", dtype)
    for weighted in (False, True):
        compare(logits, target, dtype, weighted)
    row_weight = torch.rand(40000)
    loss = cross_entropy.cross_entropy(logits, target, row_weight=row_weight)
    assert_close(loss, reference.cross_entropy(logits, target, row_weight=row_weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_columns(inplace, dtype):
    """More of them than the CPU stages at a time, whose NaN nobody reads."""
    logits, target = torch.randn(2, 70, 300).to(dtype), torch.randint(70, (2, 300))
    ignored = slice(20, 270)
    target[:, ignored] = -100
    x = logits.double().clone().requires_grad_()
    expected = reference.cross_entropy(x, target)
    expected.backward()
    logits[:, :, ignored] = torch.nan
    logits.requires_grad_()
    loss = cross_entropy.cross_entropy(logits * 1, target, inplace=inplace)
    assert_close(loss, expected, dtype)
    loss.backward()
    assert_close(logits.grad, x.grad, dtype, scale=4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_index_dtypes(dtype):
    logits = torch.randn(4, 9)
    target = torch.tensor([0, 8, 3, 5])
    expected = reference.cross_entropy(logits, target)
    assert_close(cross_entropy.cross_entropy(logits, target.to(dtype)), expected, torch.float32)


def test_mixed_dtypes_promote_as_in_torch():
    logits, probabilities = torch.randn(4, 9), torch.rand(4, 9)
    for x, q in itertools.product(DTYPES, DTYPES):
        ours = cross_entropy.cross_entropy(logits.to(x), probabilities.to(q))
        theirs = torch.nn.functional.cross_entropy(logits.to(x), probabilities.to(q))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_gives_a_float32_loss(dtype):
    logits, target = torch.randn(4, 9).to(dtype).requires_grad_(), torch.tensor([0, 8, 3, 5])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = cross_entropy.cross_entropy(logits, target)
    assert_close(loss, reference.cross_entropy(logits, target), torch.float32)
    loss.backward()
    assert logits.grad.dtype == dtype


def test_accuracy_at_a_large_vocabulary():
    logits, target = torch.randn(64, 128256), torch.randint(128256, (64,))
    expected = reference.cross_entropy(logits, target, reduction="none")
    loss = cross_entropy.cross_entropy(logits, target, reduction="none").double()
    assert ((loss - expected).abs() / expected).max() < 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rising_logits(dtype):
    """The maximum that sums are relative to is raised all the way through the row, up to what float32 cannot hold."""
    for classes in (1000, 4000, 40000):
        logits = torch.linspace(-150, 10, classes).repeat(3, 1).add(torch.randn(3, 1)).to(dtype)
        for smoothing in (0.0, 0.1):
            compare(logits, torch.tensor([classes - 1, 0, 7]), dtype, False, label_smoothing=smoothing)


def bits(tensor):
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 70016), (700, 300), (40000, 3), (2, 21, 3000)],
    ids=["pieces", "rows", "blocks of rows", "across"],
)
def test_same_bits_for_any_number_of_threads(shape, dtype):
    logits = torch.randn(shape).to(dtype).requires_grad_()
    target = make_target(shape, "index", dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            loss = cross_entropy.cross_entropy(logits, target, label_smoothing=0.1)
            results.append((bits(loss), bits(torch.autograd.grad(loss, logits)[0])))
    finally:
        torch.set_num_threads(threads)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(19, 7), (5, 1001), (3, 5000), (2, 40000)], ids=str)
def test_a_gradient_changes_no_bit_of_the_loss(shape, dtype):
    logits, target = torch.randn(shape).to(dtype), make_target(shape, "index", dtype)
    for smoothing in (0.0, 0.1):
        losses = [
            cross_entropy.cross_entropy(x, target, label_smoothing=smoothing)
            for x in (logits, logits.clone().requires_grad_())
        ]
        assert torch.equal(*losses)


@pytest.mark.skipif(not IS_HOST, reason="of the CPU")
@pytest.mark.parametrize(("isa", "stripes"), [("portable", "1"), ("avx2", "0"), ("avx512", "1")])
def test_other_kernels(isa, stripes):
    """Those of narrower instruction sets, and of the other way to read; all other tests run on the processor's own."""
    tests = ["test_tails", "test_options_and_layouts", "test_rising_logits", "test_a_gradient"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", " or ".join(tests)]
    environment = os.environ | {"CROSS_ENTROPY_ISA": isa, "CROSS_ENTROPY_STRIPES": stripes}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
