"""Divergences from a teacher's logits, every option alone and together, against the float64 oracle."""

import itertools
import math
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cross_entropy
from cross_entropy import distillation_loss, topk_distillation_loss
from tests import reference
from tests.device import IS_HOST
from tests.observe import allocations
from tests.test_cross_entropy import DTYPES, LAYOUTS, SHAPES
from tests.test_options import REDUCTIONS, TAILS, accumulator, assert_close, call

DIVERGENCES = ["kl", "cross_entropy"]
OPTIONS = ["temperature", "valid_classes", "softcap", "z_loss", "row_weight", "divisor", "empty", "target"]
KINDS = list(itertools.product(DIVERGENCES, (False, True)))
NAN, INF = math.nan, math.inf


def oracle(input, teacher, loss_dtype=None, **arguments):
    return reference.distillation_loss(input, teacher, **arguments)


def inplace(input, teacher, **arguments):
    return distillation_loss(input * 1, teacher, inplace=True, **arguments)


def make(shape, names=(), dtype=torch.float32, *, layouts=("contiguous", "contiguous"), seed=0, **arguments):
    """The arguments of a call with the options `names`. What must not be read is NaN."""
    choose = random.Random(seed).choice
    last = arguments.get("class_dim", 1) == -1 or len(shape) == 1
    arguments["class_dim"] = -1 if last else 1
    dim = len(shape) - 1 if last else 1
    rows = shape[:dim] + shape[dim + 1 :]
    classes = max(1, shape[dim] - choose([1, 3])) if "valid_classes" in names else shape[dim]
    target = torch.randint(classes, rows)
    weight = torch.rand(rows) + 0.5
    if weight.numel() > 2:
        target.view(-1)[1] = -7
        weight.view(-1)[2] = 0
    dirty = torch.zeros(rows, dtype=torch.bool)
    if "target" in names:
        dirty |= target == -7
        weight[dirty] = NAN
    if "row_weight" in names:
        dirty |= weight == 0
    both = []
    for layout in layouts:
        logits = torch.randn(shape).mul(3).to(dtype)
        logits.narrow(dim, classes, shape[dim] - classes).fill_(NAN)
        both.append(LAYOUTS[layout](logits.masked_fill(dirty.unsqueeze(dim), NAN)))
    values = {
        "temperature": choose([2.0, 0.75, 5]),
        "valid_classes": classes,
        "softcap": choose([5.0, 30]),
        "z_loss": choose([0.01, 0.25]),
        "row_weight": weight.to(choose([torch.float32, dtype])),
        "divisor": choose([3, torch.tensor(2.5)]),
        "empty": "zero",
        "target": target if choose([False, True]) else target.flatten(),
    }
    arguments |= {name: values[name] for name in names if name != "divisor" or arguments.get("reduction") == "mean"}
    return {"input": both[0], "teacher": both[1], "ignore_index": -7} | arguments


