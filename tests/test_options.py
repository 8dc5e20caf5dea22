"""The options beyond torch's, each alone and all together, against the float64 oracle."""

import itertools
import math
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cross_entropy
from tests import closeness, reference
from tests.device import DEFERS_ERRORS
from tests.test_cross_entropy import DTYPES, LAYOUTS, SHAPES, TOLERANCE, class_dim, make_target

NAMES = ["valid_classes", "logit_scale", "softcap", "z_loss", "row_weight", "divisor", "empty", "loss_dtype"]
ALONE_AND_TOGETHER = {name: [name] for name in NAMES} | {"all": NAMES}
KINDS = ["int64", "int32", "probabilities"]
REDUCTIONS = ["mean", "sum", "none"]
NAN, INF = math.nan, math.inf


def accumulator(dtype):
    """What the loss of such logits is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(
    shape,
    names,
    dtype=torch.float32,
    kind="int64",
    weighted=False,
    smoothing=0.0,
    reduction="mean",
    *,
    layout="contiguous",
    last=False,
    seed=0,
):
    """The arguments of a call with the options `names`. What must not be read as a logit, probability or weight is not
    finite."""
    choose = random.Random(seed).choice
    dim = class_dim(shape)
    classes = max(1, shape[dim] - choose([1, 3, 0])) if "valid_classes" in names else shape[dim]
    logits = torch.randn(shape).mul(3).to(dtype)
    target = make_target(shape, kind, dtype)
    if kind != "probabilities":
        target = target.clamp(max=classes - 1).to(getattr(torch, kind))
    for tensor in (logits, target)[: 1 + (kind == "probabilities")]:
        tensor.narrow(dim, classes, shape[dim] - classes).fill_(NAN)
        if last:
            tensor.data = tensor.movedim(dim, -1)
    rows = shape[:dim] + shape[dim + 1 :]
    if last and kind != "probabilities" and choose([False, True]):
        target = target.flatten()
        rows = target.shape
    arguments = {"input": LAYOUTS[layout](logits), "target": target, "reduction": reduction}
    arguments |= {"label_smoothing": smoothing} | ({"class_dim": -1} if last else {})
    if weighted:
        arguments["weight"] = torch.rand(choose([classes, shape[dim]])).to(dtype) + 0.5
    row_weight = torch.rand(rows).add(0.5).to(choose(DTYPES))
    if kind != "probabilities":
        row_weight.masked_fill_(target.reshape(rows) == -100, choose([NAN, INF]))
    scale = torch.tensor(choose([0.75, -1.25]), dtype=choose(DTYPES))  # exact in each of them
    values = {
        "valid_classes": classes,
        "logit_scale": choose([scale, scale.cpu(), scale.item()]),
        "softcap": choose([1.5, 5.0, 30]),
        "z_loss": choose([0.01, 0.25]),
        "row_weight": LAYOUTS[choose(list(LAYOUTS))](row_weight) if rows else row_weight,
        "divisor": choose([3, 2.5, torch.tensor(5), torch.tensor(2.5, dtype=choose(DTYPES))]),
        "empty": "zero",
        "loss_dtype": accumulator(dtype),
    }
    return arguments | {name: values[name] for name in names}


def oracle(input, loss_dtype=None, **arguments):
    return reference.cross_entropy(input, **arguments)


def inplace(input, **arguments):
    return cross_entropy.cross_entropy(input * 1, inplace=True, **arguments)


def differentiable(arguments):
    soft = arguments["target"].is_floating_point()
    names = ["input", *["target", "weight"] * soft, "row_weight", "logit_scale"]
    return [name for name in names if torch.is_tensor(arguments.get(name))]


def call(function, arguments, names, convert=torch.Tensor.detach):
    """The loss, and the leaves that take the places of the arguments `names`."""
    leaves = {name: convert(arguments[name].detach()).requires_grad_() for name in names}
    return function(**arguments | leaves), leaves.values()


def assert_close(actual, expected, accurate, scale=1.0, terms=0.0):
    """As in test_cross_entropy.py; `terms`, summed in `accurate`, may cancel."""
    assert actual.shape == expected.shape
    tolerance = max(TOLERANCE[actual.dtype], TOLERANCE[accurate])
    absolute = tolerance * float(expected.abs().max()) + torch.finfo(accurate).eps * scale * (1 + terms)
    closeness.assert_close(actual.double(), expected, rtol=scale * tolerance, atol=absolute)


def check(arguments, ways=None, passes=1):
    """Loss and gradients against the oracle's; a way is a function and the arguments that need a gradient."""
    logits, names = arguments["input"], differentiable(arguments)
    accurate = accumulator(logits.dtype)
    expected, leaves = call(oracle, arguments, names, torch.Tensor.double)
    upstream = torch.randn(expected.shape).to(arguments.get("loss_dtype", logits.dtype))
    expected_grads = dict(zip(names, torch.autograd.grad(expected, leaves, upstream.double()), strict=True))
    expected = expected.detach()
    # What differences are of: a probability and (weighted) 1, a row's loss and the mean; the same of all rows, times
    # the logits, for the scale.
    terms = {"input": float(upstream.abs().max()), "row_weight": float((upstream * expected).abs().max())}
    if "logit_scale" in names:
        sum_of_terms = upstream.abs().max() * logits.nan_to_num().abs().max()
        if arguments["reduction"] != "mean":
            sum_of_terms *= logits.numel() / logits.shape[arguments.get("class_dim", class_dim(logits.shape))]
        terms["logit_scale"] = float(sum_of_terms / arguments["logit_scale"].abs())
    for function, needed in ways or [
        (cross_entropy.cross_entropy, names),
        (cross_entropy.cross_entropy, ["input"]),
        (inplace, [name for name in names if name not in ("target", "weight")]),
        (cross_entropy.cross_entropy, []),
    ]:
        loss, leaves = call(function, arguments, needed)
        assert loss.dtype == upstream.dtype and loss.requires_grad == bool(needed)
        assert_close(loss, expected, accurate)
        for left in reversed(range(passes if needed else 0)):
            grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=left > 0)
            for name, grad in zip(needed, grads, strict=True):
                assert grad.dtype == arguments[name].dtype and grad.device == arguments[name].device
                assert_close(grad, expected_grads[name], accurate, 4, terms.get(name, 0.0))


