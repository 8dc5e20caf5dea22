"""PyTorch's own samples of the function and of the module, run against this package."""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import CrossRefFakeMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal import composite_compliance
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import cross_entropy
from tests.device import DEVICE

OP = copy.copy(next(op for op in op_db if op.name == "nn.functional.cross_entropy"))
OP.op = cross_entropy.cross_entropy
MODULE = next(info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)

DTYPES = sorted(OP.dtypes, key=str)
# Four units in the last place for half types, whose results are rounded once or twice.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}


def samples(dtype, requires_grad=True):
    torch.manual_seed(0)
    return list(OP.sample_inputs(DEVICE, dtype, requires_grad=requires_grad))


@functools.cache
def module_inputs(dtype, training=True):
    torch.manual_seed(0)
    return MODULE.module_inputs_func(MODULE, DEVICE, dtype, True, training)


INDICES = range(len(samples(torch.float64)))
MODULE_INDICES = range(len(module_inputs(torch.float64)))


def to_double(tensor):
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def leaves(sample):
    tensors = [sample.input, *sample.args, *sample.kwargs.values()]
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]


def assert_close(actual, expected, dtype, largest_term=0.0):
    tolerance = TOLERANCE[dtype]
    atol = tolerance * float(expected.detach().abs().max().nan_to_num())
    # Torch's float64 rounds too: by an ulp of a term, of which the sum may cancel.
    atol = max(atol, 4 * torch.finfo(torch.float64).eps * largest_term)
    # The mean over rows that are all ignored, which one of the module's samples is, is NaN.
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=atol, equal_nan=True)


def compare(sample, dtype):
    """Loss and gradients of one sample against torch's in float64, dtypes against torch's own."""
    double = sample.transform(to_double)
    loss = OP.op(sample.input, *sample.args, **sample.kwargs)
    theirs = F.cross_entropy(sample.input, *sample.args, **sample.kwargs)
    expected = F.cross_entropy(double.input, *double.args, **double.kwargs)
    assert loss.dtype == theirs.dtype and loss.shape == theirs.shape
    assert loss.requires_grad == theirs.requires_grad
    assert_close(loss, expected, dtype)
    if not loss.requires_grad:
        return
    upstream = torch.randn(loss.shape).to(dtype)
    grads = torch.autograd.grad(loss, leaves(sample), upstream)
    expected_grads = torch.autograd.grad(expected, leaves(double), upstream.double())
    for leaf, grad, expected_grad in zip(leaves(sample), grads, expected_grads, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert_close(grad, expected_grad, dtype)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype, index, requires_grad):
    compare(samples(dtype, requires_grad)[index], dtype)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous_samples(dtype, index):
    compare(samples(dtype)[index].noncontiguous(), dtype)


def as_function_of_leaves(sample):
    def function(*values):
        replaced = dict(zip(map(id, leaves(sample)), values, strict=True))
        x, *args = (replaced.get(id(t), t) for t in (sample.input, *sample.args))
        return OP.op(x, *args, **{k: replaced.get(id(v), v) for k, v in sample.kwargs.items()})

    return function, tuple(leaves(sample))