def check(arguments, ways=None, passes=1, oracle=oracle, names=("input", "teacher")):
    """Loss and gradients against the oracle's; a way is a function and the arguments that need a gradient."""
    accurate = accumulator(arguments["input"].dtype)
    expected, leaves = call(oracle, arguments, names, torch.Tensor.double)
    upstream = torch.randn(expected.shape).to(arguments.get("loss_dtype", arguments["input"].dtype))
    expected_grads = dict(zip(names, torch.autograd.grad(expected, leaves, upstream.double()), strict=True))
    # What differences are of: two probabilities, and for the loss as many nats as the logits are apart.
    terms = float(upstream.abs().max())
    apart = float(max(arguments[name].nan_to_num(0, 0, 0).abs().max() for name in names))
    for function, needed in ways or [
        (distillation_loss, ["input", "teacher"]),
        (distillation_loss, ["input"]),
        (distillation_loss, ["teacher"]),
        (inplace, ["input"]),
        (distillation_loss, []),
    ]:
        loss, leaves = call(function, arguments, needed)
        assert loss.dtype == upstream.dtype and loss.requires_grad == bool(needed)
        assert_close(loss, expected.detach(), accurate, 2, apart)
        for left in reversed(range(passes if needed else 0)):
            grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=left > 0)
            for name, grad in zip(needed, grads, strict=True):
                assert grad.dtype == arguments[name].dtype
                assert_close(grad, expected_grads[name], accurate, 4, terms * (1 + apart))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("divergence", "reverse"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formulas(dtype, divergence, reverse, reduction):
    for shape in [*SHAPES, (6, 300), (2, 20001)]:
        kind = {"divergence": divergence, "reverse": reverse, "reduction": reduction}
        check(make(shape, ["temperature"], dtype, seed=str(shape), **kind))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_option(dtype, name):
    for seed, (reduction, (divergence, reverse)) in enumerate(itertools.product(REDUCTIONS, KINDS)):
        for shape in ((33, 10), (6, 300)):  # lanes across rows, with a rest, and along them
            kind = {"divergence": divergence, "reverse": reverse, "reduction": reduction}
            check(make(shape, [name], dtype, seed=seed, **kind))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_teacher", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, of_teacher, layout):
    for seed, shape in enumerate(SHAPES):
        divergence, reverse = KINDS[seed % len(KINDS)]
        kind = {"divergence": divergence, "reverse": reverse, "reduction": REDUCTIONS[seed % 3]}
        check(make(shape, ["softcap"], dtype, layouts=(layout, of_teacher), seed=seed, **kind))


@pytest.mark.parametrize("seed", range(100))
def test_together(seed):
    generator = random.Random(seed)
    # As SHAPES; of rows by themselves one of a single piece and one of two.
    shape = generator.choice([(1,), (7,), (33, 10), (5, 1), (6, 1000), (3, 4, 20), (2, 21, 4, 9), (2, 20001)])
    divergence, reverse = generator.choice(KINDS)
    kind = {"divergence": divergence, "reverse": reverse, "reduction": generator.choice(REDUCTIONS)}
    kind |= {"class_dim": generator.choice([1, -1])}
    dtype = generator.choice(DTYPES)
    if generator.random() < 0.5:
        kind["loss_dtype"] = accumulator(dtype)
    layouts = generator.choices(list(LAYOUTS), k=2)
    names = [name for name in OPTIONS if generator.random() < 0.7]
    check(make(shape, names, dtype, layouts=layouts, seed=seed, **kind))


def test_tails():
    for seed, classes in enumerate(TAILS):
        divergence, reverse = KINDS[seed % len(KINDS)]
        for layout in ("contiguous", "reversed"):  # lanes along the row, and across rows where there are enough
            for rows in (3, 19) if classes < 100 else (3,):
                kind = {"divergence": divergence, "reverse": reverse}
                check(make((rows, classes), ["softcap"] * (seed % 3 == 0), layouts=(layout, layout), seed=seed, **kind))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("divergence", "reverse"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward(dtype, divergence, reverse, reduction):
    arguments = make((6, 9), ["z_loss"], dtype, divergence=divergence, reverse=reverse, reduction=reduction)
    check(arguments, [(distillation_loss, needed) for needed in (["input", "teacher"], ["input"])], passes=3)


@pytest.mark.parametrize("names", [[], ["softcap", "temperature", "z_loss", "row_weight", "valid_classes"]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("divergence", "reverse"), KINDS)
def test_gradcheck(divergence, reverse, reduction, names):
    kind = {"divergence": divergence, "reverse": reverse, "reduction": reduction}
    arguments = make((4, 5), names, torch.float64, **kind)
    for name in ("input", "teacher"):
        arguments[name].nan_to_num_(0)
    differentiated = ["input", "teacher", *["row_weight"] * ("row_weight" in names)]

    def function(*values):
        return distillation_loss(**arguments | dict(zip(differentiated, values, strict=True)))

    inputs = [arguments[name].detach().double().requires_grad_() for name in differentiated]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(("divergence", "reverse"), KINDS)
def test_transforms(divergence, reverse):
    z, t, v = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    kind = {"divergence": divergence, "reverse": reverse, "temperature": 2.0, "z_loss": 0.1}

    def ours(x, y):
        return distillation_loss(x, y, **kind)

    def expected(x, y):
        return reference.distillation_loss(x, y, **kind).float()

    func = torch.func
    for transform in (
        lambda f: func.grad(f, argnums=(0, 1))(z, t),
        lambda f: func.vmap(f)(z[:, None], t[:, None]),
        lambda f: func.vmap(f, in_dims=(None, 0))(z, torch.stack([t, v])),
        lambda f: func.vmap(func.grad(f))(z[:, None], t[:, None]),
        lambda f: func.jvp(f, (z, t), (v, z)),
        lambda f: func.hessian(f)(z, t),
        lambda f: func.jacrev(f, argnums=1)(z, t),
    ):
        torch.testing.assert_close(transform(ours), transform(expected), rtol=1e-4, atol=1e-6)


# Values at the edge.


@pytest.mark.parametrize(("divergence", "reverse"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 10), (6, 300), (6, 10, 9), (3, 17000)], ids=str)
def test_masked_classes(shape, dtype, divergence, reverse):
    """Classes that both models exclude have no part in anything; the first ones are no good reference."""
    arguments = make(shape, [], dtype, divergence=divergence, reverse=reverse, reduction="none")
    masked = torch.rand(shape) < 0.3
    masked[:, 0] = True
    masked[:, -1] = False
    for name in ("input", "teacher"):
        arguments[name] = arguments[name].masked_fill(masked, -INF)
    check(arguments)
    _, leaves = loss = call(distillation_loss, arguments, ["input", "teacher"])
    assert loss[0].isfinite().all()
    for grad in torch.autograd.grad(loss[0].sum(), leaves):
        assert grad[masked].eq(0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", [(40, 10), (6, 300), (6, 10, 9), (3, 17000)], ids=str)
def test_class_that_only_one_model_excludes(shape, divergence):
    for reverse, at in itertools.product((False, True), (0, 7, shape[1] - 1)):
        arguments = make(shape, [], divergence=divergence, reverse=reverse, reduction="none")
        of, other = ("input", "teacher") if reverse else ("teacher", "input")
        without = arguments[other].clone()
        without[1, at] = -INF
        # Nothing comes close to what is possible but excluded.
        loss = distillation_loss(**arguments | {other: without})
        assert loss[1].eq(INF).all() and loss[0].isfinite().all()
        # What is impossible costs nothing, whether excluded or not.
        without = arguments[of].clone()
        without[1, at] = -INF
        check(arguments | {of: without})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 10), (6, 300), (6, 10, 9), (3, 17000)], ids=str)