def without_divisor(names, reduction):
    return [name for name in names if name != "divisor" or reduction == "mean"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_each_option(name, dtype):
    reductions = ["mean"] if name == "divisor" else REDUCTIONS
    cases = itertools.product(KINDS, (False, True), (0.0, 0.1), reductions)
    for seed, case in enumerate(cases):
        for shape in ((33, 10), (6, 300)):  # lanes across rows, with a rest, and along them
            check(make(shape, [name], dtype, *case, seed=seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_layouts(dtype, shape, layout):
    generator = random.Random(f"{dtype} {shape} {layout}")
    for names in [*ALONE_AND_TOGETHER.values(), NAMES]:
        case = [generator.choice(values) for values in (KINDS, (False, True), (0.0, 0.1), REDUCTIONS)]
        names = without_divisor(names, case[-1])
        check(make(shape, names, dtype, *case, layout=layout, seed=generator.random()))


@pytest.mark.parametrize("seed", range(150))
def test_together(seed):
    generator = random.Random(seed)
    # As SHAPES; of rows by themselves one of a single piece and one of two.
    shape = generator.choice([(1,), (7,), (33, 10), (5, 1), (6, 1000), (3, 4, 20), (2, 21, 4, 9), (2, 20001)])
    axes = (DTYPES, KINDS, (False, True), (0.0, 0.1), REDUCTIONS)
    case = [generator.choice(values) for values in axes]
    names = [name for name in NAMES if generator.random() < 0.8]
    layout, last = generator.choice(list(LAYOUTS)), generator.random() < 0.4
    check(make(shape, without_divisor(names, case[-1]), *case, layout=layout, last=last, seed=seed))


# Every rest of a vector of 4 to 16 lanes and of a few vectors; then those of a piece of 16384 classes, which is what
# threads share a row by.
TAILS = [*range(1, 71), 16383, 16384, 16385, 32769]


@pytest.mark.parametrize("names", [["softcap"], ["logit_scale"], ["softcap", "logit_scale"], ["valid_classes"]])
def test_tails(names):
    for seed, classes in enumerate(TAILS):
        for layout in ("contiguous", "reversed"):  # lanes along the row, and across rows where there are enough
            for rows in (3, 19) if classes < 100 else (3,):
                check(make((rows, classes), names, smoothing=0.1 * (seed % 2), layout=layout, seed=seed))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_gradient_alone(dtype, kind, reduction):
    """Those of other operands than the logits, while the logits need none, have ways of their own."""
    arguments = make((33, 10), without_divisor(NAMES, reduction), dtype, kind, True, 0.1, reduction)
    arguments["logit_scale"] = torch.tensor(0.75)
    check(arguments, [(cross_entropy.cross_entropy, [name]) for name in differentiable(arguments)])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward(dtype, kind, reduction):
    arguments = make((6, 9), without_divisor(NAMES, reduction), dtype, kind, True, 0.1, reduction)
    arguments["logit_scale"] = torch.tensor(0.75)
    names = differentiable(arguments)
    check(arguments, [(cross_entropy.cross_entropy, needed) for needed in (names, ["input"])], passes=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("names", ALONE_AND_TOGETHER.values(), ids=ALONE_AND_TOGETHER)
def test_gradcheck(names, kind, reduction):
    arguments = make((3, 4), without_divisor(names, reduction), torch.float64, kind, True, 0.1, reduction, seed=2)
    if "logit_scale" in names:
        arguments["logit_scale"] = torch.tensor(0.75)
    differentiated = differentiable(arguments)

    def function(*values):
        return cross_entropy.cross_entropy(**arguments | dict(zip(differentiated, values, strict=True)))

    inputs = [arguments[name].detach().double().requires_grad_() for name in differentiated]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


# What is not read.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(8, 10), (40, 10), (8, 300), (2, 21, 9), (3, 17000)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_gradient(kind, shape, reduction):
    for valid in {1, shape[1] // 2, shape[1] - 1}:
        arguments = make(shape, [], torch.float32, kind, True, 0.1, reduction) | {"valid_classes": valid}
        arguments["target"] = (
            arguments["target"].clamp(max=valid - 1) if kind != "probabilities" else arguments["target"]
        )
        finite = {name: arguments[name] for name in ("input", "target") if arguments[name].is_floating_point()}
        results = []
        for padding in (0.0, NAN, INF, -INF):
            for tensor in finite.values():
                tensor[:, valid:] = padding
            for function in (cross_entropy.cross_entropy, inplace):
                loss, leaves = call(function, arguments, ["input"])
                (grad,) = torch.autograd.grad(loss.sum(), leaves)
                assert grad[:, valid:].eq(0).all()
                results.append((loss.detach(), grad))
        assert all(torch.equal(*pair) for result in results for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", ALONE_AND_TOGETHER.values(), ids=ALONE_AND_TOGETHER)
def test_ignored_row_does_not_leak(names, reduction):
    for shape in ((40, 10), (6, 300), (6, 10, 9), (3, 17000)):
        arguments = make(shape, without_divisor(names, reduction), reduction=reduction, smoothing=0.1, weighted=True)
        if "logit_scale" in names:
            arguments["logit_scale"] = torch.tensor(0.75)
        ignored = (arguments["target"] == -100).unsqueeze(1)
        for function in (cross_entropy.cross_entropy, inplace):
            results = []
            for value in (0.0, NAN, INF):
                dirty = arguments | {"input": arguments["input"].masked_fill(ignored, value)}
                loss, leaves = call(function, dirty, differentiable(dirty))
                grads = torch.autograd.grad(loss.sum(), leaves)
                assert grads[0].masked_select(ignored).eq(0).all()
                results.append([loss.detach(), *grads])
            for clean, *others in zip(*results, strict=True):
                assert clean.isfinite().all() and all(torch.equal(other, clean) for other in others)


# Extremes.


@pytest.mark.parametrize("large", [1e4, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_of_large_logits(dtype, large):
    for shape, scale in itertools.product([(40, 10), (6, 300), (6, 10, 9), (3, 17000)], (1.0, -0.75)):
        arguments = make(shape, ["softcap"], dtype, reduction="none", smoothing=0.1) | {"logit_scale": scale}
        signs = torch.randint(-1, 2, shape)
        arguments["input"] = arguments["input"].where(signs == 0, (signs * large).to(dtype))
        check(arguments)


# Where the tanh is near its argument, where it is not, and where it is 1, in one vector. Powers of the first and the
# last caps are beyond what a float32 can hold; under the last ones logits that are capped are nothing but rounding.
@pytest.mark.parametrize("softcap", [1e-8, 1e-3, 0.5, 30.0, 900.0, 1e5, 1e10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_softcap_near_and_far(dtype, softcap):
    for shape, reduction in itertools.product([(40, 10), (5, 600), (3, 601, 7), (2, 17000)], ("none", "mean")):
        arguments = make(shape, ["softcap"], dtype, reduction=reduction)
        largest = 3 * softcap if softcap < 1e3 else 90
        logits = torch.linspace(-largest, largest, arguments["input"].numel(), dtype=torch.float64)
        logits = logits[torch.randperm(len(logits))].reshape(shape).to(dtype)
        check(arguments | {"input": logits, "softcap": softcap})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capped_logit_does_not_depend_on_the_others(dtype):
    near = torch.rand(64, 1000).to(dtype)
    near[:, 500] = torch.linspace(1, 60, 64).to(dtype)  # the largest of each row
    far = near.where(torch.arange(1000) % 9 != 0, -100)
    maxima = [cross_entropy.row_stats(x, outputs=("maximum",), softcap=30.0)[0] for x in (near, far)]
    assert torch.equal(*maxima)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 10), (6, 300), (6, 10, 9), (3, 17000)], ids=str)
def test_softcap_of_nan(shape, dtype):
    """A tanh that is clamped would make a number of it."""
    logits, target = torch.randn(shape).to(dtype), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    logits[1, -1] = NAN
    bad = torch.zeros(target.shape, dtype=torch.bool)
    bad[1] = True
    x = logits.requires_grad_()
    loss = cross_entropy.cross_entropy(x, target, reduction="none", softcap=5.0)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(torch.autograd.grad(loss.sum(), x)[0].isnan().any(dim=1), bad)
    assert cross_entropy.cross_entropy(x, target, softcap=5.0).isnan()


@pytest.mark.parametrize("softcap", [1.0, 30.0, 1000.0])
def test_softcap_is_accurate_where_it_does_little(softcap):
    # With one class the z-loss is the square of the capped logit, without any that is larger to hide an error.
    logits = torch.logspace(-3, 1, 1000)[:, None].requires_grad_()
    target = torch.zeros(1000, dtype=torch.long)
    loss = cross_entropy.cross_entropy(logits, target, reduction="none", softcap=softcap, z_loss=1.0)
    x = logits.detach().double().requires_grad_()
    expected = reference.cross_entropy(x, target, reduction="none", softcap=softcap, z_loss=1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    grad, expected_grad = torch.autograd.grad(loss.sum(), logits)[0], torch.autograd.grad(expected.sum(), x)[0]
    small = logits.detach() < softcap  # beyond it 1 - tanh² cancels
    torch.testing.assert_close(grad[small].double(), expected_grad[small], rtol=4e-6, atol=2.5e-7)


@pytest.mark.parametrize("shape", [(40, 50), (3, 4, 200)], ids=str)
def test_small_logits_under_a_large_softcap(shape):
    logits = torch.randn(shape) * torch.logspace(-3, 1, shape[-1])
    check(make(shape, ["softcap"], reduction="none") | {"input": logits, "softcap": 1000.0})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logit_scale_of_zero(softcap, reduction):
    logits, target = torch.randn(6, 9), torch.tensor([0, 8, 3, -100, 1, 1])
    arguments = {"target": target, "reduction": reduction, "softcap": softcap}
    results = []
    for function, convert in ((cross_entropy.cross_entropy, torch.Tensor.detach), (oracle, torch.Tensor.double)):
        loss, leaves = call(
            function, arguments | {"input": logits, "logit_scale": torch.tensor(0.0)}, ["input", "logit_scale"], convert
        )
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    loss, grad, scale_grad = results[0]
    assert grad.eq(0).all()
    rows = torch.tensor(9.0).log() * (target != -100)
    torch.testing.assert_close(loss, {"none": rows, "sum": rows.sum(), "mean": rows[0]}[reduction])
    torch.testing.assert_close(scale_grad.double(), results[1][2], rtol=1e-5, atol=0)
    assert scale_grad != 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_weight_of_zero(dtype, kind, reduction):
    arguments = make((33, 10), ["row_weight"], dtype, kind, True, 0.1, reduction)
    zero = torch.arange(33) % 3 == 0
    arguments["row_weight"] = arguments["row_weight"].masked_fill(zero, 0)
    check(arguments)
    loss, leaves = call(cross_entropy.cross_entropy, arguments, ["input"])
    assert torch.autograd.grad(loss.sum(), leaves)[0][zero].eq(0).all()
    if reduction == "none":
        assert loss[zero].eq(0).all()


@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layouts_of_row_weight(reduction, layout):
    row_weight = {
        "strided": torch.rand(2, 4, 18).add(0.5)[..., ::2],
        "expanded": torch.rand(2, 1, 1).add(0.5).expand(2, 4, 9),
        "transposed": torch.rand(9, 4, 2).add(0.5).permute(2, 1, 0),
    }[layout]
    check(make((2, 21, 4, 9), ["softcap"], reduction=reduction) | {"row_weight": row_weight})


DIVISORS = [7, 2.5, torch.tensor(7, device="cpu"), torch.tensor(7, device="cpu", dtype=torch.int32)]
DIVISORS += [torch.tensor(2.5, device="cpu", dtype=dtype) for dtype in DTYPES]


@pytest.mark.parametrize("here", [False, True], ids=["cpu", "here"])
@pytest.mark.parametrize("divisor", DIVISORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divisors(dtype, divisor, here):
    divisor = divisor.to(torch.empty(0).device) if here and torch.is_tensor(divisor) else divisor
    for kind, weighted in itertools.product(KINDS, (False, True)):
        check(make((33, 10), ["row_weight"], dtype, kind, weighted) | {"divisor": divisor})


@pytest.mark.parametrize("function", [cross_entropy.cross_entropy, inplace], ids=["", "inplace"])
@pytest.mark.parametrize("names", [[], ["row_weight"], ["divisor"], NAMES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 3), (33, 10), (2, 3, 5), (2, 17000), (0, 3)], ids=str)
def test_all_rows_ignored(shape, dtype, names, function):
    for empty, smoothing in itertools.product(("nan", "zero"), (0.0, 0.1)):
        arguments = make(shape, names, dtype, smoothing=smoothing, weighted=True) | {"empty": empty}
        arguments["target"].fill_(-100)
        arguments["input"].fill_(NAN)
        differentiated = differentiable(arguments)
        loss, leaves = call(function, arguments, differentiated)
        grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.5))
        own_denominator = "divisor" not in names
        assert loss.isnan() if empty == "nan" and own_denominator else loss.eq(0)
        assert grads[0].eq(0).all()
        if empty == "zero":
            assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_denominator_of_zero_with_rows_kept(dtype, kind):
    arguments = make((33, 10), ["z_loss", "empty", "row_weight"], dtype, kind)
    arguments["row_weight"] = torch.zeros(33)
    check(arguments)
    assert cross_entropy.cross_entropy(**arguments) == 0
    assert cross_entropy.cross_entropy(**arguments | {"empty": "nan"}).isnan()


def test_no_rows_of_probabilities():
    arguments = {"input": torch.zeros(0, 3), "target": torch.zeros(0, 3)}
    assert cross_entropy.cross_entropy(**arguments).isnan()
    assert cross_entropy.cross_entropy(**arguments, empty="zero") == 0
    assert cross_entropy.cross_entropy(**arguments, divisor=2) == 0


# class_dim and loss_dtype.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["int64", "int32", "flat", "probabilities"])
@pytest.mark.parametrize("shape", [(5,), (6, 9), (4, 7, 20), (2, 3, 4, 5), (2, 3, 16385)], ids=str)
def test_classes_last(shape, kind, transposed):
    rows = shape[:-1]
    logits = torch.randn(shape)
    if transposed:
        logits = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    target = torch.rand(shape) / shape[-1]
    if kind != "probabilities":
        target = torch.randint(shape[-1], rows, dtype=torch.int32 if kind == "int32" else torch.int64)
        target.view(-1)[1::3] = -100
        target = target.flatten() if kind == "flat" else target
    loss_shape = target.shape if kind == "flat" else rows
    for reduction, weighted in itertools.product(REDUCTIONS, (False, True)):
        arguments = {"input": logits, "target": target, "reduction": reduction, "class_dim": -1}
        arguments |= {"weight": torch.rand(shape[-1]) + 0.5 if weighted else None, "label_smoothing": 0.1}
        if reduction == "none":
            assert cross_entropy.cross_entropy(**arguments).shape == loss_shape
        check(arguments)
        check(arguments | {"row_weight": torch.rand(loss_shape) + 0.5, "z_loss": 0.01})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_last_is_torchs_rule_of_moved_logits(dtype):
    logits, target = torch.randn(2, 4, 9, 21).to(dtype), torch.randint(21, (2, 4, 9))
    for reduction in REDUCTIONS:
        moved = cross_entropy.cross_entropy(logits.movedim(-1, 1), target, reduction=reduction)
        assert torch.equal(cross_entropy.cross_entropy(logits, target, reduction=reduction, class_dim=-1), moved)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_classes_last_needs_a_target_of_each_row(reduction, shape):
    rows = math.prod(shape[:-1])
    for wrong in [(rows + 1,), (rows - 1,), (rows, 1), shape, (*shape, 1), (shape[0] + 1, *shape[1:-1])]:
        with pytest.raises((ValueError, RuntimeError)):
            target = torch.zeros(wrong, dtype=torch.long)
            cross_entropy.cross_entropy(torch.randn(shape), target, reduction=reduction, class_dim=-1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(33, 10), (6, 300), (3, 17000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_dtype(dtype, shape, kind, reduction):
    arguments = make(shape, [], dtype, kind, reduction=reduction, smoothing=0.1)
    expected = oracle(**arguments)
    wide = accumulator(dtype)
    for function in (cross_entropy.cross_entropy, inplace):
        for needed in ([], ["input"]):
            loss, _ = call(function, arguments | {"loss_dtype": wide}, needed)
            assert loss.dtype == wide
            torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert cross_entropy.cross_entropy(**arguments | {"loss_dtype": None}).dtype == dtype


# The defaults, and the module.

DEFAULTS = {
    "inplace": False,
    "class_dim": None,
    "valid_classes": None,
    "logit_scale": 1.0,
    "softcap": None,
    "z_loss": 0.0,
    "row_weight": None,
    "divisor": None,
    "empty": "nan",
    "loss_dtype": None,
}


def results(function, arguments, names=("input",)):
    loss, leaves = call(function, arguments, names)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (33, 10), (2, 21, 4, 9), (2, 20001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_defaults_change_no_bit(dtype, shape, kind, reduction):
    for weighted, smoothing in itertools.product((False, True), (0.0, 0.1)):
        arguments = make(shape, [], dtype, kind, weighted, smoothing, reduction)
        plain = results(cross_entropy.cross_entropy, arguments)
        spelled_out = results(cross_entropy.cross_entropy, arguments | DEFAULTS)
        assert all(map(torch.equal, plain, spelled_out))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", [*NAMES, "class_dim", "inplace"])
def test_module(name, reduction):
    reduction = "mean" if name == "divisor" else reduction
    arguments = make(
        (4, 6, 6), [name] if name in NAMES else [], reduction=reduction, weighted=True, smoothing=0.1, seed=1
    )
    arguments |= {"class_dim": -1} if name == "class_dim" else {"inplace": True} if name == "inplace" else {}

    def module(input, target, **arguments):
        of_forward = {key: arguments.pop(key) for key in ("row_weight", "divisor") if key in arguments}
        return cross_entropy.CrossEntropyLoss(**arguments)(input * 1, target, **of_forward)

    def function(input, **arguments):
        return cross_entropy.cross_entropy(input * 1, **arguments)

    names = differentiable(arguments)
    expected = results(function, arguments, names)
    assert all(map(torch.equal, results(module, arguments, names), expected))
    if name not in ("valid_classes", "empty", "loss_dtype", "inplace"):  # which are not needed, or change nothing here
        plain = function(**{key: value for key, value in arguments.items() if key != name})
        assert not torch.equal(plain, expected[0])


def test_module_with_empty_and_loss_dtype():
    logits, target = torch.randn(2, 3).bfloat16(), torch.full((2,), -100)
    loss = cross_entropy.CrossEntropyLoss(empty="zero", loss_dtype=torch.float32)(logits, target)
    assert loss == 0 and loss.dtype == torch.float32


# Errors.


def cpu(value, **options):
    return torch.tensor(value, device="cpu", **options)


# argument: values that are refused, for logits of shape (2, 3)
REFUSED = {
    "z_loss": [-0.1, -INF, NAN],
    "softcap": [0, 0.0, -1.0, -INF, NAN],
    "divisor": [0, 0.0, -1, -2.5, NAN, cpu(0), cpu(-1), cpu(0.0), cpu(-2.5), cpu(NAN), torch.ones(1), torch.ones(2)],
    "logit_scale": [torch.ones(1), torch.ones(2), cpu(1), cpu(True)],
    "row_weight": [torch.ones(3), torch.ones(1), torch.ones(()), torch.ones(2, 1), torch.ones(2, 3)],
    "valid_classes": [0, -1, 4],
    "empty": ["", "zeros", "NaN", "mean"],
    "class_dim": [0, 1, 2, -2],
    "loss_dtype": [torch.float16, torch.bfloat16, torch.int64, torch.complex64],
}
REFUSED["row_weight"] += [torch.ones(2, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64)]


def refuse(arguments, error, match):
    """The call raises this error, in every way, before it has written anything."""
    arguments = {"input": torch.randn(2, 3), "target": torch.tensor([0, 1])} | arguments
    before = arguments["input"].clone()
    for requires_grad, in_place in itertools.product((False, True), repeat=2):
        logits = arguments["input"].clone().requires_grad_(requires_grad) * 1
        with pytest.raises(error, match=match):
            cross_entropy.cross_entropy(**arguments | {"input": logits, "inplace": in_place})
            cross_entropy.check_errors()
        if not (DEFERS_ERRORS and error is IndexError):  # where the gradient is in the logits before the error is known
            assert torch.equal(logits, before)


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]], ids=str)
def test_refused_values(argument, value):
    if argument == "divisor" and torch.is_tensor(value) and value.dim() == 0 and cross_entropy.build_info().emulated:
        pytest.skip(
            "the emulated device reads tensors of the CPU itself, and no kernel waits to have a divisor checked"
        )
    refuse({argument: value}, ValueError, rf"\b{argument}\b")
    refuse({argument: value, "target": torch.rand(2, 3)}, ValueError, rf"\b{argument}\b")
    if argument != "divisor":
        refuse({argument: value, "reduction": "none"}, ValueError, rf"\b{argument}\b")


# argument: values of a type that it does not take
WRONG_TYPES = {
    "z_loss": ["much", None, torch.ones(()), [0.1]],
    "softcap": ["much", torch.ones(()), [30.0]],
    "divisor": ["many", [2]],
    "logit_scale": ["much", None, [1.0]],
    "row_weight": ["much", 2.0, [1.0, 1.0]],
    "valid_classes": ["all", 2.0, torch.ones((), dtype=torch.long)],
}


@pytest.mark.parametrize(
    ("argument", "value"), [(name, value) for name in WRONG_TYPES for value in WRONG_TYPES[name]], ids=str
)
def test_values_of_a_wrong_type(argument, value):
    kind = type(value).__name__
    refuse({argument: value}, TypeError, rf"argument '{argument}' must be \w+, not {kind}$")


@pytest.mark.parametrize("argument", ["label_smoothing", "z_loss", "softcap", "divisor", "logit_scale"])
def test_integers_that_no_float_holds(argument):
    refuse({argument: 10**400}, OverflowError, "int too large to convert to float")


@pytest.mark.parametrize("name", ["zloss", "outputs", "logit_scale_tensor", "picked"])
def test_options_that_are_not_known(name):
    refuse({name: 0.1}, TypeError, rf"^cross_entropy\(\) got an unexpected keyword argument '{name}'$")
    refuse({"z_loss": 0.1, name: 0.1}, TypeError, rf"'{name}'")


@pytest.mark.parametrize("name", ["zloss", "row_weight", "divisor"])
def test_options_that_the_module_does_not_take(name):
    with pytest.raises(TypeError, match=rf"^CrossEntropyLoss\(\) got an unexpected keyword argument '{name}'$"):
        cross_entropy.CrossEntropyLoss(**{name: 0.1})


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("divisor", [2, 2.5, cpu(2), cpu(2.5)], ids=str)
def test_divisor_is_of_the_mean(divisor, reduction):
    refuse({"divisor": divisor, "reduction": reduction}, ValueError, r"\bdivisor\b")


def test_divisor_is_a_constant():
    refuse({"divisor": torch.tensor(2.0, requires_grad=True)}, RuntimeError, r"\bdivisor\b")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss_dtype", DTYPES, ids=str)
def test_loss_dtypes_that_are_allowed(loss_dtype, dtype):
    if loss_dtype in (dtype, accumulator(dtype)):
        assert cross_entropy.cross_entropy(torch.randn(3).to(dtype), torch.tensor(1), loss_dtype=loss_dtype) > 0
    else:
        logits = torch.randn(2, 3).to(dtype)
        refuse({"input": logits, "loss_dtype": loss_dtype}, ValueError, r"\bloss_dtype\b")


@pytest.mark.parametrize("shape", [(3, 4), (2,), (8,), (2, 3, 4)], ids=str)
def test_row_weight_has_the_shape_of_the_rows(shape):
    logits, target = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)
    refuse({"input": logits, "target": target, "row_weight": torch.ones(shape)}, ValueError, r"\brow_weight\b")


@pytest.mark.parametrize("kind", ["int64", "int32"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("columns", [5, 40, 300, 17000])
def test_target_in_the_padding(columns, reduction, kind):
    valid = columns - 2
    for bad in (valid, columns - 1, columns):
        target = torch.tensor([0, valid - 1, bad], dtype=getattr(torch, kind))
        arguments = {"input": torch.randn(3, columns), "target": target, "valid_classes": valid}
        refuse(arguments | {"reduction": reduction}, IndexError, rf"^Target {bad} is out of bounds\.")


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("entries", [1, 4, 6])
def test_weight_of_all_columns_or_of_the_valid_ones(entries, kind):
    target = torch.rand(2, 5) if kind == "probabilities" else torch.tensor([0, 1])
    arguments = {"input": torch.randn(2, 5), "target": target, "valid_classes": 3, "weight": torch.rand(entries)}
    refuse(arguments, RuntimeError, "weight tensor should be defined")
