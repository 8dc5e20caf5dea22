"""The outputs of row_stats, all together and in any selection, log_prob and entropy, against the float64 oracle."""

import itertools
import math
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cross_entropy
from tests import reference
from tests.test_cross_entropy import DTYPES, LAYOUTS, SHAPES, TOLERANCE
from tests.test_options import INF, KINDS, NAN, TAILS, accumulator, assert_close, cpu
from tests.test_options import REFUSED as REFUSED_IN_LOSS
from tests.test_options import make as make_loss

DIFFERENTIABLE = ("loss", "logsumexp", "log_prob", "entropy")
OUTPUTS = (*DIFFERENTIABLE, "maximum", "argmax", "rank", "correct")
OF_INDICES = ("log_prob", "rank", "correct")
WITHOUT_TARGET = ("logsumexp", "entropy", "maximum", "argmax")
OPTIONS = ["valid_classes", "logit_scale", "softcap", "z_loss"]
RESULT_DTYPES = {"argmax": torch.int64, "rank": torch.int64, "correct": torch.bool}


def make(shape, options=(), *case, seed=0, **more):
    """The arguments of a call. Logits that are transformed are few different ones: ranks survive their rounding."""
    arguments = make_loss(shape, options, *case, seed=seed, **more)
    del arguments["reduction"]
    logits = arguments.pop("input")
    if "logit_scale" in options or "softcap" in options:
        logits.mul_(4).round_().clamp_(-24, 24).div_(4)
    if "softcap" in options:  # not one that all of them reach
        arguments["softcap"] = random.Random(seed).choice([5.0, 30])
    return {"logits": logits} | arguments


def outputs_for(kind):
    return tuple(name for name in OUTPUTS if kind != "probabilities" or name not in OF_INDICES)


def differentiable(arguments):
    target = arguments.get("target")
    soft = target is not None and target.is_floating_point()
    names = ["logits", *["target", "weight"] * soft, "logit_scale", "temperature"]
    return [name for name in names if torch.is_tensor(arguments.get(name))]


def call(function, arguments, names, convert=torch.Tensor.detach):
    """The results, and the leaves that take the places of the arguments `names`."""
    leaves = {name: convert(arguments[name].detach()).requires_grad_() for name in names}
    return function(**arguments | leaves), leaves


def make_upstream(expected, dtype):
    dims = tuple(reversed(range(expected.dim())))
    return torch.randn(expected.shape[::-1], dtype=dtype).permute(dims)  # not contiguous


def assert_gradients_close(results, leaves, expected, oracle_leaves):
    """Of all results in one backward pass, and of each alone, which leaves the others without an upstream gradient."""
    logits = oracle_leaves["logits"]
    accurate = next(iter(results.values())).dtype
    upstream = {name: make_upstream(expected[name], accurate) for name in results}

    def gradients(values, grads, inputs):
        """None where no result depends on the input."""
        grads = torch.autograd.grad(values, inputs.values(), grads, retain_graph=True, allow_unused=True)
        return dict(zip(inputs, grads, strict=True))

    terms = {name: gradients([expected[name]], [upstream[name].double()], oracle_leaves) for name in results}
    p = torch.autograd.grad(expected["logsumexp"].sum(), logits, retain_graph=True)[0].abs()
    together = [name for name in results if results[name].requires_grad]
    for names in [together, *([name] for name in together if len(together) > 1)]:
        grads = gradients([results[name] for name in names], [upstream[name] for name in names], leaves)
        size = sum(float(upstream[name].abs().max()) for name in names)
        # What cancels are the results' parts, and within them a few times p and the smoothing's 1 / classes.
        of_logits = sum(terms[name]["logits"].abs() for name in names)
        of_one = size * (p + (p != 0) * p.mean())
        for leaf, grad in grads.items():
            parts = [terms[name][leaf] for name in names if terms[name][leaf] is not None]
            if not parts:
                assert grad is None or grad.eq(0).all()
                continue
            assert grad.dtype == leaves[leaf].dtype and grad.shape == leaves[leaf].shape
            assert grad.device == leaves[leaf].device
            if leaf == "logits":
                summed = of_logits + 10 * of_one
            elif leaf in ("logit_scale", "temperature"):
                products = ((of_logits + of_one) * logits).nan_to_num().abs()
                summed = products.sum().to(grad.device) / oracle_leaves[leaf].abs()
            else:
                summed = parts[0].abs().max()
            tiny = torch.finfo(grad.dtype).tiny * torch.finfo(grad.dtype).eps
            total = sum(parts)
            # The exponentials in a gradient are as accurate as its dtype makes sense of.
            of_terms = {torch.bfloat16: 2**-13, torch.float16: 2**-18}.get(grad.dtype, 4 * TOLERANCE[accurate])
            bound = TOLERANCE[grad.dtype] * total.abs() + of_terms * summed.detach() + tiny
            error = (grad.double() - total).abs()
            assert (error <= bound).all(), (names, leaf, float((error / bound).max()))