def test_equal_models(shape, dtype):
    logits = make(shape, [], dtype)["input"]
    # A constant that is added to all logits changes nothing but their rounding.
    wide = logits.to(accumulator(dtype))
    for teacher, reverse in itertools.product((wide, wide + 64), (False, True)):
        x = wide.clone().requires_grad_()
        loss = distillation_loss(x, teacher, reverse=reverse, class_dim=1)
        (grad,) = torch.autograd.grad(loss, x)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert loss.detach().abs() < tolerance
        assert grad.abs().max() < tolerance


@pytest.mark.parametrize(("divergence", "reverse"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype, divergence, reverse):
    for shape in ((40, 10), (6, 300), (6, 10, 9), (3, 17000)):
        arguments = make(shape, [], dtype, divergence=divergence, reverse=reverse, reduction="none")
        signs = torch.randint(-1, 2, shape)
        for name in ("input", "teacher"):
            arguments[name] = (signs * 1e4).to(dtype) + arguments[name]
        check(arguments)


@pytest.mark.parametrize("name", ["input", "teacher"])
@pytest.mark.parametrize("shape", [(40, 10), (6, 300), (6, 10, 9), (3, 17000)], ids=str)
def test_nan_stays_in_its_row(shape, name):
    for (divergence, reverse), value in itertools.product(KINDS, (NAN, INF)):
        arguments = make(shape, [], divergence=divergence, reverse=reverse, reduction="none")
        arguments[name][1, 3] = value
        bad = torch.zeros(shape[:1] + shape[2:], dtype=torch.bool)
        bad[1] = True
        loss, leaves = call(distillation_loss, arguments, ["input", "teacher"])
        assert torch.equal(loss.isnan(), bad)
        for grad in torch.autograd.grad(loss.sum(), leaves):
            assert torch.equal(grad.isnan().any(dim=1), bad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("function", [distillation_loss, inplace], ids=["", "inplace"])
def test_all_rows_ignored(function, empty, reduction):
    for shape in ((4, 3), (33, 10), (2, 17000), (0, 3)):
        arguments = {"input": torch.full(shape, NAN), "teacher": torch.full(shape, NAN), "empty": empty}
        arguments |= {"target": torch.full(shape[:1], -100), "reduction": reduction}
        loss, leaves = call(function, arguments, ["input"])
        (grad,) = torch.autograd.grad(loss.sum(), leaves)
        assert loss.isnan().all() if reduction == "mean" and empty == "nan" else loss.eq(0).all()
        assert grad.eq(0).all()


# The top of a teacher's softmax.


def topk_oracle(input, loss_dtype=None, **arguments):
    return reference.topk_distillation_loss(input, **arguments)


def topk_inplace(input, **arguments):
    return topk_distillation_loss(input * 1, inplace=True, **arguments)


def make_topk(shape, picks, names=(), dtype=torch.float32, *, rest="drop", repeated=False, seed=0, **arguments):
    """As make(), with an index out of bounds in rows that are not read."""
    choose = random.Random(seed).choice
    arguments = make(shape, names, dtype, seed=seed, **arguments)
    dim = arguments["class_dim"]
    del arguments["teacher"]
    classes = arguments.get("valid_classes", shape[dim])
    picks = min(picks, classes)
    of_row = torch.rand(*arguments["input"].movedim(dim, -1).shape[:-1], classes)
    indices = of_row.topk(picks).indices
    if repeated and picks > 1:
        indices[..., 1] = indices[..., -1]
    probabilities = torch.rand(indices.shape).softmax(-1) * choose([0.6, 0.9])
    arguments |= {
        "indices": indices.movedim(-1, dim).to(choose([torch.int64, torch.int32])),
        "probabilities": probabilities.movedim(-1, dim).to(choose([torch.float32, dtype])),
        "rest": rest,
    }
    return arguments


def check_topk(arguments, passes=1):
    ways = [(topk_distillation_loss, ["input"]), (topk_distillation_loss, [])]
    ways += [(topk_inplace, ["input"])] * (passes == 1)
    check(arguments, ways, passes, topk_oracle, ["input"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rest", ["drop", "spread"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_formulas(dtype, rest, divergence, reduction):
    for shape in [*SHAPES, (6, 300), (2, 20001)]:
        for picks in (1, 5, 40):  # one, less than a vector, and some vectors with a rest
            kind = {"rest": rest, "divergence": divergence, "reduction": reduction, "repeated": picks == 5}
            check_topk(make_topk(shape, picks, ["temperature"], dtype, seed=f"{shape} {picks}", **kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_topk_of_any_probabilities(dtype):
    """One pick is the only term of its row: nothing hides the error of its logarithm."""
    # All sizes of the normal numbers, those around 1 and a subnormal one, which counts for 0, and 0.
    tiny = torch.finfo(dtype).tiny
    sizes = [torch.logspace(math.log10(tiny) + 1, 0, 400, dtype=dtype), torch.linspace(0.5, 2, 301).to(dtype)]
    q = torch.cat([*sizes, torch.tensor([0.0, tiny / 8], dtype=dtype)])[:, None]
    logits, indices = torch.zeros(len(q), 2, dtype=dtype), torch.zeros(len(q), 1, dtype=torch.long)
    loss = topk_distillation_loss(logits, indices, q, reduction="none")
    expected = reference.topk_distillation_loss(logits, indices, q, reduction="none")
    around_0 = 4 * torch.finfo(dtype).eps * q.squeeze(1).double()  # ln q = −ln 2 leaves nothing
    error = (loss.double() - expected).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * expected.abs() + around_0 + 100 * tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_of_excluded_classes(dtype):
    logits = torch.randn(4, 40).to(dtype)
    logits[:, 20:] = -INF
    # Nothing is left to spread; an excluded class has less than each of the others, or more.
    for indices, q in (([0, 1], [0.5, 0.5]), ([0, 30], [0.5, 0.001]), ([0, 30], [0.1, 0.5])):
        arguments = {"indices": torch.tensor([indices] * 4), "probabilities": torch.tensor([q] * 4), "rest": "spread"}
        loss = topk_distillation_loss(logits, **arguments, reduction="none")
        expected = reference.topk_distillation_loss(logits, **arguments, reduction="none")
        assert expected.isfinite().eq(30 not in indices).all()
        assert_close(loss, expected, accumulator(dtype))


@pytest.mark.parametrize("rest", ["drop", "spread"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_option_of_topk(dtype, name, rest):
    for seed, (reduction, divergence) in enumerate(itertools.product(REDUCTIONS, DIVERGENCES)):
        for shape in ((33, 10), (6, 300)):
            kind = {"rest": rest, "divergence": divergence, "reduction": reduction}
            check_topk(make_topk(shape, 3, [name], dtype, seed=seed, **kind))


@pytest.mark.parametrize("seed", range(80))
def test_topk_together(seed):
    generator = random.Random(seed)
    shape = generator.choice([(1,), (7,), (33, 10), (5, 1), (6, 1000), (3, 4, 20), (2, 21, 4, 9), (2, 20001)])
    dtype = generator.choice(DTYPES)
    kind = {"rest": generator.choice(["drop", "spread"]), "divergence": generator.choice(DIVERGENCES)}
    kind |= {"reduction": generator.choice(REDUCTIONS), "class_dim": generator.choice([1, -1])}
    if generator.random() < 0.5:
        kind["loss_dtype"] = accumulator(dtype)
    names = [name for name in OPTIONS if generator.random() < 0.7]
    layouts = generator.choices(list(LAYOUTS), k=2)
    picks, repeated = generator.choice([1, 2, 17, 64]), generator.random() < 0.3
    check_topk(make_topk(shape, picks, names, dtype, layouts=layouts, repeated=repeated, seed=seed, **kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_of_topk(dtype):
    for reduction in REDUCTIONS:
        check_topk(make_topk((6, 9), 3, ["z_loss"], dtype, rest="spread", reduction=reduction), passes=3)


@pytest.mark.parametrize("names", [[], ["softcap", "temperature", "z_loss", "row_weight", "valid_classes"]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rest", ["drop", "spread"])
def test_gradcheck_of_topk(rest, reduction, names):
    arguments = make_topk((4, 6), 3, names, torch.float64, rest=rest, reduction=reduction)
    arguments["input"].nan_to_num_(0)
    differentiated = ["input", *["row_weight"] * ("row_weight" in names)]

    def function(*values):
        return topk_distillation_loss(**arguments | dict(zip(differentiated, values, strict=True)))

    inputs = [arguments[name].detach().double().requires_grad_() for name in differentiated]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("rest", ["drop", "spread"])
def test_transforms_of_topk(rest):
    z, v = torch.randn(3, 7), torch.randn(3, 7)
    indices, q = torch.tensor([[0, 1], [6, 2], [3, 3]]), torch.rand(3, 2) / 2

    def ours(x, i=indices, p=q):
        return topk_distillation_loss(x, i, p, rest=rest)

    def expected(x, i=indices, p=q):
        return reference.topk_distillation_loss(x, i, p, rest=rest).float()

    func = torch.func
    for transform in (
        lambda f: func.grad(f)(z),
        lambda f: func.vmap(f)(z[:, None], indices[:, None], q[:, None]),
        lambda f: func.vmap(func.grad(f))(z[:, None], indices[:, None], q[:, None]),
        lambda f: func.jvp(f, (z,), (v,)),
        lambda f: func.hessian(f)(z),
    ):
        torch.testing.assert_close(transform(ours), transform(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rest", ["drop", "spread"])
@pytest.mark.parametrize("shape", [(40, 10), (6, 300), (6, 10, 9), (3, 17000)], ids=str)
def test_topk_of_all_classes_is_probabilities(shape, rest):
    probabilities, indices = torch.rand(shape).softmax(1), torch.rand(shape).argsort(1)
    logits = torch.randn(shape, requires_grad=True)
    picked = probabilities.gather(1, indices)
    kind = {"rest": rest, "divergence": "cross_entropy", "class_dim": 1, "reduction": "sum"}
    results = [
        [loss.detach(), *torch.autograd.grad(loss, logits)]
        for loss in (
            topk_distillation_loss(logits, indices, picked, **kind),
            cross_entropy.cross_entropy(logits, probabilities, reduction="sum"),
        )
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("columns", [5, 300, 17000])
def test_topk_index_out_of_bounds(columns, reduction):
    for bad in (columns, -1, -100):
        indices = torch.tensor([[0, 1], [columns - 1, bad], [2, 3]])
        for requires_grad, in_place in itertools.product((False, True), repeat=2):
            x = torch.randn(3, columns).requires_grad_(requires_grad) * 1
            with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\."):
                topk_distillation_loss(x, indices, torch.rand(3, 2), reduction=reduction, inplace=in_place)
                cross_entropy.check_errors()


# How it is computed.


@pytest.mark.skipif(not IS_HOST, reason="counts the CPU's memory, and the emulator stands in for a device with its own")
@pytest.mark.parametrize(("divergence", "reverse"), KINDS)
def test_no_softmax_is_written(divergence, reverse):
    logits, teacher = torch.randn(64, 5000, requires_grad=True), torch.randn(64, 5000)

    def step():
        distillation_loss(logits, teacher, temperature=2.0, divergence=divergence, reverse=reverse).backward()

    step()
    logits.grad = None
    assert allocations(step, teacher.nbytes) == 1  # the gradient


@pytest.mark.skipif(not IS_HOST, reason="counts the CPU's memory, and the emulator stands in for a device with its own")
@pytest.mark.parametrize("rest", ["drop", "spread"])
def test_nothing_of_the_logits_size_is_written_for_picks(rest):
    logits, indices, q = torch.randn(64, 5000, requires_grad=True), torch.randint(5000, (64, 20)), torch.rand(64, 20)

    def step():
        topk_distillation_loss(logits, indices, q, rest=rest).backward()

    step()
    logits.grad = None
    assert allocations(step, logits.nbytes) == 1  # the gradient


@pytest.mark.skipif(not IS_HOST, reason="threads are the CPU's")
@pytest.mark.parametrize("shape", [(3, 100_000), (500, 1000)], ids=str)
def test_bits_do_not_depend_on_threads(shape):
    arguments = make(shape, ["temperature"])
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss, leaves = call(distillation_loss, arguments, ["input", "teacher"])
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in results for pair in zip(other, results[0], strict=True))


def test_dtypes_are_promoted():
    x, t = torch.randn(4, 9).bfloat16(), torch.randn(4, 9)
    for input, teacher in ((x, t), (t, x)):
        loss = distillation_loss(input, teacher)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, distillation_loss(input.float(), teacher.float()))


# Torch.compile does not know of the tests' default device.


def distill(x):
    target = torch.tensor([1, 2, -100, 4, 5, 6], device=x.device)
    teacher = torch.linspace(-3, 3, 54, device=x.device).view(6, 9)
    return distillation_loss(x * 2, teacher, target, temperature=2.0, softcap=5.0, reverse=True)


def distill_topk(x):
    indices = torch.arange(12, device=x.device).view(6, 2) % 9
    probabilities = torch.full((6, 2), 0.4, device=x.device)
    return topk_distillation_loss(x * 2, indices, probabilities, rest="spread", temperature=2.0)


@pytest.mark.parametrize("step", [distill, distill_topk])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, step):
    z = torch.randn(6, 9, requires_grad=True)
    results = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        loss = function(z)
        results.append([loss.detach(), *torch.autograd.grad(loss, z)])
    torch.testing.assert_close(*results)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"teacher": torch.zeros(2, 4)}, ValueError, r"\bteacher\b"),
        ({"teacher": torch.zeros(3)}, ValueError, r"\bteacher\b"),
        ({"teacher": torch.zeros(2, 3, dtype=torch.long)}, (RuntimeError, ValueError), "floating point"),
        ({"temperature": 0}, ValueError, r"\btemperature\b"),
        ({"temperature": -1.0}, ValueError, r"\btemperature\b"),
        ({"temperature": NAN}, ValueError, r"\btemperature\b"),
        ({"temperature": torch.ones(())}, TypeError, r"\btemperature\b"),
        ({"divergence": "js"}, ValueError, r"\bdivergence\b"),
        ({"class_dim": 0}, ValueError, r"\bclass_dim\b"),
        ({"reduction": "batchmean"}, ValueError, "batchmean"),
        ({"target": torch.zeros(3, dtype=torch.long)}, ValueError, r"\btarget\b"),
        ({"target": torch.zeros(2, 3)}, ValueError, r"\btarget\b"),
        ({"softcap": 0.0}, ValueError, r"\bsoftcap\b"),
        ({"softcap": "much"}, TypeError, r"\bsoftcap\b"),
        ({"zloss": 0.1}, TypeError, r"^distillation_loss\(\) got an unexpected keyword argument 'zloss'$"),
        ({"z_loss": -1.0}, ValueError, r"\bz_loss\b"),
        ({"divisor": 0}, ValueError, r"\bdivisor\b"),
        ({"divisor": 2, "reduction": "sum"}, ValueError, r"\bdivisor\b"),
        ({"row_weight": torch.ones(3)}, ValueError, r"\brow_weight\b"),
        ({"valid_classes": 4}, ValueError, r"\bvalid_classes\b"),
        ({"empty": "none"}, ValueError, r"\bempty\b"),
        ({"loss_dtype": torch.int64}, ValueError, r"\bloss_dtype\b"),
    ],
    ids=str,
)
def test_refused(arguments, error, match):
    logits = torch.randn(2, 3)
    before = logits.clone()
    for requires_grad, in_place in itertools.product((False, True), repeat=2):
        x = logits.clone().requires_grad_(requires_grad) * 1
        with pytest.raises(error, match=match):
            distillation_loss(**{"input": x, "teacher": torch.zeros(2, 3), "inplace": in_place} | arguments)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"indices": torch.zeros(2, 4, dtype=torch.long)}, ValueError, "pick 1 to 3"),
        ({"indices": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "pick 1 to 3"),
        ({"indices": torch.zeros(3, 2, dtype=torch.long)}, ValueError, "rows"),
        ({"indices": torch.zeros(2, dtype=torch.long)}, ValueError, "dimensions"),
        ({"indices": torch.zeros(2, 2)}, ValueError, "int64 or int32"),
        ({"probabilities": torch.zeros(2, 1)}, ValueError, r"\bprobabilities\b"),
        ({"probabilities": torch.zeros(2, 2, dtype=torch.long)}, ValueError, r"\bprobabilities\b"),
        ({"probabilities": torch.zeros(2, 2, requires_grad=True)}, NotImplementedError, r"\bprobabilities\b"),
        ({"rest": "nobody"}, ValueError, r"\brest\b"),
        ({"divergence": "reverse"}, ValueError, r"\bdivergence\b"),
        ({"temperature": 0.0}, ValueError, r"\btemperature\b"),
        ({"divisor": 2, "reduction": "none"}, ValueError, r"\bdivisor\b"),
        ({"target": torch.zeros(5, dtype=torch.long)}, ValueError, r"\btarget\b"),
    ],
    ids=str,
)
def test_refused_by_topk(arguments, error, match):
    logits = torch.randn(2, 3)
    before = logits.clone()
    of_call = {"indices": torch.tensor([[0, 1], [2, 1]]), "probabilities": torch.rand(2, 2)} | arguments
    if arguments.get("indices") is not None:
        of_call["probabilities"] = torch.zeros(of_call["indices"].shape)
    for requires_grad, in_place in itertools.product((False, True), repeat=2):
        x = logits.clone().requires_grad_(requires_grad) * 1
        with pytest.raises(error, match=match):
            topk_distillation_loss(**{"input": x, "inplace": in_place} | of_call)
        assert torch.equal(x, before)


def test_operators_without_a_teacher_refuse_one():
    x = torch.randn(2, 3)
    operators = torch.ops.cross_entropy
    for operator, first in ((operators.forward, ()), (operators.stats, (0,))):
        with pytest.raises(ValueError, match="teacher"):
            operator(*first, x, x, None, 0, -100, 0.0, divergence=2)
    for options, match in (({"label_smoothing": 0.1}, "smoothing"), ({"weight": torch.ones(3)}, "weights")):
        arguments = {"weight": None, "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0} | options
        with pytest.raises(ValueError, match=match):
            operators.loss(x, x, **arguments, divergence=2)
    with pytest.raises(ValueError, match="divergence"):
        operators.loss(x, x, None, 1, -100, 0.0, divergence=3)


def test_operator_of_no_classes():
    x = torch.randn(3, 0)
    results = torch.ops.cross_entropy.diverge(x, x, None, 0, -100, 0.0, divergence=2)
    for result, expected in zip(results, (0, -math.inf, 0, -math.inf, 0, 0), strict=True):
        assert result.eq(expected).all()


def test_operator_ignores_no_picked_class():
    """Whatever its ignore_index says; rows are long enough to be read only if they count."""
    x, index, q = torch.randn(3, 20001), torch.tensor([[0, 1], [0, 0], [7, 0]]), torch.rand(3, 2) / 2
    results = [
        torch.ops.cross_entropy.forward_grad(x, index, None, 1, ignore_index, 0.0, picked=q, divergence=2)
        for ignore_index in (-100, 0)
    ]
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
