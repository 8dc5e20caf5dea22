"""The gradient that is computed in the forward pass, inplace=True, row_stats and what is dispatched."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from cross_entropy import cross_entropy, row_stats
from tests import closeness
from tests.device import DEVICE
from tests.observe import LogOperators, allocations

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}
REDUCTIONS = ["mean", "sum", "none"]
TWICE = "backward through the graph a second time"
VERSION = "modified by an inplace operation"


def make(dtype=torch.float32, shape=(6, 9)):
    torch.manual_seed(0)
    logits = torch.randn(shape).mul(2).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    return logits, target


def assert_close(actual, expected, dtype):
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    closeness.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=atol)


def torch_grad(logits, target, upstream=1.0, **options):
    x = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(x, target, **options)
    upstream = torch.as_tensor(upstream, dtype=torch.float64).expand(loss.shape)
    return torch.autograd.grad(loss, x, upstream)[0]


# The gradient in the forward pass.


@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5, 1024.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient(dtype, reduction, upstream):
    logits, target = make(dtype)
    loss = cross_entropy(logits, target, reduction=reduction)
    grad = torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))[0]
    assert grad.dtype == dtype
    assert_close(grad, torch_grad(logits, target, upstream, reduction=reduction), dtype)


@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_that_is_not_finite(reduction, upstream):
    logits, target = make()
    loss = cross_entropy(logits, target, reduction=reduction)
    grad = torch.autograd.grad(loss, logits, torch.tensor(upstream))[0]
    assert not grad[target != -100].isfinite().any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_backward(dtype, reduction):
    logits, target = make(dtype)
    loss = cross_entropy(logits, target, reduction=reduction)
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0]
    if dtype == torch.bfloat16:  # scaling a gradient of bfloat16 rounds a second time
        assert_close(first, second.double(), dtype)
    else:
        torch.testing.assert_close(first, second)
    third = torch.autograd.grad(loss, logits, -upstream)[0]
    assert torch.equal(third, -second)
    # What has been handed out is the caller's.
    assert torch.equal(first, kept)
    assert len({first.data_ptr(), second.data_ptr(), third.data_ptr()}) == 3
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, logits, upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward_without_retain_graph(reduction):
    logits, target = make()
    loss = cross_entropy(logits, target, reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=TWICE):
        loss.backward()


def test_gradient_accumulates():
    logits, target = make()
    for _ in range(3):
        cross_entropy(logits, target).backward()
    torch.testing.assert_close(logits.grad.double(), 3 * torch_grad(logits, target))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_changed_after_forward(reduction):
    logits, target = make()
    expected = torch_grad(logits, target, reduction=reduction)
    loss = cross_entropy(logits, target, reduction=reduction)
    with torch.no_grad():
        logits.mul_(5)
    loss.backward(retain_graph=True)
    assert_close(logits.grad, expected, torch.float32)
    with pytest.raises(RuntimeError, match=VERSION):
        loss.backward()


@pytest.mark.parametrize(
    "reduction, dtype",
    [("none", torch.float32), ("mean", torch.float16)],
    ids=["rows", "float16"],
)
def test_logits_changed_before_their_only_read_in_backward(reduction, dtype):
    logits, target = make(dtype)
    loss = cross_entropy(logits, target, reduction=reduction)
    with torch.no_grad():
        logits.mul_(5)
    with pytest.raises(RuntimeError, match=VERSION):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_create_graph(reduction, smoothing):
    logits, target = make(torch.float64)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        loss = function(logits, target, reduction=reduction, label_smoothing=smoothing)
        upstream = torch.full_like(loss, 1.5).requires_grad_()
        grad = torch.autograd.grad(loss, logits, upstream, create_graph=True)[0]
        second = torch.autograd.grad(grad.square().sum(), [logits, upstream])
        results.append([grad, *second])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_plain_backward_after_create_graph():
    logits, target = make()
    loss = cross_entropy(logits, target)
    first = torch.autograd.grad(loss, logits, create_graph=True)[0]
    kept = first.detach().clone()
    second = torch.autograd.grad(loss, logits, torch.tensor(2.0))[0]
    torch.testing.assert_close(second, 2 * kept)
    assert torch.equal(first, kept)


def assert_scaled(grad, expected, target, scale):
    """Half an ulp of float16; at the target p - 1 has the rounding error of a float32 p."""
    at_target = F.one_hot(target, grad.shape[1]).bool()
    for where, atol in ((~at_target, 2**-24), (at_target, 2**-24 + 2**-21 * scale)):
        torch.testing.assert_close(grad[where].double(), expected[where], rtol=2**-10, atol=atol)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_float16_under_a_loss_scale(reduction, inplace):
    """Gradients of 1e-9, which float16 cannot hold, under a scale that makes them 1e-4."""
    rows, classes = 4096, 32
    target = torch.randint(classes, (rows,))
    logits = torch.randn(rows, classes) + 12 * F.one_hot(target, classes)
    logits = logits.half().requires_grad_()
    scale = 65536.0 if reduction == "mean" else 65536.0 / rows
    unscaled = torch_grad(logits, target, scale / 65536, reduction=reduction)
    assert unscaled.abs().median() < 2e-9
    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # a float32 loss: 65536 is no float16
        loss = cross_entropy(logits * 1 if inplace else logits, target, reduction=reduction)
    assert loss.dtype == torch.float32
    grad = torch.autograd.grad(loss, logits, torch.full_like(loss, scale))[0]
    assert_scaled(grad, unscaled * 65536, target, scale=65536 / rows)


def test_float16_loss_under_its_largest_scale():
    target = torch.randint(32, (4096,))
    logits = (torch.randn(4096, 32) + 12 * F.one_hot(target, 32)).half().requires_grad_()
    loss = cross_entropy(logits, target)
    grad = torch.autograd.grad(loss, logits, torch.tensor(32768.0).half())[0]
    assert_scaled(grad, torch_grad(logits, target, 32768.0), target, scale=32768 / 4096)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_grad(reduction, inplace):
    logits, target = make()
    before = logits.detach().clone()
    with torch.no_grad():
        loss = cross_entropy(logits, target, reduction=reduction, inplace=inplace)
        stats = row_stats(logits, target)
    assert not loss.requires_grad and loss.grad_fn is None
    assert not any(result.requires_grad for result in stats)
    assert torch.equal(logits, before) and logits._version == 0
    assert torch.equal(loss, cross_entropy(logits, target, reduction=reduction).detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inference_mode(reduction):
    logits, target = make()
    with torch.inference_mode():
        loss = cross_entropy(logits, target, reduction=reduction)
    assert loss.is_inference() and not loss.requires_grad
    assert torch.equal(loss, cross_entropy(logits, target, reduction=reduction).detach())


def test_inference_tensors():
    with torch.inference_mode():
        logits, target = torch.randn(6, 9), torch.randint(9, (6,))
    torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target))


# inplace=True. The leaf stands for what comes before a model's last layer.


def inplace_loss(leaf, target, **options):
    logits = leaf * 1
    return logits, cross_entropy(logits, target, inplace=True, **options)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_equals_out_of_place(dtype, reduction, soft):
    leaf, target = make(dtype, (4, 33, 5))
    if soft:
        target = torch.rand(leaf.shape).to(dtype)
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": torch.rand(33).to(dtype)}
    expected_loss = cross_entropy(leaf, target, **options)
    upstream = torch.randn(expected_loss.shape).to(dtype)
    expected = torch.autograd.grad(expected_loss, leaf, upstream)[0]
    loss = inplace_loss(leaf, target, **options)[1]
    assert torch.equal(loss, expected_loss) and loss.dtype == expected_loss.dtype
    assert torch.equal(torch.autograd.grad(loss, leaf, upstream)[0], expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_gradient_is_in_the_logits_memory(dtype, reduction):
    leaf, target = make(dtype, (64, 3000))
    logits = leaf * 1
    received = []
    logits.register_hook(received.append)  # on the producer's side of the loss
    total = cross_entropy(logits, target, reduction=reduction, inplace=True).sum()
    total.backward()
    assert len(received) == 1
    assert received[0].data_ptr() == logits.data_ptr()
    assert torch.equal(received[0], logits)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_allocates_nothing_of_the_logits_size(inplace, dtype, reduction):
    leaf, target = make(dtype, (64, 3000))
    logits = leaf.view(64, 3000)  # a view needs no memory for its gradient either

    def step():
        loss = cross_entropy(logits, target, reduction=reduction, inplace=inplace)
        torch.autograd.grad(loss.sum(), edge)

    edge = torch.autograd.graph.get_gradient_edge(logits)
    if inplace:  # not a view of a leaf, which must not be written to
        logits = leaf * 1
        edge = torch.autograd.graph.get_gradient_edge(logits)
    assert allocations(step, logits.nbytes) == (0 if inplace else 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inplace_refuses_leaves(dtype, reduction):
    leaf, target = make(dtype)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        cross_entropy(leaf, target, reduction=reduction, inplace=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        cross_entropy(leaf.view(leaf.shape), target, reduction=reduction, inplace=True)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inplace_refuses_expanded_logits(reduction):
    leaf = torch.randn(1, 9, requires_grad=True)
    logits, target = (leaf * 1).expand(6, 9), torch.zeros(6, dtype=torch.int64)
    before = logits.detach().clone()
    with pytest.raises(RuntimeError):
        cross_entropy(logits, target, reduction=reduction, inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("which", ["target", "weight"])
def test_inplace_refuses_other_gradients(which):
    logits = torch.randn(6, 9, requires_grad=True) * 1
    target = torch.rand(6, 9, requires_grad=which == "target")
    weight = torch.rand(9, requires_grad=which == "weight")
    with pytest.raises(RuntimeError, match="inplace=True"):
        cross_entropy(logits, target, weight, inplace=True)


@pytest.mark.parametrize("later", [torch.Tensor.sum, lambda z: z.square().sum()])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inplace_logits_used_later(dtype, reduction, later):
    leaf, target = make(dtype)
    logits, loss = inplace_loss(leaf, target, reduction=reduction)
    with pytest.raises(RuntimeError, match="overwritten with their gradient"):
        (loss + later(logits)).backward()
    logits, loss = inplace_loss(leaf, target, reduction=reduction)
    with pytest.raises(RuntimeError, match="overwritten with their gradient"):
        later(logits).backward()


@pytest.mark.parametrize(
    "reduction, dtype",
    [("none", torch.float32), ("mean", torch.float16)],
    ids=["rows", "float16"],
)
def test_inplace_logits_used_later_but_before_they_are_overwritten(reduction, dtype):
    leaf, target = make(dtype)
    logits, loss = inplace_loss(leaf, target, reduction=reduction)
    square = logits.square().sum()
    (loss.sum() + square).backward(retain_graph=True)
    upstream = 1.0
    expected = torch_grad(leaf, target, upstream, reduction=reduction)
    assert_close(leaf.grad, expected + 2 * leaf.detach().double(), dtype)
    with pytest.raises(RuntimeError, match=VERSION):
        square.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_logits_saved_by_another_operator(dtype, reduction):
    leaf, target = make(dtype)
    logits = leaf * 1
    square = logits.square().sum()
    loss = cross_entropy(logits, target, reduction=reduction, inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=VERSION):
        square.backward()
    logits = leaf.exp()  # saves its result
    with pytest.raises(RuntimeError, match=VERSION):
        cross_entropy(logits, target, reduction=reduction, inplace=True).sum().backward()


# Where the gradient is written by the backward pass.
WRITTEN_IN_BACKWARD = [
    *itertools.product(["none"], DTYPES),
    *itertools.product(["mean", "sum"], [torch.float16]),
]


@pytest.mark.parametrize("reduction, dtype", WRITTEN_IN_BACKWARD)
def test_inplace_second_backward(reduction, dtype):
    leaf, target = make(dtype)
    for retain_graph, message in ((False, TWICE), (True, VERSION)):
        loss = inplace_loss(leaf, target, reduction=reduction)[1].sum()
        loss.backward(retain_graph=retain_graph)
        with pytest.raises(RuntimeError, match=message):
            loss.backward()


@pytest.mark.parametrize("reduction, dtype", WRITTEN_IN_BACKWARD)
def test_inplace_double_backward(reduction, dtype):
    leaf, target = make(dtype)
    loss = inplace_loss(leaf, target, reduction=reduction)[1].sum()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_without_a_gradient_to_compute(dtype, reduction):
    logits, target = make(dtype)
    logits = logits.detach()
    before = logits.clone()
    loss = cross_entropy(logits, target, reduction=reduction, inplace=True)
    assert torch.equal(logits, before) and logits._version == 0
    assert torch.equal(loss, cross_entropy(logits, target, reduction=reduction))


# row_stats.

STATS_SHAPES = [(7,), (6, 9), (2, 5, 3), (2, 4, 2, 3)]


def stats_inputs(shape, kind, dtype):
    """Logits, target, weight; those that may require a gradient do."""
    torch.manual_seed(0)
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = torch.randn(shape).mul(3).to(dtype).requires_grad_()
    weight = torch.rand(classes).to(dtype) + 0.5
    if kind == "probabilities":
        return logits, torch.rand(shape).to(dtype).requires_grad_(), weight.requires_grad_()
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if kind == "ignored" and target.dim():
        target.view(-1)[::2] = -100
    return logits, target, None if kind == "unweighted" else weight


KINDS = ["unweighted", "ignored", "weighted", "probabilities"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", STATS_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_stats(dtype, shape, kind, smoothing):
    logits, target, weight = stats_inputs(shape, kind, dtype)
    stats = row_stats(logits, target, weight, label_smoothing=smoothing)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    dim = min(1, len(shape) - 1)
    x = logits.detach().double()
    q = target.detach().double() if target.is_floating_point() else target
    w = None if weight is None else weight.detach().double()
    expected = {
        "maximum": torch.amax(x, dim),
        "logsumexp": torch.logsumexp(x, dim),
        "loss": F.cross_entropy(x, q, w, reduction="none", label_smoothing=smoothing),
    }
    for name, value in expected.items():
        ours = getattr(stats, name)
        assert ours.dtype == result and ours.shape == value.shape
        assert_close(ours.detach(), value, result)
    assert torch.equal(stats.maximum.double(), expected["maximum"])
    assert [value.requires_grad for value in stats] == [False, True, True]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", STATS_SHAPES[:-1], ids=str)
def test_row_stats_gradients(shape, kind, smoothing):
    values = stats_inputs(shape, kind, torch.float64)
    inputs = [value for value in values if value is not None and value.requires_grad]

    def function(x, q=values[1], w=values[2]):
        return row_stats(x, q, w, label_smoothing=smoothing)[1:]

    assert gradcheck(function, inputs, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("used", ["logsumexp", "loss", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_stats_gradients_of_each_result(dtype, kind, used):
    logits, target, weight = stats_inputs((6, 9), kind, dtype)
    stats = row_stats(logits, target, weight)
    x = logits.detach().double().requires_grad_()
    q, w = (None if t is None else t.detach() for t in (target, weight))
    q = q.double() if q.is_floating_point() else q
    w = None if w is None else w.double()
    loss = F.cross_entropy(x, q, w, reduction="none")
    ours, theirs = {
        "logsumexp": (stats.logsumexp, x.logsumexp(1)),
        "loss": (stats.loss, loss),
        "both": (stats.loss + stats.logsumexp.square(), loss + x.logsumexp(1).square()),
    }[used]
    grad = torch.autograd.grad(ours.sum(), logits)[0]
    assert grad.dtype == dtype
    assert_close(grad, torch.autograd.grad(theirs.sum(), x)[0], dtype)


# What is dispatched: the forward and the first backward pass are this package's own.

FORBIDDEN = ("softmax", "nll_loss", "logsumexp", "aten::cross_entropy")
OPERATOR_NAMES = ("aten::", "cross_entropy::")


def assert_own(names):
    assert any(name.startswith("cross_entropy::") for name in names)
    assert [name for name in names if any(bad in name for bad in FORBIDDEN)] == []


LAYOUTS = {
    "contiguous": lambda z: z * 1,
    "reversed": lambda z: (z * 1).permute(*reversed(range(z.dim()))).contiguous().permute(*reversed(range(z.dim()))),
    "sliced": lambda z: torch.stack([z, z], -1)[..., 0],
    "expanded": lambda z: z[:1].expand(z.shape),
}
HOW = {
    "backward": {},
    "create_graph": {"create_graph": True},
    "inplace": {"inplace": True},
    "row_stats": {},
    "row_stats, create_graph": {"create_graph": True},
}


NOT_DENSE = ("sliced", "expanded")  # inplace=True refuses them


@pytest.mark.parametrize(
    "layout, how",
    [(layout, how) for layout, how in itertools.product(LAYOUTS, HOW) if how != "inplace" or layout not in NOT_DENSE],
)
@pytest.mark.parametrize("shape", [(6, 9), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_operator_of_torch_computes_the_loss(dtype, shape, layout, how):
    options = itertools.product(REDUCTIONS, (0.0, 0.1), KINDS)
    if how.startswith("row_stats"):
        options = itertools.product(["none"], (0.0, 0.1), KINDS)
    for reduction, smoothing, kind in options:
        leaf, target, weight = stats_inputs(shape, kind, dtype)
        inputs = [leaf]
        if how == "inplace":
            target, weight = target.detach(), None if weight is None else weight.detach()
        elif kind == "probabilities":
            inputs = [leaf, target, weight]
        logits = LAYOUTS[layout](leaf)
        create_graph = HOW[how].get("create_graph", False)
        # The mode sees calls from outside an operator, the profiler those from inside as well.
        with LogOperators() as log, torch.profiler.profile() as profile:
            if how.startswith("row_stats"):
                stats = row_stats(logits, target, weight, label_smoothing=smoothing)
                losses = [stats.logsumexp, stats.loss]
            else:
                inplace = HOW[how].get("inplace", False)
                losses = [
                    cross_entropy(
                        logits,
                        target,
                        weight,
                        reduction=reduction,
                        label_smoothing=smoothing,
                        inplace=inplace,
                    )
                ]
            upstream = [torch.ones_like(loss) for loss in losses]
            torch.autograd.grad(losses, inputs, upstream, create_graph=create_graph)
        assert_own(log.names)
        names = [event.name for event in profile.events()]
        assert_own([name for name in names if name.startswith(OPERATOR_NAMES)])
