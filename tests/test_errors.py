"""Bad calls: the exception class and message of torch.nn.functional, and nothing written."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import cross_entropy
from tests.device import DEFERS_ERRORS

R, L = torch.randn, torch.int64


def z(*shape, dtype=L):
    return torch.zeros(shape, dtype=dtype)


def ok_then(bad, *shape):
    """Class indices, all valid but the last."""
    target = z(*shape)
    target.view(-1)[-1] = bad
    return target


# name: (arguments, keywords); the exception must be torch's word for word.
SAME = {
    # not tensors
    "input is a list": (([1.0, 2.0], z(1)), {}),
    "target is a list": ((R(2, 3), [1, 2]), {}),
    "target is None": ((R(2, 3), None), {}),
    "weight is a list": ((R(2, 3), z(2), [1.0, 2.0, 3.0]), {}),
    # shapes of class indices
    "0-d": ((torch.tensor(1.0), torch.tensor(0)), {}),
    "batch (N, C)": ((R(2, 3), z(3)), {}),
    "batch 3-d": ((R(2, 3, 4), z(3, 4)), {}),
    "batch 4-d": ((R(2, 3, 4, 5), z(3, 4, 5)), {}),
    "batch 5-d": ((R(2, 3, 4, 5, 6), z(3, 4, 5, 6)), {}),
    "spatial 3-d": ((R(2, 3, 4), z(2, 5)), {}),
    "spatial 5-d": ((R(2, 3, 4, 5, 6), z(2, 4, 5, 7)), {}),
    "target (N, 1)": ((R(2, 3), z(2, 1)), {}),
    "rank 3-d": ((R(2, 3, 4), z(2)), {}),
    "rank 4-d": ((R(2, 3, 4, 5), z(2, 4)), {}),
    "rank 5-d": ((R(2, 3, 4, 5, 6), z(2, 4, 5)), {}),
    "(C) with two targets": ((R(3), z(2)), {}),
    "(C) with no target": ((R(3), z(0)), {}),
    "(C) with (1, 1)": ((R(3), z(1, 1)), {}),
    "(N, C) with 0-d target": ((R(2, 3), z()), {}),
    "3-d with 0-d target": ((R(2, 3, 4), z()), {}),
    # shapes of probabilities
    "probabilities of other classes": ((R(2, 3), R(2, 4)), {}),
    "probabilities of other length": ((R(2, 3, 4), R(2, 3, 5)), {}),
    "probabilities of other rank": ((R(2, 3), R(2, 3, 1)), {}),
    # dtypes
    "uint8 target 3-d": ((R(2, 3, 4), z(2, 4, dtype=torch.uint8)), {}),
    "uint8 target 4-d": ((R(2, 3, 4, 4), z(2, 4, 4, dtype=torch.uint8)), {}),
    "complex probabilities": ((R(2, 3), torch.zeros(2, 3, dtype=torch.cfloat)), {}),
    "int64 of the input's shape": ((R(2, 3), z(2, 3)), {}),
    "int32 of the input's shape": ((R(2, 3), z(2, 3, dtype=torch.int32)), {}),
    "int64 of (C)": ((R(3), z(3)), {}),
    "int64 of (1)": ((R(1), z(1)), {}),
    # weight
    "weight of 4": ((R(2, 3), z(2), R(4)), {}),
    "weight (1, C)": ((R(2, 3), z(2), R(1, 3)), {}),
    "weight 0-d": ((R(2, 3), z(2), torch.tensor(1.0)), {}),
    "weight of 4, smoothing": ((R(2, 3), z(2), R(4)), {"label_smoothing": 0.1}),
    "weight float64": ((R(2, 3), z(2), R(3).double()), {}),
    "weight float16": ((R(2, 3), z(2), R(3).half()), {}),
    "weight int64": ((R(2, 3), z(2), z(3)), {}),
    "weight float64, smoothing": ((R(2, 3), z(2), R(3).double()), {"label_smoothing": 0.1}),
    "weight float64 4-d": ((R(2, 3, 4, 4), z(2, 4, 4), R(3).double()), {}),
    "weight of 4, probabilities": ((R(2, 3), R(2, 3), R(4)), {}),
    "weight (1, C), probabilities": ((R(2, 3), R(2, 3), R(1, 3)), {}),
    "weight 0-d, probabilities": ((R(2, 3), R(2, 3), torch.tensor(1.0)), {}),
    # options
    "reduction": ((R(2, 3), z(2)), {"reduction": "bad"}),
    "reduction empty": ((R(2, 3), z(2)), {"reduction": ""}),
    "reduction None": ((R(2, 3), z(2)), {"reduction": None}),
    "reduction upper case": ((R(2, 3), z(2)), {"reduction": "Mean"}),
    "label_smoothing 1.5": ((R(2, 3), z(2)), {"label_smoothing": 1.5}),
    "label_smoothing inf": ((R(2, 3), z(2)), {"label_smoothing": float("inf")}),
    "label_smoothing 1.5, probabilities": ((R(2, 3), R(2, 3)), {"label_smoothing": 1.5}),
    "label_smoothing str": ((R(2, 3), z(2)), {"label_smoothing": "a"}),
    "label_smoothing None": ((R(2, 3), z(2)), {"label_smoothing": None}),
    "ignore_index float": ((R(2, 3), z(2)), {"ignore_index": 1.5}),
    "ignore_index str": ((R(2, 3), z(2)), {"ignore_index": "a"}),
    "ignore_index None": ((R(2, 3), z(2)), {"ignore_index": None}),
    "ignore_index 2**70": ((R(2, 3), z(2)), {"ignore_index": 2**70}),
    "ignore_index 1, probabilities": ((R(2, 3), R(2, 3)), {"ignore_index": 1}),
    "ignore_index 0, probabilities": ((R(2, 3), R(2, 3)), {"ignore_index": 0}),
    # what arguments Python itself refuses
    "no dimensions": ((R(()), R(())), {}),
    "no dimensions, index": ((R(()), z(1)), {}),
    "no dimensions, 0-d index": ((R(()), z()), {}),
    "no arguments": ((), {}),
    "no target": ((R(2, 3),), {}),
    "unknown argument": ((R(2, 3), z(2)), {"dim": 1}),
    "target twice": ((R(2, 3), z(2)), {"target": z(2)}),
    # out of bounds
    "too large": ((R(2, 3), ok_then(7, 2)), {}),
    "first of two": ((R(3, 3), torch.tensor([0, 7, 8])), {}),
    "just too large": ((R(2, 3), ok_then(3, 2)), {}),
    "-1": ((R(2, 3), ok_then(-1, 2)), {}),
    "-100 not ignored": ((R(2, 3), ok_then(-100, 2)), {"ignore_index": 5}),
    "2**32 - 100": ((R(2, 3), ok_then(2**32 - 100, 2)), {}),
    "2**32": ((R(2, 3), ok_then(2**32, 2)), {}),
    "-2**63": ((R(2, 3), ok_then(-(2**63), 2)), {}),
    "uint8": ((R(2, 3), ok_then(255, 2).byte()), {}),
    "uint8 156 is not -100": ((R(2, 3), ok_then(156, 2).byte()), {}),
    "no classes": ((R(2, 0), z(2)), {}),
    "no classes, (0)": ((R(0), z()), {}),
    "float64": ((R(2, 3).double(), ok_then(7, 2)), {}),
    "bfloat16": ((R(2, 3).bfloat16(), ok_then(7, 2)), {}),
    "float16": ((R(2, 3).half(), ok_then(7, 2)), {}),
    "weighted": ((R(2, 3), ok_then(7, 2), torch.ones(3)), {}),
}
RANKS = [((3,), ()), ((5, 3), (5,)), ((2, 3, 4), (2, 4)), ((2, 3, 4, 5), (2, 4, 5))]
RANKS += [((2, 3, 2, 2, 3), (2, 2, 2, 3))]
for shape, rows in RANKS:
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.1):
            for bad in (3, -1, 2**32 - 100):
                options = {"reduction": reduction, "label_smoothing": smoothing}
                name = f"{bad} rank {len(shape)} {reduction} smoothing {smoothing}"
                SAME[name] = (R(shape), ok_then(bad, *rows)), options

# Torch words these as we do since 2.13.
WRONG_INDEX_DTYPES = {
    "int16 target": (z(2, dtype=torch.int16), "Short"),
    "bool target": (z(2, dtype=torch.bool), "Bool"),
    "float target of an index's shape": (torch.zeros(2), "Float"),
}
if torch.__version__ >= (2, 13):
    SAME |= {name: ((R(2, 3), target), {}) for name, (target, _) in WRONG_INDEX_DTYPES.items()}

META = torch.device("meta")
HERE = torch.empty(0).device
# name: (arguments, regex of our message); only the class must be torch's.
SAME_CLASS = {
    "int64 input": ((z(2, 3), z(2)), "\"cross_entropy\" not implemented for 'Long'"),
    "bool input": ((torch.ones(2, 3).bool(), z(2)), "\"cross_entropy\" not implemented for 'Bool'"),
    "complex input": (
        (R(2, 3).cfloat(), z(2)),
        "\"cross_entropy\" not implemented for 'ComplexFloat'",
    ),
    "float8 input": (
        (R(2, 3).to(torch.float8_e4m3fn), z(2)),
        "\"cross_entropy\" not implemented for 'Float8_e4m3fn'",
    ),
    "sparse input": ((torch.eye(3).to_sparse(), z(3)), "Sparse(CPU|CUDA)|dense logits"),
    "input on another device": ((R(2, 3, device=META), z(2)), f"input on meta, target on {HERE}$"),
    "target on another device": ((R(2, 3), z(2).to(META)), f"input on {HERE}, target on meta$"),
    "weight on another device": (
        (R(2, 3), z(2), R(3, device=META)),
        f"input on {HERE}, target on {HERE} and weight on meta$",
    ),
    "weight requires grad": (
        (R(2, 3), z(2), R(3).requires_grad_()),
        "not differentiable with respect to argument 'weight' for class indices",
    ),
    "weight and input require grad": (
        (R(2, 3).requires_grad_(), z(2), R(3).requires_grad_()),
        "not differentiable with respect to argument 'weight' for class indices",
    ),
    "spatial 4-d": (
        (R(2, 3, 4, 5), z(2, 4, 6)),
        r"^Expected target size \[2, 4, 5\], got \[2, 4, 6\]$",
    ),
    "weight of 4, 3-d": (
        (R(2, 3, 4), z(2, 4), R(4)),
        r"either for all 3 classes or no classes but got weight tensor of shape: \[4\]$",
    ),
    "weight of 4, 4-d": (
        (R(2, 3, 4, 5), z(2, 4, 5), R(4)),
        r"either for all 3 classes or no classes but got weight tensor of shape: \[4\]$",
    ),
}
SAME_CLASS |= {
    name: ((R(2, 3), target), f"^expected target dtype to be Long or Byte, but got {dtype}$")
    for name, (target, dtype) in WRONG_INDEX_DTYPES.items()
}


def first_line(error):
    return str(error).split("\n")[0]


def raised(function, arguments, keywords):
    with pytest.raises(Exception) as info:
        function(*arguments, **keywords)
        cross_entropy.check_errors()
    return info.value


def torch_raised(function, arguments, keywords):
    """On the CPU: on a GPU torch's own check of the targets ends the process's use of it."""
    arguments = [value.cpu() if isinstance(value, torch.Tensor) and value.is_cuda else value for value in arguments]
    return raised(function, arguments, keywords)


def assert_same_message(actual, expected):
    # Where the error comes later, it says more than torch's.
    if DEFERS_ERRORS and isinstance(actual, IndexError):
        assert first_line(actual).startswith(first_line(expected))
    else:
        assert first_line(actual) == first_line(expected)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", SAME)
def test_same_error(name, requires_grad):
    arguments, keywords = SAME[name]
    if requires_grad and arguments and isinstance(arguments[0], torch.Tensor):
        arguments = (arguments[0].clone().requires_grad_(), *arguments[1:])
    expected = torch_raised(F.cross_entropy, arguments, keywords)
    actual = raised(cross_entropy.cross_entropy, arguments, keywords)
    assert type(actual) is type(expected)
    assert_same_message(actual, expected)


@pytest.mark.parametrize("name", SAME_CLASS)
def test_same_class(name):
    arguments, pattern = SAME_CLASS[name]
    expected = torch_raised(F.cross_entropy, arguments, {})
    actual = raised(cross_entropy.cross_entropy, arguments, {})
    assert type(actual) is type(expected)
    assert re.search(pattern, first_line(actual))


@pytest.mark.parametrize("name", [name for name in SAME if name != "no arguments"])
def test_module_raises_the_same(name):
    """What the call refuses, the module refuses, except what Python refuses by the signature."""
    arguments, keywords = SAME[name]
    if len(arguments) < 2 or "dim" in keywords or "target" in keywords:
        pytest.raises(TypeError, cross_entropy.CrossEntropyLoss(), *arguments, **keywords)
        return
    logits, target, *weight = arguments
    if weight and not isinstance(weight[0], torch.Tensor):
        with pytest.raises(TypeError):
            cross_entropy.CrossEntropyLoss(*weight, **keywords)
        return
    expected = torch_raised(torch.nn.CrossEntropyLoss(*weight, **keywords).cpu(), (logits, target), {})
    actual = raised(cross_entropy.CrossEntropyLoss(*weight, **keywords), (logits, target), {})
    assert type(actual) is type(expected)
    assert_same_message(actual, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-1, 3, -(2**31), 2**31 - 1])
def test_int32_out_of_bounds(dtype, bad):
    # Torch takes no int32, so that the expected exception is the one of int64.
    target = ok_then(bad, 2)
    expected = torch_raised(F.cross_entropy, (R(2, 3), target), {})
    actual = raised(cross_entropy.cross_entropy, (R(2, 3), target.to(dtype)), {})
    assert type(actual) is type(expected)
    assert_same_message(actual, expected)


@pytest.mark.skipif(DEFERS_ERRORS, reason="there they are reported in no order")
def test_the_first_bad_target_is_named():
    """On the CPU, which looks for them in blocks of 16384 rows."""
    target = torch.zeros(40000, dtype=torch.int64)
    target[[17000, 20000, 39000]] = torch.tensor([7, -5, 8])
    with pytest.raises(IndexError, match=r"^Target 7 is out of bounds\."):
        cross_entropy.cross_entropy(torch.zeros(40000, 3), target)


def test_int32_accepted():
    logits, target = R(4, 3), torch.tensor([0, 2, 1, -100])
    actual = cross_entropy.cross_entropy(logits, target.int())
    torch.testing.assert_close(actual, F.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3,), (64, 10), (2, 40000), (3, 5, 7), (2, 21, 4, 9)])
def test_bad_target_leaves_logits(shape, reduction, inplace, dtype):
    leaf = R(shape).to(dtype).requires_grad_()
    logits = leaf.clone()
    before = logits.detach().clone()
    target = ok_then(10**6, *shape[:1], *shape[2:]) if len(shape) > 1 else torch.tensor(10**6)
    if DEFERS_ERRORS and inplace:
        return  # the gradient is in the logits before the error is known
    for smoothing in (0.0, 0.1):
        with pytest.raises(IndexError, match=r"^Target 1000000 is out of bounds\."):
            cross_entropy.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing, inplace=inplace)
            cross_entropy.check_errors()
    assert torch.equal(logits.detach(), before)
    # The graph is as it was before, too.
    logits.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


WITH_LOGITS = [name for name, (args, _) in SAME.items() if args and torch.is_tensor(args[0])]
if DEFERS_ERRORS:  # the gradient is in the logits before the error is known
    WITH_LOGITS = [
        name for name in WITH_LOGITS if not isinstance(torch_raised(F.cross_entropy, *SAME[name]), IndexError)
    ]


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_bad_call_leaves_logits_inplace(name):
    arguments, keywords = SAME[name]
    logits = arguments[0].clone().requires_grad_() * 1
    before = logits.detach().clone()
    expected = torch_raised(F.cross_entropy, arguments, keywords)
    actual = raised(cross_entropy.cross_entropy, (logits, *arguments[1:]), {**keywords, "inplace": True})
    assert type(actual) is type(expected)
    assert torch.equal(logits.detach(), before)


LEGACY = [
    {"size_average": average, "reduce": reduce} for average in (None, False, True) for reduce in (None, False, True)
] + [{"reduction": "elementwise_mean"}]


@pytest.mark.parametrize("options", LEGACY, ids=str)
def test_deprecated(options):
    logits, target = R(4, 3), torch.tensor([0, 2, 1, 1])

    def call(function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = function(logits, target, **options)
        return loss, [(warning.category, str(warning.message)) for warning in caught]

    expected, expected_warnings = call(F.cross_entropy)
    actual, actual_warnings = call(cross_entropy.cross_entropy)
    assert actual_warnings == expected_warnings
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(
    cross_entropy.build_info().cuda is not None or cross_entropy.build_info().emulated, reason="has the CUDA kernels"
)
def test_cuda_tensors_without_the_cuda_kernels():
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="was built without its CUDA kernels"):
        torch.ops.cross_entropy.loss.default.redispatch(keys, R(2, 3), z(2), None, 1, -100, 0.0, False)
