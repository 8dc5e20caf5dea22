"""Infinities, NaN, empty and ignored rows, extreme numbers: the values and gradients of torch."""

import math

import pytest
import torch
import torch.nn.functional as F

import cross_entropy
from tests import closeness, reference
from tests.device import DEVICE, IS_HOST

INF, NAN = math.inf, math.nan
REDUCTIONS = ["none", "mean", "sum"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FULL = [torch.float32, torch.float64]
# Torch rounds half types at every step, so that its own answer is some roundings away.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-13,
    torch.bfloat16: 4 * 2**-8,
    torch.float16: 4 * 2**-11,
}


def fits(values, dtype):
    return all(not math.isfinite(v) or abs(v) <= torch.finfo(dtype).max for v in values)


def run(function, logits, target, weight=None, **options):
    x = logits.detach().clone().requires_grad_()
    loss = function(x, target, weight, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


def assert_same(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    closeness.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def on_cpu(logits, target, weight=None, **options):
    """Torch's loss there: its CUDA kernel for a single row gives 0 for the mean of nothing, not NaN."""
    weight = None if weight is None else weight.cpu()
    return F.cross_entropy(logits.cpu(), target.cpu(), weight, **options).to(logits.device)


def compare(logits, target, weight=None, torchs=F.cross_entropy, **options):
    """Loss and gradient equal torch's, with and without a gradient to compute, and in place."""
    loss, grad = run(torchs, logits, target, weight, **options)
    actual_loss, actual_grad = run(cross_entropy.cross_entropy, logits, target, weight, **options)
    assert_same(actual_loss, loss)
    assert_same(actual_grad, grad)
    plain = cross_entropy.cross_entropy(logits, target, weight, **options)
    assert torch.equal(plain.nan_to_num(7.0), actual_loss.nan_to_num(7.0))

    def inplace(x, *args, **kwargs):
        return cross_entropy.cross_entropy(x * 1, *args, inplace=True, **kwargs)

    inplace_loss, inplace_grad = run(inplace, logits, target, weight, **options)
    assert_same(inplace_loss, loss)
    assert_same(inplace_grad, grad)
    return actual_loss, actual_grad


# Rows of three logits; the target is class 0.
ROWS = {
    "inf at the target": [INF, 1.0, 2.0],
    "inf elsewhere": [1.0, INF, 2.0],
    "two inf": [INF, INF, 2.0],
    "inf and -inf": [INF, -INF, 2.0],
    "-inf at the target": [-INF, 1.0, 2.0],
    "-inf elsewhere": [1.0, -INF, 2.0],
    "all others -inf": [1.0, -INF, -INF],
    "only another finite": [-INF, -INF, 1.0],
    "all inf": [INF, INF, INF],
    "all -inf": [-INF, -INF, -INF],
    "NaN at the target": [NAN, 1.0, 2.0],
    "NaN elsewhere": [1.0, 2.0, NAN],
    "NaN and inf": [NAN, INF, 2.0],
    "NaN and -inf": [-INF, -INF, NAN],
    "1e30 at the target": [1e30, 1.0, 2.0],
    "1e30 elsewhere": [1.0, 1e30, 2.0],
    "-1e30 at the target": [-1e30, 1.0, 2.0],
    "-1e30 elsewhere": [1.0, 2.0, -1e30],
    "all 1e30": [1e30, 1e30, 1e30],
    "all -1e30": [-1e30, -1e30, -1e30],
    "6e4 at the target": [6e4, 1.0, 2.0],
    "6e4 elsewhere": [1.0, 6e4, 2.0],
    "-6e4 at the target": [-6e4, 1.0, 2.0],
    "0 and -0": [0.0, -0.0, 0.0],
    "subnormal": [1e-40, 0.0, -1e-40],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ROWS)
def test_row(name, reduction, dtype):
    row = ROWS[name]
    if not fits(row, dtype):
        return
    logits = torch.tensor([row, [0.5, 1.0, -1.0]], dtype=dtype)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=dtype)
    target = torch.tensor([0, 2])
    compare(logits, target, reduction=reduction)
    compare(logits, target, weight, reduction=reduction)
    compare(logits[0], target[0], reduction=reduction)
    one_hot = F.one_hot(target, 3).to(dtype)
    compare(logits, one_hot, reduction=reduction)
    compare(logits, one_hot * 0.5 + 0.125, weight, reduction=reduction)
    # float16: torch's sum of the log-probabilities overflows where the loss is finite.
    if dtype != torch.float16:
        compare(logits, target, reduction=reduction, label_smoothing=0.1)
        compare(logits, target, weight, reduction=reduction, label_smoothing=0.1)
        compare(logits, one_hot, weight, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("place", ["first", "last", "middle"])
@pytest.mark.parametrize("value", [INF, -INF, NAN, 1e30, -1e30])
@pytest.mark.parametrize("classes", [1000, 1003, 17000])
def test_long_row(classes, value, place, reduction, dtype):
    position = {"first": 0, "last": classes - 1, "middle": classes // 2 + 1}[place]
    logits = torch.randn(3, classes, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    logits[1, position] = value
    for target in (torch.tensor([0, position, classes - 1]), torch.tensor([5, 7, 9])):
        compare(logits, target, reduction=reduction)
    smooth = {"label_smoothing": 0.1, "reduction": reduction}
    if abs(value) != 1e30:  # a sum of such terms has no digits to compare
        compare(logits, target, **smooth)
    # Segmentation layout: the lanes are rows.
    lanes = logits[:, :, None].repeat(1, 1, 2)
    if classes < 17000:
        compare(lanes, target[:, None].repeat(1, 2), reduction=reduction)


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("classes", [3, 1000, 17000])
@pytest.mark.parametrize("fill", [-INF, INF, NAN])
def test_whole_row(fill, classes, dtype):
    logits = torch.randn(2, classes).to(dtype)
    logits[0] = fill
    compare(logits, torch.tensor([1, 2]), reduction="none")
    compare(logits, torch.softmax(torch.randn(2, classes).to(dtype), 1), reduction="none")
    # Only one finite logit, in every place where a piece or a vector could begin or end.
    logits[0] = -INF
    for position in (0, classes // 2, classes - 1):
        row = logits.clone()
        row[0, position] = 3.0
        compare(row, torch.tensor([position, 2]), reduction="none")
        compare(row, torch.tensor([1, 2]), reduction="none")


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("place", ["first", "last", "middle"])
@pytest.mark.parametrize("classes", [3, 1000, 17000])
def test_minus_inf_times_zero(classes, place, reduction, dtype):
    """-inf times a coefficient of 0 is NaN; with an index of another class there is no such term."""
    position = {"first": 0, "last": classes - 1, "middle": classes // 2}[place]
    logits = torch.randn(2, classes).to(dtype)
    logits[0, position] = -INF
    target = torch.full((2, classes), 1 / classes, dtype=dtype)
    target[0, position] = 0
    loss, _ = compare(logits, target, reduction=reduction)
    assert loss.flatten()[0].isnan()
    weight = torch.ones(classes, dtype=dtype)
    weight[position] = 0
    loss, _ = compare(logits, target, weight, reduction=reduction)
    assert loss.flatten()[0].isnan()
    compare(logits, torch.tensor([position, 1]), weight, reduction=reduction)
    compare(logits, torch.tensor([1, 1]), weight, reduction=reduction)
    compare(logits, torch.tensor([1, 1]), weight, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_class(smoothing, reduction, dtype):
    options = {"reduction": reduction, "label_smoothing": smoothing}
    logits = torch.randn(5, 1).to(dtype)
    compare(logits, torch.zeros(5, dtype=torch.int64), **options)
    compare(logits, torch.rand(5, 1).to(dtype), **options)
    compare(logits[0], torch.rand(1).to(dtype), **options)
    compare(logits, torch.zeros(5, dtype=torch.int64), torch.rand(1).to(dtype), **options)


EMPTY = [(0, 3), (0, 0), (2, 3, 0), (0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0, 1)]
NO_CLASSES = [(2, 0), (0,), (2, 0, 3, 4)]  # torch refuses (2, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", EMPTY + NO_CLASSES, ids=str)
def test_empty(shape, reduction, dtype):
    logits = torch.zeros(shape, dtype=dtype)
    ignored = torch.full(shape[:1] + shape[2:] if len(shape) > 1 else (), -100)
    for target in (ignored, torch.zeros(shape, dtype=dtype)):
        loss, grad = compare(logits, target, torchs=on_cpu, reduction=reduction)
        assert grad.shape == shape
        if reduction == "mean":
            assert loss.isnan()
        else:
            assert loss.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 3, 5), (2, 17000)], ids=str)
def test_all_ignored(shape, weighted, smoothing, dtype):
    logits = torch.randn(shape).to(dtype)
    target = torch.full(shape[:1] + shape[2:] if len(shape) > 1 else (), -100)
    weight = torch.rand(shape[min(1, len(shape) - 1)]).to(dtype) if weighted else None
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "label_smoothing": smoothing}
        expected = on_cpu(logits, target, weight, **options)
        loss, grad = run(cross_entropy.cross_entropy, logits, target, weight, **options)
        assert_same(loss, expected)
        if reduction == "mean":
            assert loss.isnan()
        else:
            assert loss.eq(0).all()
        assert grad.eq(0).all()


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [[0, 0, 0], [0, 1, 2], [-1, -1, -1], [-1, 2, 0.5]], ids=str)
def test_weights(weight, smoothing, reduction, dtype):
    logits = torch.randn(6, 3).to(dtype)
    weight = torch.tensor(weight, dtype=dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    compare(logits, torch.tensor([0, 1, 2, 1, -100, 1]), weight, **options)
    compare(logits, torch.rand(6, 3).to(dtype), weight, **options)


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0, 0.0, -0.0, -0.5, -INF, NAN, 1, 1.0, 1e-300])
@pytest.mark.parametrize("classes", [4, 1000, 17000])
def test_label_smoothing(classes, smoothing, reduction, dtype):
    generator = torch.Generator(DEVICE).manual_seed(2)
    logits = torch.randn(5, classes, generator=generator).to(dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    weight = torch.rand(classes, generator=generator).to(dtype) + 0.5
    target = torch.tensor([0, 1, -100, 3, 3])
    compare(logits, target, **options)
    compare(logits, target, weight, **options)
    compare(logits, torch.rand(5, classes, generator=generator).to(dtype) / classes, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [0, 2, 255, 10**12, -1, -(2**63), 2**63 - 1])
def test_ignore_index(ignore_index, reduction):
    logits = torch.randn(4, 300)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    compare(logits, torch.tensor([1, ignore_index, 2, ignore_index]), **options)
    compare(logits, torch.tensor([1, ignore_index, 2, 3]), label_smoothing=0.1, **options)
    compare(logits, torch.tensor([1, 4, 2, 3]), **options)
    if 0 <= ignore_index <= 255:
        compare(logits, torch.tensor([1, ignore_index, 2, 3]).byte(), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(4, 10), (4, 10, 9), (4, 17000)], ids=str)
def test_ignored_row_does_not_leak(shape, value, smoothing, reduction, dtype):
    logits = torch.randn(shape).to(dtype)
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    ignored = torch.zeros(target.shape, dtype=torch.bool)
    ignored.view(-1)[1::3] = True
    target[ignored] = -100
    dirty = torch.where(ignored.unsqueeze(1), torch.tensor(value, dtype=dtype), logits)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    for inplace in (False, True):

        def ours(x, *args, inplace=inplace, **kwargs):
            return cross_entropy.cross_entropy(x * 1, *args, inplace=inplace, **kwargs)

        clean_loss, clean_grad = run(ours, logits, target, **options)
        loss, grad = run(ours, dirty, target, **options)
        assert loss.isfinite().all() and torch.equal(loss, clean_loss)
        # Torch's gradient of such a row is NaN; here what is ignored is not read.
        assert grad.masked_select(ignored.unsqueeze(1)).eq(0).all()
        assert torch.equal(grad, clean_grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [10, 1000, 17000])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offset(offset, classes, reduction):
    logits = torch.randn(8, classes, generator=torch.Generator(DEVICE).manual_seed(3)) + offset
    target = torch.randint(classes, (8,), generator=torch.Generator(DEVICE).manual_seed(4))
    for label_smoothing in (0.0, 0.1):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        oracle = run(reference.cross_entropy, logits.double(), target, **options)
        expected = run(F.cross_entropy, logits, target, **options)
        actual = run(cross_entropy.cross_entropy, logits, target, **options)
        for mine, torchs, truth in zip(actual, expected, oracle, strict=True):
            rounding = torch.finfo(torch.float32).eps * truth.abs().max()
            if not IS_HOST:  # the last steps of a row are in float32 there, not in float64
                rounding *= 2
            error = (mine - truth).abs().max()
            assert error <= torch.maximum((torchs - truth).abs().max(), rounding)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float16_smoothing_does_not_overflow(reduction):
    logits, target = torch.randn(2, 30000).half(), torch.tensor([0, 1])
    options = {"reduction": reduction, "label_smoothing": 0.1}
    assert F.cross_entropy(logits, target, **options).isinf().all()
    loss = cross_entropy.cross_entropy(logits, target, **options)
    oracle = reference.cross_entropy(logits, target, **options)
    assert loss.isfinite().all()
    torch.testing.assert_close(loss.double(), oracle, rtol=2**-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(7, 3), (5, 1000), (3, 17000), (2, 5, 50)], ids=str)
