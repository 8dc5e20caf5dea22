"""The registered operators as torch.compile, torch.export and torch.library see them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import cross_entropy
from tests.device import DEVICE, IS_HOST
from tests.observe import LogOperators, allocations

OPERATORS = torch.ops.cross_entropy
NONE, MEAN, SUM = map(torch.nn._reduction.get_enum, ("none", "mean", "sum"))


def operands(shape, soft=False, dtype=torch.float32, requires_grad=False, ignored=-100):
    """Logits, target, weight."""
    logits = torch.randn(shape).to(dtype).requires_grad_(requires_grad)
    weight = torch.rand(shape[1]).add(0.5).to(dtype)
    if soft:
        return logits, torch.rand(shape).to(dtype).requires_grad_(requires_grad), weight.requires_grad_(requires_grad)
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    target.view(-1)[1] = ignored
    return logits, target, weight


# Every operator, with the arguments that its callers give it.

SHAPES = [(6, 9), (2, 5, 3)]


def make_calls():
    for shape, soft, reduction, full in itertools.product(SHAPES, (False, True), (NONE, MEAN), (False, True)):
        x, t, w = operands(shape, soft, torch.bfloat16 if full else torch.float32, requires_grad=True)
        options = reduction, -100, 0.1
        loss, top, total, lse = (r.detach() for r in OPERATORS.forward(x, t, w, *options, full))
        grad_loss = torch.rand_like(loss, requires_grad=True)
        grad_lse = torch.rand_like(lse, requires_grad=True)
        z, q, v = x.detach(), t.detach(), w.detach()
        yield "cross_entropy", (x, t, w if soft else v, *options, full)
        yield "loss", (x, t, w if soft else v, *options, full)
        yield "forward", (x, t, w if soft else v, *options, full)
        yield "row_stats", (x, t, w if soft else v, -100, 0.1)
        if reduction == NONE:
            yield "stats", (6 if soft else 15, x, t, w if soft else v, *options, full)
        yield "divisor", (x, t, w if soft else v, MEAN, -100, 0.1)
        yield "cross_entropy_", (z.clone(), q, v, *options, full)
        nothing = None, top, total, *[None] * 7
        yield "backward", (grad_loss, grad_lse, *nothing[1:], x, t, w if soft else v, *options)
        yield "backward_", (grad_loss.detach(), *nothing, z.clone(), q, v, *options)
        if reduction == MEAN:
            yield "forward_grad", (x, t, w if soft else v, *options, full)
            yield "forward_grad_", (z.clone(), q, v, *options, full)
        if soft:
            yield "target_backward", (grad_loss, *nothing, x, t, w, *options)
            yield "weight_backward", (grad_loss, *nothing, x, t, w, *options)
        scale = torch.tensor(0.5, requires_grad=True)
        beyond = {"row_weight": torch.rand(loss.shape or lse.shape), "logit_scale_tensor": scale, "z_loss": 0.1}
        beyond |= {"softcap": 3.0, "valid_classes": shape[1]} | ({"divisor": 2.5} if reduction == MEAN else {})
        for name, args in (
            ("cross_entropy", (x, t, w if soft else v, *options, full)),
            ("forward", (x, t, w if soft else v, *options, full)),
            *[("forward_grad", (x, t, w if soft else v, *options, full))] * (reduction == MEAN),
            (
                "backward",
                (grad_loss, grad_lse, top, total, None, grad_lse, lse, *[None] * 4, x, t, w if soft else v, *options),
            ),
            ("logit_scale_backward", (grad_loss, *nothing, x, t, w if soft else v, *options)),
        ):
            yield name, args, beyond
    for reduction, reverse in itertools.product((MEAN, NONE), (False, True)):
        z, t = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9, requires_grad=True)
        with_teacher = {"divergence": 2, "reverse": reverse, "teacher_scale": 0.5, "logit_scale": 0.5}
        arguments = None, reduction, -100, 0.0
        loss, *rows = OPERATORS.diverge(z.detach(), t.detach(), *arguments, **with_teacher)
        grads = torch.rand_like(loss, requires_grad=True), None, *rows[:2], None, None, None, *rows[2:], None
        for name in ("cross_entropy", "loss", "diverge", *["forward_grad"] * (reduction == MEAN)):
            yield name, (z, t, *arguments), with_teacher
        for name in ("backward", "target_backward"):
            yield name, (*grads, z, t, *arguments), with_teacher
        yield "cross_entropy_", (torch.randn(6, 9), t.detach(), *arguments), with_teacher
    for reduction, spreads in itertools.product((MEAN, NONE), (False, True)):
        z, t = torch.randn(6, 9, requires_grad=True), torch.randint(9, (6, 4))
        with_picks = {"divergence": 2, "picked": torch.rand(6, 4) / 4, "spreads": spreads, "z_loss": 0.1}
        arguments = None, reduction, -100, 0.0
        loss, *rows, _ = OPERATORS.forward(z.detach(), t, *arguments, **with_picks)
        grads = torch.rand_like(loss, requires_grad=True), None, *rows, *[None] * 7
        for name in ("cross_entropy", "loss", *["forward_grad"] * (reduction == MEAN)):
            yield name, (z, t, *arguments), with_picks
        yield "backward", (*grads, z, t, *arguments), with_picks
        yield "cross_entropy_", (torch.randn(6, 9), t, *arguments), with_picks
    for soft, part in itertools.product((False, True), ({"first_class": 3, "all_classes": 20}, {})):
        x, t, w = operands((6, 9), soft, torch.bfloat16)
        options = NONE, -100, 0.1
        if part:
            yield "shard_state", (True, x, t, w, *options), part
        rows = torch.rand(6, requires_grad=True)
        yield "reduce", (rows, x, t, w, MEAN, -100, 0.1), {"row_weight": torch.rand(6, requires_grad=True)}
    yield "merge_shards", (torch.rand(3, 4, 6), 0.1)
    yield "scale_", (torch.rand(6, 9), torch.tensor(2.0))
    yield "scale_", (torch.rand(6, 9).bfloat16(), torch.tensor(2.0))


CALLS = [(name, args, options[0] if options else {}) for name, args, *options in make_calls()]


def test_every_operator_is_called():
    registered = {
        name.removeprefix("cross_entropy::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("cross_entropy::")
    }
    assert {name for name, *_ in CALLS} == registered


@pytest.mark.parametrize("name, args, options", CALLS, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(CALLS)])
def test_opcheck(name, args, options):
    torch.library.opcheck(getattr(OPERATORS, name).default, args, options)


# torch.compile.


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def frames(function, calls):
    """How often torch.compile translates it."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for args, options in calls:
        compiled(*args, **options).sum().backward()
    return counter.frame_count