@pytest.mark.parametrize("layout", ["contiguous", "noncontiguous"])
@pytest.mark.parametrize("index", INDICES)
def test_gradcheck(index, layout):
    sample = samples(torch.float64)[index]
    if layout == "noncontiguous":
        sample = sample.noncontiguous()
    function, inputs = as_function_of_leaves(sample)
    assert gradcheck(
        function,
        inputs,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("index", INDICES)
def test_gradgradcheck(index):
    function, inputs = as_function_of_leaves(samples(torch.float64)[index])
    assert gradgradcheck(
        function,
        inputs,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@pytest.mark.parametrize("index", INDICES)
def test_composite_compliance(index):
    """With any of the operands a tensor subclass, in all passes."""
    sample = samples(torch.float64)[index]
    args, equal = (sample.input, *sample.args), torch.testing.assert_close
    composite_compliance.check_with_mode(OP.op, args, sample.kwargs, equal)
    composite_compliance.check_all_permutations(OP.op, args, sample.kwargs, equal)
    composite_compliance.check_backward_formula(OP.op, args, sample.kwargs, assert_equal_fn=equal)
    composite_compliance.check_forward_ad_formula(OP.op, args, sample.kwargs, assert_equal_fn=equal)


@pytest.mark.parametrize("index", INDICES)
def test_negative_views(index):
    """Tensors that are stored with the other sign."""
    sample = samples(torch.float64)[index]
    negative = sample.transform(
        lambda t: torch._neg_view(-t.detach()).requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
    )
    assert negative.input.is_neg()
    compare(negative, torch.float64)


@pytest.mark.parametrize("autocast", [False, True], ids=["no autocast", "autocast"])
@pytest.mark.parametrize("index", INDICES)
def test_fake_tensors_are_as_real_ones(index, autocast):
    sample = samples(torch.bfloat16 if autocast else torch.float64)[index]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast), CrossRefFakeMode():
        loss = OP.op(sample.input, *sample.args, **sample.kwargs)
        torch.autograd.grad(loss, leaves(sample), torch.ones_like(loss))


@pytest.mark.parametrize("layout", ["contiguous", "noncontiguous"])
@pytest.mark.parametrize("index", INDICES)
def test_opcheck(index, layout):
    sample = samples(torch.float64)[index]
    if layout == "noncontiguous":
        sample = sample.noncontiguous()
    options = {"weight": None, "reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0} | sample.kwargs
    reduction = torch.nn._reduction.get_enum(options["reduction"])
    args = (sample.input, *sample.args, options["weight"], reduction, options["ignore_index"])
    torch.library.opcheck(torch.ops.cross_entropy.cross_entropy.default, (*args, options["label_smoothing"]))


VMAP_SIZE = 2


def batches(tensor):
    """The tensor alone, and as a batch whose dimension is the first or the last."""
    yield tensor, None
    if isinstance(tensor, torch.Tensor):
        batch = torch.stack([tensor, tensor.flip(0) if tensor.dim() else tensor][:VMAP_SIZE]).detach()
        yield batch, 0
        yield batch.movedim(0, -1), -1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("index", INDICES)
def test_vmap(index, dtype):
    """Of any of the operands, along any dimension, against the loop that it stands for."""
    sample = samples(dtype)[index]
    weight = sample.kwargs.get("weight")
    options = {name: value for name, value in sample.kwargs.items() if name != "weight"}

    def function(x, target, weight):
        return OP.op(x, target, weight, **options)

    for operands in itertools.product(*map(batches, (sample.input.detach(), *sample.args, weight))):
        values, in_dims = zip(*operands, strict=True)
        if not any(dim is not None for dim in in_dims):
            continue
        expected = [
            function(*(t if dim is None else t.select(dim, i) for t, dim in operands)) for i in range(VMAP_SIZE)
        ]
        actual = torch.vmap(function, in_dims)(*values)
        assert actual.dtype == dtype
        assert_close(actual, torch.stack(expected).double(), dtype)


def lazy_clone(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch._lazy_clone(value.detach()).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_on_write_inputs_stay_lazy(dtype, requires_grad, index):
    lazy = samples(dtype, requires_grad)[index].transform(lazy_clone)
    tensors = [lazy.input, *lazy.args, *lazy.kwargs.values()]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    loss = OP.op(lazy.input, *lazy.args, **lazy.kwargs)
    assert all(map(torch._C._is_cow_tensor, tensors))
    if requires_grad:
        upstream = torch._lazy_clone(torch.ones_like(loss))
        inputs = [t for t in tensors if t.requires_grad]
        assert inputs
        torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
        torch.autograd.grad(loss, inputs, upstream)
        assert torch._C._is_cow_tensor(upstream)
        assert all(map(torch._C._is_cow_tensor, tensors))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("index", MODULE_INDICES)
@pytest.mark.parametrize("dtype", [*MODULE.dtypes, torch.bfloat16], ids=str)
def test_module_samples(dtype, index, training):
    module_input = module_inputs(dtype, training)[index]
    made, called = module_input.constructor_input, module_input.forward_input
    ours = cross_entropy.CrossEntropyLoss(*made.args, **made.kwargs).train(training)
    theirs = torch.nn.CrossEntropyLoss(*made.args, **made.kwargs).train(training)
    x, target = called.args

    loss, their_loss = ours(x, target), theirs(x, target)
    assert loss.dtype == their_loss.dtype and loss.shape == their_loss.shape

    theirs = theirs.double()
    double_x, double_target = to_double(x), to_double(target)
    expected = theirs(double_x, double_target)
    assert_close(loss, expected, dtype)

    upstream = torch.ones_like(loss)
    inputs = [t for t in (x, target) if t.is_leaf and t.requires_grad]
    double_inputs = [double_x, double_target][: len(inputs)]
    grads = torch.autograd.grad(loss, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, double_inputs, upstream.double())
    # The gradient of a row that is nearly certain of its class is weight * p - weight.
    weight = made.kwargs.get("weight")
    largest_term = 1.0 if weight is None else float(weight.abs().max())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, dtype, largest_term)


@pytest.mark.parametrize("index", MODULE_INDICES)
def test_module_reference_functions(index):
    module_input = module_inputs(torch.float64)[index]
    made, called = module_input.constructor_input, module_input.forward_input
    module = cross_entropy.CrossEntropyLoss(*made.args, **made.kwargs)
    args = [t.detach() for t in called.args]  # the reference copies them deeply
    assert_close(module(*args), module_input.reference_fn(module, *args), torch.float64)


MODULE_OPTIONS = {
    "default": {},
    "weight": {"weight": torch.tensor([1.0, 2.0, 0.5])},
    "options": {"ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1},
    "legacy": {"size_average": False},
}


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "torch.save": through_file,
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "inplace"])
@pytest.mark.parametrize("options", MODULE_OPTIONS)
@pytest.mark.parametrize("how", COPIES)
def test_module_copies(how, options, inplace):
    module = cross_entropy.CrossEntropyLoss(**MODULE_OPTIONS[options], inplace=inplace)
    copied = COPIES[how](module)
    assert type(copied) is type(module) and copied.inplace is inplace
    assert repr(copied) == repr(module)
    for name in ("ignore_index", "reduction", "label_smoothing"):
        assert getattr(copied, name) == getattr(module, name)
    if module.weight is not None:
        assert copied.weight.data_ptr() != module.weight.data_ptr()
        assert torch.equal(copied.weight, module.weight)
    x, target = torch.randn(4, 3), torch.tensor([0, 2, 0, 1])
    assert torch.equal(copied(x, target), module(x, target))


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("options", MODULE_OPTIONS)
def test_module_state_is_torchs(options):
    ours = cross_entropy.CrossEntropyLoss(**MODULE_OPTIONS[options])
    theirs = torch.nn.CrossEntropyLoss(**MODULE_OPTIONS[options])
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    assert list(ours.parameters()) == []
    assert [name for name, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    for to in (torch.float64, torch.float16, "meta"):
        ours, theirs = ours.to(to), theirs.to(to)
        if theirs.weight is None:
            assert ours.weight is None
        else:
            assert ours.weight.dtype == theirs.weight.dtype
            assert ours.weight.device == theirs.weight.device


@pytest.mark.parametrize("reverse", [False, True])
def test_state_dicts_are_interchangeable(reverse):
    classes = [torch.nn.CrossEntropyLoss, cross_entropy.CrossEntropyLoss]
    source, destination = reversed(classes) if reverse else classes
    weight = torch.tensor([1.0, 2.0, 0.5])
    module = destination(weight=torch.ones(3))
    module.load_state_dict(source(weight=weight).state_dict())
    assert torch.equal(module.weight, weight)