def test_half_is_rounded_once(shape, smoothing, reduction, dtype):
    logits = (3 * torch.randn(shape)).to(dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    index = torch.randint(shape[1], shape[:1] + shape[2:])
    for target in (index, torch.softmax(torch.randn(shape), 1).to(dtype)):
        loss = cross_entropy.cross_entropy(logits, target, **options)
        oracle = reference.cross_entropy(logits, target, **options)
        # Half a unit in the last place, and a little for the float32 before it.
        relative = torch.finfo(dtype).eps / 2 * 1.001
        torch.testing.assert_close(loss.double(), oracle, rtol=relative, atol=1e-6)


EXAMPLES = [
    ([100.0, 1, 1, 1], [1.0, 0, 0, 0], 0.0),
    ([1.0, 0, 0, 0], [1.0, 0, 0, 0], 0.7437),
    ([[1.0, 1, 100, 1]], [2], 0.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("logits", "target", "expected"), EXAMPLES)
def test_examples(logits, target, expected, reduction, dtype):
    logits, target = torch.tensor(logits, dtype=dtype), torch.tensor(target)
    target = target.to(dtype) if target.is_floating_point() else target
    loss = cross_entropy.cross_entropy(logits, target, reduction=reduction)
    if expected:
        assert loss.item() == pytest.approx(expected, abs=max(1e-4, torch.finfo(dtype).eps))
    else:
        assert loss.eq(0).all() and loss.signbit().all()


def test_subnormal_numbers_are_flushed_within_the_kernels_only():
    logits = torch.tensor([[0.0, -95.0]] * 40000, requires_grad=True)  # exp(−95) is subnormal
    target = torch.zeros(len(logits), dtype=torch.long)
    loss = cross_entropy.cross_entropy(logits, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and grad.eq(0).all()
    # By the thread that called and by the others.
    assert torch.full((100000,), 1e-38).mul(0.1).gt(0).all()