SEQUENCES = {
    "batches": [(operands((n, 9), requires_grad=True)[:2], {}) for n in (4, 5, 6, 7, 8)],
    "classes": [(operands((4, n), requires_grad=True)[:2], {}) for n in (9, 10, 11, 12)],
    "inner sizes": [(operands((2, 9, n), requires_grad=True)[:2], {}) for n in (3, 4, 5, 6)],
    "ignored targets": [
        (operands((4, 9), requires_grad=True, ignored=n)[:2], {"ignore_index": n}) for n in (-100, 1, 2, 3)
    ],
    "smoothings": [(operands((4, 9), requires_grad=True)[:2], {"label_smoothing": e}) for e in (0.0, 0.1, 0.2, 0.3)],
    "reductions": [(operands((4, 9), requires_grad=True)[:2], {"reduction": r}) for r in ("mean", "sum", "none")],
    "dtypes": [(operands((4, 9), dtype=d, requires_grad=True)[:2], {}) for d in (torch.float32, torch.bfloat16)],
}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_recompiles_no_more_than_torchs(sequence):
    calls = SEQUENCES[sequence]
    assert frames(cross_entropy.cross_entropy, calls) <= frames(F.cross_entropy, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_results_are_the_eager_ones(reduction, dtype):
    """To the bit."""
    logits, target, weight = operands((7, 33), dtype=dtype, requires_grad=True)
    results = []
    for function in (cross_entropy.cross_entropy, torch.compile(cross_entropy.cross_entropy, fullgraph=True)):
        loss = function(logits, target, weight, reduction=reduction, label_smoothing=0.1)
        results.append((loss, torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))[0]))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_compiled_row_stats():
    logits, target, weight = operands((7, 33))
    eager = cross_entropy.row_stats(logits, target, weight, label_smoothing=0.1)
    compiled = torch.compile(cross_entropy.row_stats, fullgraph=True)(logits, target, weight, label_smoothing=0.1)
    assert isinstance(compiled, cross_entropy.RowStats)
    assert all(map(torch.equal, eager, compiled))


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_autocast(inside):
    logits, target, _ = operands((7, 33), dtype=torch.bfloat16, requires_grad=True)

    def function(logits, target):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=inside):
            return cross_entropy.cross_entropy(logits, target)

    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not inside):
        if not inside:
            function = cross_entropy.cross_entropy
        loss = torch.compile(function, fullgraph=True)(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy.cross_entropy(logits.float(), target))
    loss.backward()


@pytest.mark.skipif(not IS_HOST, reason="counts what the CPU's allocator is asked for")
def test_compiled_inplace_saves_the_gradients_memory():
    leaf, target, _ = operands((64, 3000), requires_grad=True)
    counts = []
    for inplace in (False, True):
        torch._dynamo.reset()

        @torch.compile(fullgraph=True)
        def loss_of(leaf, inplace=inplace):
            return cross_entropy.cross_entropy(leaf.sin(), target, inplace=inplace)

        loss_of(leaf).backward()
        counts.append(allocations(lambda loss_of=loss_of: torch.autograd.grad(loss_of(leaf), leaf), leaf.nbytes))
    assert counts[1] == counts[0] - 1