def assert_output(name, result, expected, accurate):
    assert result.dtype == RESULT_DTYPES.get(name, accurate) and result.shape == expected.shape
    if name in RESULT_DTYPES:
        assert torch.equal(result, expected), name
    else:
        assert_close(result, expected.detach(), accurate, 2)


def check(arguments, outputs, needed=None):
    """Outputs and gradients against the oracle's; `needed` are the arguments that need a gradient."""
    names = differentiable(arguments)
    needed = names if needed is None else needed
    accurate = accumulator(arguments["logits"].dtype)
    expected, oracle_leaves = call(reference.row_stats, arguments, names, torch.Tensor.double)
    results, leaves = call(cross_entropy.row_stats, arguments | {"outputs": tuple(outputs)}, needed)
    assert type(results) is tuple and len(results) == len(outputs)
    results = dict(zip(outputs, results, strict=True))
    for name, result in results.items():
        assert_output(name, result, expected[name], accurate)
        assert not result.requires_grad or (needed and name in DIFFERENTIABLE)
        assert result.requires_grad or name not in DIFFERENTIABLE or not {"logits", "logit_scale"} & {*needed}
    if "maximum" in results and not {"logit_scale", "softcap"} & arguments.keys():
        assert torch.equal(results["maximum"].double(), expected["maximum"])
    results = {name: result for name, result in results.items() if name in DIFFERENTIABLE}
    if needed and results:
        assert_gradients_close(results, leaves, expected, oracle_leaves)


def selection(generator, outputs):
    return generator.sample(outputs, generator.randint(1, len(outputs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output(name, dtype):
    cases = itertools.product(KINDS, (False, True), (0.0, 0.1))
    for seed, (kind, *case) in enumerate(cases):
        if name in outputs_for(kind):
            for shape in ((33, 10), (6, 300)):  # lanes across rows, with a rest, and along them
                arguments = make(shape, [], dtype, kind, *case, seed=seed)
                check(arguments, [name])
                check(arguments, [name], [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_layouts(dtype, shape, layout):
    generator = random.Random(f"{dtype} {shape} {layout}")
    for options in ([], OPTIONS, [generator.choice(OPTIONS)]):
        kind, *case = [generator.choice(values) for values in (KINDS, (False, True), (0.0, 0.1))]
        arguments = make(shape, options, dtype, kind, *case, layout=layout, seed=generator.random())
        outputs = outputs_for(kind)
        check(arguments, outputs)
        check(arguments, selection(generator, outputs))


@pytest.mark.parametrize("seed", range(120))
def test_together(seed):
    generator = random.Random(seed)
    shape = generator.choice([(1,), (7,), (33, 10), (5, 1), (6, 1000), (3, 4, 20), (2, 21, 4, 9), (2, 20001)])
    dtype, kind, *case = [generator.choice(values) for values in (DTYPES, KINDS, (False, True), (0.0, 0.1))]
    options = [name for name in OPTIONS if generator.random() < 0.6]
    # A flat target of the shape (1,) of the logits would be probabilities.
    layout, last = generator.choice(list(LAYOUTS)), generator.random() < 0.4 and shape != (1,)
    arguments = make(shape, options, dtype, kind, *case, layout=layout, last=last, seed=seed)
    outputs = outputs_for(kind)
    for names in (outputs, selection(generator, outputs), selection(generator, outputs)):
        check(arguments, names)
    check(arguments, selection(generator, outputs), [])
    arguments = {name: value for name, value in arguments.items() if name in ("logits", "class_dim", *OPTIONS[:3])}
    check(arguments, selection(generator, WITHOUT_TARGET))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [[], ["valid_classes"], ["softcap"], ["logit_scale", "softcap"]], ids=str)
def test_tails(options, dtype):
    for seed, classes in enumerate(TAILS):
        for layout in ("contiguous", "reversed"):  # lanes along the row, and across rows where there are enough
            for rows in (3, 19) if classes < 100 else (3,):
                case = (dtype, "int64", False, 0.1 * (seed % 2))
                check(make((rows, classes), options, *case, layout=layout, seed=seed), OUTPUTS)


@pytest.mark.parametrize("shape", [(33, 10), (6, 300), (3, 20001)], ids=str)
@pytest.mark.parametrize("transform", [{"logit_scale": 0.7}, {"softcap": 3.0}, {"logit_scale": -1.7, "softcap": 20.0}])
def test_transforms_of_logits_of_full_precision(transform, shape):
    check(make(shape) | transform, [*DIFFERENTIABLE, "maximum"])


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_gradient_alone(dtype, kind):
    """Those of other operands than the logits, while the logits need none, have ways of their own."""
    for shape in ((33, 10), (6, 300), (2, 21, 9)):
        arguments = make(shape, OPTIONS, dtype, kind, True, 0.1) | {"logit_scale": torch.tensor(0.75)}
        for needed, outputs in itertools.product(differentiable(arguments), (outputs_for(kind), ["loss"])):
            check(arguments, outputs, [needed])


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)], ids=str)
def test_no_rows(shape):
    logits = torch.randn(shape, requires_grad=True)
    rows = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    results = cross_entropy.row_stats(logits, rows, outputs=OUTPUTS)
    for name, result in zip(OUTPUTS, results, strict=True):
        assert result.shape == rows.shape and result.dtype == RESULT_DTYPES.get(name, torch.float32)
    assert torch.autograd.grad(sum(result.sum() for result in results[:4]), logits)[0].shape == shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True])
def test_default_outputs(last, kind):
    for seed, shape in enumerate([(33, 10), (3, 4, 20), (6, 300)]):
        arguments = make(shape, OPTIONS, torch.float32, kind, True, 0.1, last=last, seed=seed)
        names = differentiable(arguments)
        expected, oracle_leaves = call(reference.row_stats, arguments, names, torch.Tensor.double)
        stats, leaves = call(cross_entropy.row_stats, arguments, names)
        assert isinstance(stats, cross_entropy.RowStats) and stats._fields == ("maximum", "logsumexp", "loss")
        for name, result in stats._asdict().items():
            assert_output(name, result, expected[name], torch.float32)
        results = {name: getattr(stats, name) for name in stats._fields[1:]}
        assert_gradients_close(results, leaves, expected, oracle_leaves)


# Ranks.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(40,), (33, 10), (6, 300), (700, 3), (2, 21, 9), (3, 40000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(dtype, shape, layout):
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    classes = shape[min(1, len(shape) - 1)]
    logits, target = torch.randint(-2, 3, shape).to(dtype), torch.randint(classes, rows)
    if rows:
        logits[0] = 0.5  # all of them equal
        target.view(-1)[-1] = -100
    logits = LAYOUTS[layout](logits)
    for transform in ({}, {"softcap": 5.0}, {"logit_scale": -0.7}, {"valid_classes": classes // 2 + 1}):
        t = target.clamp(max=transform.get("valid_classes", classes) - 1)
        for outputs in (["argmax", "rank", "correct"], OUTPUTS, ["rank"], ["argmax"], ["correct"]):
            check({"logits": logits, "target": t} | transform, outputs, [])


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("classes", [2, 17, 37, 300, 5000, 33000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_maxima_anywhere(dtype, classes, across):
    pairs = list(itertools.combinations(range(classes), 2)) if classes < 40 else None
    if pairs is None:
        places = [0, 1, 63, 64, classes // 2, classes - 2, classes - 1, *torch.randint(classes, (9,)).tolist()]
        pairs = list(itertools.combinations(sorted({*places}), 2))[:: 1 + classes // 2000]
    first, second = torch.tensor(pairs).t()
    logits = torch.rand(len(pairs), classes).to(dtype)  # less than 2
    logits.scatter_(1, first[:, None], 2).scatter_(1, second[:, None], 2)
    if across:
        logits = logits.t().contiguous().t()
    for outputs in (("argmax", "rank", "correct"), ("entropy", "correct", "argmax", "rank", "loss")):
        for rank, target in enumerate((first, second)):
            results = cross_entropy.row_stats(logits, target, outputs=outputs)
            results = dict(zip(outputs, results, strict=True))
            assert torch.equal(results["argmax"], first)
            assert results["rank"].eq(rank).all() and results["correct"].eq(rank == 0).all()


def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([0.0, -0.0]).repeat(20, 1)[:, torch.randint(2, (37,))]
    target = torch.arange(20)
    for options in ({}, {"logit_scale": -1.0}, {"softcap": 2.0}):
        argmax, rank, correct = cross_entropy.row_stats(
            logits, target, outputs=("argmax", "rank", "correct"), **options
        )
        assert argmax.eq(0).all() and torch.equal(rank, target) and torch.equal(correct, target == 0)


# What is not read.


@pytest.mark.parametrize("shape", [(40, 10), (6, 300), (6, 10, 9), (3, 17000)], ids=str)
@pytest.mark.parametrize("options", [[], OPTIONS], ids=["", "options"])
def test_ignored_rows_of_nan(options, shape):
    arguments = make(shape, options, smoothing=0.1, weighted=True)
    if options:
        arguments["logit_scale"] = torch.tensor(0.75)
    ignored = arguments["target"] == -100
    columns = ignored.unsqueeze(1)
    assert ignored.any() and not ignored.all()
    upstream = {name: torch.randn(ignored.shape) for name in DIFFERENTIABLE}
    for outputs in (OUTPUTS, ("loss", "log_prob"), ("log_prob", "rank"), ("entropy",)):
        read = not {"logsumexp", "entropy"}.isdisjoint(outputs)
        needed = ["logits"] if read else differentiable(arguments)
        given = [upstream[name] for name in outputs if name in upstream]
        runs = []
        for value in (0.0, NAN, INF):
            dirty = arguments | {"logits": arguments["logits"].masked_fill(columns, value)}
            results, leaves = call(cross_entropy.row_stats, dirty | {"outputs": outputs}, needed)
            grads = torch.autograd.grad(results[: len(given)], leaves.values(), given)
            for name, result in zip(outputs, results, strict=True):
                if name in ("loss", "log_prob", "rank", "correct"):
                    assert result[ignored].eq(-1 if name == "rank" else 0).all()
            if not read:
                assert grads[0].masked_select(columns).eq(0).all()
            kept = [result.detach()[~ignored] for result in results]
            runs.append([*kept, grads[0].masked_fill(columns, 0), *grads[1:]])
        for clean, *others in zip(*runs, strict=True):
            assert clean.isfinite().all() and all(torch.equal(other, clean) for other in others)


@pytest.mark.parametrize("shape", [(8, 10), (40, 10), (8, 300), (2, 21, 9), (3, 17000)], ids=str)
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
def test_padding_has_no_gradient(kind, shape):
    outputs = outputs_for(kind)
    for valid in {1, shape[1] // 2, shape[1] - 1}:
        arguments = make(shape, [], torch.float32, kind) | {"valid_classes": valid}
        soft = kind == "probabilities"
        arguments["target"] = arguments["target"] if soft else arguments["target"].clamp(max=valid - 1)
        runs = []
        for padding in (0.0, NAN, INF, -INF):
            for name in ["logits", *["target"] * soft]:
                arguments[name][:, valid:] = padding
            results, leaves = call(cross_entropy.row_stats, arguments | {"outputs": outputs}, ["logits"])
            total = sum(result.sum() for result in results if result.requires_grad)
            (grad,) = torch.autograd.grad(total, leaves.values())
            assert grad[:, valid:].eq(0).all()
            runs.append([*results, grad])
        assert all(torch.equal(*pair) for run in runs for pair in zip(run, runs[0], strict=True))


# More of the gradients.


@pytest.mark.parametrize("options", [[], ["softcap"], ["logit_scale"], OPTIONS], ids=str)
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
def test_gradcheck(kind, options):
    arguments = make((3, 4), options, torch.float64, kind, True, 0.1, seed=2)
    if "logit_scale" in options:
        arguments["logit_scale"] = torch.tensor(0.75)
    names = differentiable(arguments)
    inputs = [arguments[name].detach().double().requires_grad_() for name in names]
    together = [name for name in DIFFERENTIABLE if name in outputs_for(kind)]
    for outputs in (together, *([name] for name in together)):
        used = names if "loss" in outputs else [name for name in names if name not in ("target", "weight")]

        def function(*values, used=used, outputs=outputs):
            return cross_entropy.row_stats(**arguments | dict(zip(used, values, strict=True)), outputs=outputs)

        values = [value for name, value in zip(names, inputs, strict=True) if name in used]
        assert gradcheck(function, values)
        assert gradgradcheck(function, values)


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["", "options"])
@pytest.mark.parametrize("shape", [(33, 10), (6, 300), (2, 21, 9), (2, 20001)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_double_backward(dtype, shape, options):
    arguments = make(shape, options, dtype, smoothing=0.1, seed=1) | {"outputs": DIFFERENTIABLE}
    names = differentiable(arguments)
    upstreams = [torch.randn(shape[:1] + shape[2:], dtype=dtype) for _ in DIFFERENTIABLE]
    direction = torch.randn(shape, dtype=dtype)

    def oracle(outputs, **arguments):
        stats = reference.row_stats(**arguments)
        return [stats[name] for name in outputs]

    runs = []
    for function, convert in ((cross_entropy.row_stats, torch.Tensor.detach), (oracle, torch.Tensor.double)):
        results, leaves = call(function, arguments, names, convert)
        up = [convert(tensor).requires_grad_() for tensor in upstreams]
        (grad,) = torch.autograd.grad(results, leaves["logits"], up, create_graph=True)
        runs.append(torch.autograd.grad(grad, [*leaves.values(), *up], convert(direction)))
    for actual, expected in zip(*runs, strict=True):
        terms = float(expected.abs().max()) if actual.dim() else float(runs[1][0].abs().sum())
        assert_close(actual, expected, dtype, 16, terms)


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward(dtype, kind):
    arguments = make((6, 9), OPTIONS, dtype, kind, True, 0.1) | {"logit_scale": torch.tensor(0.75)}
    arguments["outputs"] = outputs_for(kind)
    results, leaves = call(cross_entropy.row_stats, arguments, differentiable(arguments))
    results = [result for name, result in zip(arguments["outputs"], results, strict=True) if name in DIFFERENTIABLE]
    upstream = [torch.randn(6) for _ in results]
    first, second = (torch.autograd.grad(results, leaves.values(), upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    doubled = torch.autograd.grad(results, leaves.values(), [2 * tensor for tensor in upstream])
    assert all(torch.equal(2 * grad, twice) for grad, twice in zip(first, doubled, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(results, leaves.values(), upstream)


@pytest.mark.parametrize("shape", [(7,), (33, 10), (6, 300), (2, 21, 9)], ids=str)
def test_expanded_upstream_gradients(shape):
    """Those of a sum are one number, which is nowhere as often as there are rows."""
    arguments = make(shape)
    results, leaves = call(cross_entropy.row_stats, arguments | {"outputs": DIFFERENTIABLE}, ["logits"])
    for name, result in zip(DIFFERENTIABLE, results, strict=True):
        ones = torch.ones(result.shape)
        expanded = torch.autograd.grad(result.sum(), leaves["logits"], retain_graph=True)[0]
        assert torch.equal(expanded, torch.autograd.grad(result, leaves["logits"], ones, retain_graph=True)[0]), name
        assert expanded.ne(0).any()


# Extremes.

EXTREME_SHAPES = [(40, 10), (6, 300), (6, 10, 9), (3, 17000)]


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"logit_scale": 0.75}], ids=str)
@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(dtype, shape, options):
    """A class of probability 0 has no part in the entropy, nor a gradient."""
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    is_target = torch.zeros(shape, dtype=torch.bool).scatter(1, target.unsqueeze(1), True)
    masked = (torch.rand(shape) < 0.3) & ~is_target
    masked[1] = ~is_target[1]  # no other class is left
    logits = torch.randn(shape).mul(3).mul(4).round().div(4).to(dtype).masked_fill(masked, -INF)
    check({"logits": logits, "target": target} | options, OUTPUTS)
    check({"logits": logits} | options, ["entropy"])
    (entropy,) = cross_entropy.row_stats(logits, outputs=("entropy",))
    assert entropy[1].eq(0).all()


@pytest.mark.parametrize("classes", [10, 300, 17000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_of_probability_0(dtype, classes):
    logits = torch.randn(40, classes).to(dtype)
    logits[:, [1, 3, 8]] = -INF
    target = torch.tensor([3]).expand(40)
    leaf = logits.clone().requires_grad_()
    log_prob, rank, correct = cross_entropy.row_stats(leaf, target, outputs=("log_prob", "rank", "correct"))
    assert log_prob.eq(-INF).all() and rank.eq(classes - 2).all() and not correct.any()  # behind 1 and before 8
    (grad,) = torch.autograd.grad(log_prob.sum(), leaf)
    assert grad[:, 3].eq(1).all() and grad.isfinite().all()


@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_large_logit(dtype, shape, value):
    arguments = make(shape, dtype=dtype, smoothing=0.1)
    arguments["logits"][:, shape[1] // 3] = value
    check(arguments, OUTPUTS)
    check(arguments, ["entropy"])
    (entropy,) = cross_entropy.row_stats(arguments["logits"], outputs=("entropy",))
    assert entropy.ge(0).all() and (value < 0 or entropy.eq(0).all())


@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_whose_difference_overflows(dtype, shape):
    large = torch.finfo(dtype).max * 0.875
    logits = torch.randint(-1, 2, shape).to(dtype) * large
    logits[0] = -large  # all of them equal
    logits[1] = -large
    logits[1, 2] = large
    logits[2] = logits[2].clamp(max=0)
    arguments = {"logits": logits, "target": logits.max(dim=1).indices}
    check(arguments, OUTPUTS)
    check({"logits": logits}, ["entropy"])


@pytest.mark.parametrize("value", [0.0, 1.5, -300.0, 30000.0])
@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits(dtype, shape, value):
    logits, target = torch.full(shape, value).to(dtype), torch.randint(shape[1], shape[:1] + shape[2:])
    leaf = logits.clone().requires_grad_()
    outputs = ("entropy", "log_prob", "argmax", "rank")
    entropy, log_prob, argmax, rank = cross_entropy.row_stats(leaf, target, outputs=outputs)
    expected = torch.full_like(entropy, math.log(shape[1]))
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_prob, -expected, rtol=1e-6, atol=0)
    assert argmax.eq(0).all() and torch.equal(rank, target)
    (grad,) = torch.autograd.grad(entropy.sum(), leaf)
    assert grad.abs().max() <= 4e-6 / shape[1]


@pytest.mark.parametrize("shape", EXTREME_SHAPES, ids=str)
@pytest.mark.parametrize("bad", [-INF, NAN])
def test_a_row_without_a_distribution_leaves_the_others_alone(bad, shape):
    arguments = make(shape)
    upstream = [torch.randn(shape[:1] + shape[2:]) for _ in DIFFERENTIABLE]
    runs = []
    for value in (0.0, bad):
        arguments["logits"][2] = value
        results, leaves = call(cross_entropy.row_stats, arguments | {"outputs": OUTPUTS}, ["logits"])
        grads = torch.autograd.grad(results[:4], leaves.values(), upstream)
        runs.append([torch.cat([result[:2], result[3:]]) for result in (*results, *grads)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("classes", [10, 1000, 17000])
def test_large_offset(classes, offset):
    logits, target = torch.randn(40, classes) + offset, torch.randint(classes, (40,))
    expected = reference.row_stats(logits, target)
    for outputs in (["entropy", "log_prob"], OUTPUTS):
        results = cross_entropy.row_stats(logits, target, outputs=outputs)
        results = dict(zip(outputs, results, strict=True))
        for name in ("entropy", "log_prob"):
            assert (results[name].double() - expected[name]).abs().max() < 1e-5
    check({"logits": logits, "target": target}, OUTPUTS)


@pytest.mark.parametrize("size", [100, 3e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_logits_of_half_types(dtype, size):
    for shape in EXTREME_SHAPES:
        logits = torch.rand(shape).mul(2).sub(1).mul(size).to(dtype)
        check({"logits": logits, "target": torch.randint(shape[1], shape[:1] + shape[2:])}, OUTPUTS)


def test_accuracy_at_a_large_vocabulary():
    logits, target = torch.randn(16, 128256), torch.randint(128256, (16,))
    expected = reference.row_stats(logits, target)
    outputs = ("log_prob", "entropy")
    for name, result in zip(outputs, cross_entropy.row_stats(logits, target, outputs=outputs), strict=True):
        assert ((result.double() - expected[name]) / expected[name]).abs().max() < 5e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rising_logits(dtype):
    """The maximum that sums are relative to is raised all the way through the row, up to what float32 cannot hold."""
    for classes in (1000, 4000, 40000):
        logits = torch.linspace(-150, 10, classes).repeat(3, 1).add(torch.randn(3, 1)).to(dtype)
        check({"logits": logits, "target": torch.tensor([classes - 1, 0, 7])}, OUTPUTS)


# The same bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 70016), (700, 300), (2, 21, 200)], ids=["pieces", "rows", "across"])
def test_same_bits_every_time_and_for_any_number_of_threads(shape, dtype):
    arguments = make(shape, dtype=dtype, smoothing=0.1) | {"outputs": OUTPUTS}
    upstream = [torch.randn(shape[:1] + shape[2:]) for _ in DIFFERENTIABLE]
    runs = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 1, 2):
            torch.set_num_threads(n)
            results, leaves = call(cross_entropy.row_stats, arguments, ["logits"])
            runs.append([*results, *torch.autograd.grad(results[:4], leaves.values(), upstream)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for run in runs for pair in zip(run, runs[0], strict=True))


# log_prob and entropy.


def both(logits, target, valid_classes=None, **options):
    """As reference.row_stats: the two functions of one temperature."""
    options |= {} if valid_classes is None else {"valid_classes": valid_classes}
    log_prob = cross_entropy.log_prob(logits, target, **options)
    options.pop("ignore_index", None)
    return {"log_prob": log_prob, "entropy": cross_entropy.entropy(logits, **options)}


def oracle_of_both(logits, target, temperature=1.0, class_dim=-1, **options):
    class_dim = None if class_dim == 1 else class_dim
    return reference.row_stats(logits, target, logit_scale=1 / temperature, class_dim=class_dim, **options)


def check_both(arguments, needed=None):
    names = differentiable(arguments)
    expected, oracle_leaves = call(oracle_of_both, arguments, names, torch.Tensor.double)
    results, leaves = call(both, arguments, names if needed is None else needed)
    for name, result in results.items():
        assert_output(name, result, expected[name], accumulator(arguments["logits"].dtype))
        assert_gradients_close({name: result}, leaves, expected, oracle_leaves)


TEMPERATURES = [None, 1.0, 2, 0.7, torch.tensor(0.7, device="cpu")]
TEMPERATURES += [torch.tensor(0.7, dtype=dtype) for dtype in DTYPES]


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (33, 10), (2, 5, 300), (2, 3, 4, 5), (2, 1, 20001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob_and_entropy(dtype, shape, temperature):
    target = torch.randint(shape[-1], shape[:-1])
    if target.numel() > 2:
        target.view(-1)[1::3] = -100
    arguments = {"logits": torch.randn(shape).mul(3).to(dtype), "target": target}
    arguments |= {} if temperature is None else {"temperature": temperature}
    check_both(arguments)
    for name in differentiable(arguments):
        check_both(arguments, [name])
    if len(shape) > 1:
        moved = arguments["logits"].movedim(-1, 1)
        check_both(arguments | {"logits": moved, "class_dim": 1})
        check_both(arguments | {"logits": moved.contiguous(), "class_dim": 1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob_and_entropy_against_log_softmax(dtype):
    logits, target = torch.randn(4, 6, 50).to(dtype), torch.randint(50, (4, 6))
    for temperature in (1.0, 0.5, 3):
        log_p = torch.log_softmax(logits.double() / temperature, dim=-1)
        results = both(logits, target, temperature=temperature)
        expected = {"log_prob": log_p.gather(-1, target[..., None])[..., 0], "entropy": -(log_p.exp() * log_p).sum(-1)}
        for name, result in results.items():
            assert_output(name, result, expected[name], accumulator(dtype))


def test_log_prob_and_entropy_with_padding_and_another_ignore_index():
    logits, target = torch.randn(4, 6, 50), torch.randint(37, (4, 6))
    target[:, ::2] = 3
    logits[..., 37:] = NAN
    check_both({"logits": logits, "target": target, "valid_classes": 37, "ignore_index": 3, "temperature": 0.5})
    assert cross_entropy.log_prob(logits, target, ignore_index=3, valid_classes=37)[:, ::2].eq(0).all()


# Compiled and transformed.


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
def test_compiled_row_stats(kind):
    torch.compiler.reset()
    arguments = make((7, 33), OPTIONS, torch.float32, kind, True, 0.1) | {"outputs": outputs_for(kind)}
    arguments["logit_scale"] = torch.tensor(0.75)
    upstream = [torch.randn(7) for name in arguments["outputs"] if name in DIFFERENTIABLE]
    runs = []
    for function in (cross_entropy.row_stats, torch.compile(cross_entropy.row_stats, fullgraph=True)):
        results, leaves = call(function, arguments, differentiable(arguments))
        assert type(results) is tuple
        grads = torch.autograd.grad(results[: len(upstream)], leaves.values(), upstream)
        runs.append([*results, *grads])
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)


def objective(logits, target, u, v, temperature=0.7):
    log_prob = cross_entropy.log_prob(logits, target, temperature=temperature)
    return (u * log_prob + v * cross_entropy.entropy(logits, temperature=temperature)).sum()


def policy():
    target = torch.randint(9, (3, 4))
    target[0, 1] = -100
    return torch.randn(3, 4, 9), target, torch.randn(3, 4), torch.randn(3, 4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_log_prob_and_entropy(backend):
    torch.compiler.reset()
    logits, *rest = policy()
    runs = []
    for function in (objective, torch.compile(objective, fullgraph=True, backend=backend)):
        leaves = [logits.clone().requires_grad_(), torch.tensor(0.7).requires_grad_()]
        value = function(leaves[0], *rest, temperature=leaves[1])
        runs.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_transforms():
    logits, *rest = policy()
    leaf = logits.clone().requires_grad_()
    value = objective(leaf, *rest)
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(torch.func.grad(objective)(logits, *rest), expected)
    torch.testing.assert_close(torch.func.vmap(objective)(logits, *rest).sum(), value.detach())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(objective))(logits, *rest), expected)
    tangent = torch.randn(logits.shape)
    moved, slope = torch.func.jvp(lambda x: objective(x, *rest), (logits,), (tangent,))
    torch.testing.assert_close(moved, value.detach())
    torch.testing.assert_close(slope, (expected * tangent).sum())


def test_vmap_of_row_stats():
    logits, target, *_ = policy()

    def stats(x, t):
        return cross_entropy.row_stats(x, t, class_dim=-1, outputs=DIFFERENTIABLE)

    for mapped, eager in zip(torch.func.vmap(stats)(logits, target), stats(logits, target), strict=True):
        torch.testing.assert_close(mapped, eager)


def test_hessian():
    """Of forward mode over the backward pass."""
    logits, target = torch.randn(4, 9), torch.tensor([3, -100, 0, 3])

    def ours(x):
        return sum(value.sum() for value in cross_entropy.row_stats(x, target, outputs=DIFFERENTIABLE))

    def oracle(x):
        stats = reference.row_stats(x, target)
        return sum(stats[name].sum() for name in DIFFERENTIABLE)

    expected = torch.func.hessian(oracle)(logits.double())
    torch.testing.assert_close(torch.func.hessian(ours)(logits).double(), expected, rtol=1e-4, atol=1e-5)


# Errors.


def refuse(error, match, target=(0, 1), function="row_stats", **options):
    """The call raises this error."""
    target = torch.tensor(target) if isinstance(target, tuple) else target
    for requires_grad in (False, True):
        logits = torch.randn(2, 3, requires_grad=requires_grad)
        with pytest.raises(error, match=match):
            getattr(cross_entropy, function)(logits, *([] if function == "entropy" else [target]), **options)
            cross_entropy.check_errors()


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        ((), "outputs"),
        (("logsumexp", "logsumexp"), "logsumexp"),
        (("rank", "loss", "rank"), "rank"),
        (("argmax", "perplexity"), "perplexity"),
        (("LOSS",), "LOSS"),
    ],
)
def test_refused_outputs(outputs, named):
    refuse(ValueError, rf"\b{named}\b", outputs=outputs)


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name not in WITHOUT_TARGET])
def test_what_needs_a_target(name):
    refuse(TypeError, "target", None, outputs=(name,))
    refuse(TypeError, "target", None, outputs=("entropy", name))


def test_the_default_outputs_need_a_target():
    refuse(TypeError, "target", None)


@pytest.mark.parametrize("name", OF_INDICES)
def test_what_needs_a_class_index(name):
    refuse(ValueError, rf"\b{name}\b", torch.rand(2, 3), outputs=(name,))
    refuse(ValueError, rf"\b{name}\b", torch.rand(2, 3), outputs=("loss", name, "entropy"))


REFUSED = {name: REFUSED_IN_LOSS[name] for name in OPTIONS} | {"class_dim": [0, 2, -2]}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]], ids=str)
def test_refused_values(argument, value):
    refuse(ValueError, rf"\b{argument}\b", **{argument: value})
    refuse(ValueError, rf"\b{argument}\b", outputs=("loss", "entropy"), **{argument: value})
    if argument in ("valid_classes", "class_dim"):
        for function in ("log_prob", "entropy"):
            refuse(ValueError, rf"\b{argument}\b", function=function, **{argument: value})


@pytest.mark.parametrize("name", ["row_weight", "divisor", "empty", "loss_dtype", "inplace", "softcaps"])
def test_options_of_a_loss_alone(name):
    match = rf"^row_stats\(\) got an unexpected keyword argument '{name}'$"
    refuse(TypeError, match, **{name: 1.0})
    refuse(TypeError, match, outputs=("entropy",), **{name: 1.0})


@pytest.mark.parametrize("temperature", [0, 0.0, -1, -0.5, NAN, -INF, cpu([1.0]), cpu([1.0, 2.0])], ids=str)
@pytest.mark.parametrize("function", ["log_prob", "entropy"])
def test_refused_temperatures(function, temperature):
    refuse(ValueError, r"\btemperature\b", function=function, temperature=temperature)


@pytest.mark.parametrize("kind", ["int64", "int32"])
@pytest.mark.parametrize("columns", [5, 40, 300, 17000])
@pytest.mark.parametrize("name", ["loss", "log_prob", "rank", "correct", "log_prob()"])
def test_target_out_of_bounds(name, columns, kind):
    valid = columns - 2
    logits = torch.randn(3, columns)
    for bad in (valid, columns - 1, columns, -1):
        target = torch.tensor([0, valid - 1, bad], dtype=getattr(torch, kind))
        with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\."):
            if name == "log_prob()":
                cross_entropy.log_prob(logits, target, valid_classes=valid)
            else:
                cross_entropy.row_stats(logits, target, valid_classes=valid, outputs=(name,))
            cross_entropy.check_errors()


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()], ids=str)
def test_target_of_another_shape(shape):
    target = torch.zeros(shape, dtype=torch.long)
    for name in ("loss", *OF_INDICES):
        refuse((ValueError, RuntimeError), ".", target, outputs=(name,))
    refuse((ValueError, RuntimeError), ".", target, function="log_prob")