def test_compiled_backward_scales_in_place():
    """The gradient that the forward pass has left is scaled by the operator that does nothing for a factor of 1."""
    logits, target, _ = operands((7, 33), requires_grad=True)
    graphs = []

    def keep(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    torch.compile(cross_entropy.cross_entropy, backend=backend, fullgraph=True)(logits, target).backward()
    assert "aten.mul.Tensor" not in graphs[1]


def test_compiled_autograd_of_another_device():
    """It traces with stand-ins for gradients that are on the CPU wherever the tensors are: here on meta."""
    logits = torch.randn(6, 9, device="meta", requires_grad=True)
    target = torch.zeros(6, dtype=torch.int64, device="meta")
    losses = [cross_entropy.cross_entropy(logits, target, reduction=reduction) for reduction in ("mean", "none")]
    for outputs in (("loss", "logsumexp"), ("log_prob", "entropy")):
        losses += cross_entropy.row_stats(logits, target, outputs=outputs)
    with compiled_autograd._enable(lambda graph: graph):
        sum(2 * loss.sum() for loss in losses).backward()
    assert logits.grad.shape == logits.shape


# torch.export: another batch than the one that it was traced with.


def test_exported_for_any_batch():
    class Model(torch.nn.Module):
        def forward(self, logits, target):
            return cross_entropy.CrossEntropyLoss(label_smoothing=0.1)(logits, target)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), operands((6, 9))[:2], dynamic_shapes=({0: batch}, {0: batch}))
    for n in (2, 11):
        logits, target, _ = operands((n, 9))
        expected = cross_entropy.cross_entropy(logits, target, label_smoothing=0.1)
        assert torch.equal(program.module()(logits, target), expected)


# Autocast; CUDA's without a GPU.

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("target", ["indices", *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_gives_the_dtype_of_torchs(device, dtype, target):
    with FakeTensorMode():
        logits = torch.empty(6, 9, device=device, dtype=dtype)
        if target == "indices":
            target = torch.zeros(6, device=device, dtype=torch.int64)
        else:
            target = torch.empty(6, 9, device=device, dtype=target)
        enabled = torch.is_autocast_enabled(device)
        torch.set_autocast_enabled(device, True)
        try:
            loss, theirs = cross_entropy.cross_entropy(logits, target), F.cross_entropy(logits, target)
        finally:
            torch.set_autocast_enabled(device, enabled)
    assert loss.dtype == theirs.dtype and loss.device == theirs.device and loss.shape == theirs.shape


# vmap.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vmap_is_one_call_of_the_kernels(reduction):
    logits, targets = torch.randn(5, 6, 9), torch.randint(9, (5, 6))

    def loss(x, t):
        return cross_entropy.cross_entropy(x, t, reduction=reduction).sum()

    calls = {}
    for name, function in (("loss", loss), ("gradient", torch.func.grad(loss))):
        with LogOperators() as log:
            torch.vmap(function)(logits, targets)
        calls[name] = sorted(name for name in log.names if name.startswith("cross_entropy::"))
    assert calls["loss"] == ["cross_entropy::loss"]
    assert len(calls["gradient"]) <= 3 and "cross_entropy::forward" in calls["gradient"]


INDICES = {
    torch.uint8: ([156, 0, 199, 5], -100),  # the last byte of -100 is 156
    torch.int32: ([7, 0, 199, 5], 7 + 2**32),
    torch.int64: ([7, 0, 199, 5], 7),
}


@pytest.mark.parametrize("dtype", INDICES, ids=str)
def test_index_dtypes_in_transforms(dtype):
    indices, ignored = INDICES[dtype]
    target = torch.tensor([indices, indices[::-1]])
    logits = torch.randn(2, 4, 200, dtype=torch.float64)
    results = []
    for function, indices in ((cross_entropy.cross_entropy, target.to(dtype)), (F.cross_entropy, target)):

        def loss(x, t, function=function):
            return function(x, t, ignore_index=ignored)

        loss_and_gradient = torch.func.grad_and_value(
            lambda x, t, loss=loss: torch.func.grad(loss)(x, t).square().sum()
        )
        results.append([torch.vmap(loss)(logits, indices), *torch.vmap(loss_and_gradient)(logits, indices)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


# TorchScript.


class Scripted(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, logits, target):
        return self.loss(logits, target)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript():
    with pytest.raises(NotImplementedError, match=r"does not support TorchScript.*use torch\.compile"):
        torch.jit.script(Scripted(cross_entropy.CrossEntropyLoss()))
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(cross_entropy.cross_entropy)

    @torch.jit.script
    def operator(logits: torch.Tensor, target: torch.Tensor):
        return torch.ops.cross_entropy.cross_entropy(logits, target, None, 1, -100, 0.0)

    logits, target, _ = operands((6, 9))
    assert torch.equal(operator(logits, target), cross_entropy.cross_entropy(logits, target))
