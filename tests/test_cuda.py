"""What only a GPU shows: streams, devices, graphs, the absence of waiting, sizes beyond 32 bits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cross_entropy
from bench.results import load
from tests import reference

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cross_entropy.build_info().cuda is None, reason="needs a GPU and the CUDA kernels"
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A warp or less for a row, a block, a cluster (with the gradient), few rows shared by blocks, classes across rows.
SHAPES = [(33, 100), (9, 1001), (17, 5000), (5, 131072), (1, 300001), (3, 21, 65)]
NONE, SUM = (torch.nn._reduction.get_enum(name) for name in ("none", "sum"))
LONG = 1 << 28  # cycles that a kernel waits, so that whoever does not wait for it comes too early


def make(shape, dtype=torch.float32, device="cuda"):
    logits = torch.randn(shape, device=device).mul(2).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    target.view(-1)[-1:] = -100 if target.numel() > 1 else 0
    return logits, target


def loss_and_grad(logits, target, **options):
    loss = cross_entropy.cross_entropy(logits, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def assert_oracle(logits, target, loss, grad):
    x = logits.detach().cpu().double().requires_grad_()
    with torch.device("cpu"):  # racecheck reports hazards in torch's own maximum on the GPU
        expected = reference.cross_entropy(x, target.cpu())
    relative = max(2 * torch.finfo(logits.dtype).eps, 1e-6 if logits.dtype != torch.float64 else 0)
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=relative, atol=0)
    expected_grad = torch.autograd.grad(expected, x)[0]
    atol = relative * float(expected_grad.abs().max())
    torch.testing.assert_close(grad.cpu().double(), expected_grad, rtol=relative, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regimes(dtype, shape):
    """Every regime once, forward, backward and in place: what compute-sanitizer is run over."""
    logits, target = make(shape, dtype)
    for options in ({}, {"label_smoothing": 0.1, "weight": torch.rand(shape[1], device="cuda").to(dtype)}):
        loss, grad = loss_and_grad(logits, target, **options)
        rows, rows_grad = loss_and_grad(logits, target, reduction="none", **options)
        assert rows.shape == target.shape and rows_grad.shape == grad.shape
        inplace = cross_entropy.cross_entropy(logits * 1, target, inplace=True, **options)
        assert torch.equal(inplace, loss)
        assert torch.equal(torch.autograd.grad(inplace, logits)[0], grad)
        if not options:
            assert_oracle(logits, target, loss, grad)
    probabilities = torch.rand(shape, device="cuda").div(shape[1]).to(dtype).requires_grad_()
    weight = torch.rand(shape[1], device="cuda").to(dtype).requires_grad_()
    loss = cross_entropy.cross_entropy(logits, probabilities, weight)
    torch.autograd.grad(loss, [logits, probabilities, weight])
    cross_entropy.check_errors()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regimes_beyond_torch(dtype, shape):
    """The kernels of the options, the outputs, the teachers and the shards, likewise; other tests have the values."""
    logits, target = make(shape, dtype)
    classes, rows = shape[1], target.shape
    logit_scale = torch.tensor(0.5, device="cuda", requires_grad=True)
    options = {"z_loss": 0.1, "softcap": 20.0, "logit_scale": logit_scale, "valid_classes": classes - 1}
    loss = cross_entropy.cross_entropy(logits, target.clamp(max=classes - 2), **options)
    torch.autograd.grad(2 * loss, [logits, logit_scale])
    outputs = ("loss", "log_prob", "entropy", "argmax", "rank")
    loss, log_prob, entropy, argmax, _ = cross_entropy.row_stats(logits, target, outputs=outputs)
    maximum = logits.detach().cpu().amax(1)  # as in assert_oracle
    assert torch.equal(logits.gather(1, argmax.unsqueeze(1)).squeeze(1).cpu(), maximum)
    torch.autograd.grad(loss.sum() + log_prob.sum() + entropy.sum(), logits)

    teacher = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    for reverse in (False, True):
        loss = cross_entropy.distillation_loss(logits, teacher, target, reverse=reverse, class_dim=1)
        torch.autograd.grad(loss, logits)
        loss = cross_entropy.distillation_loss(logits, teacher, reverse=reverse, class_dim=1)
        torch.autograd.grad(loss, [logits, teacher])
    indices = torch.randint(classes, (*rows, 5), device="cuda").movedim(-1, 1)
    probabilities = torch.rand(indices.shape, device="cuda").to(dtype) / 5
    for rest in ("drop", "spread"):
        loss = cross_entropy.topk_distillation_loss(logits, indices, probabilities, rest=rest, class_dim=1)
        torch.autograd.grad(loss, logits)

    whole = cross_entropy.cross_entropy(logits, target, reduction="none")
    first, states = 0, []
    for part in logits.detach().split([classes // 3, classes - classes // 3], dim=1):
        place = {"first_class": first, "all_classes": classes}
        states.append(torch.ops.cross_entropy.shard_state(True, part, target, None, NONE, -100, 0.0, **place))
        first += part.shape[1]
    merged = torch.ops.cross_entropy.merge_shards(torch.stack(states), 0.0)[0].to(dtype)
    relative = 1e-14 if dtype == torch.float64 else max(2 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(merged, whole.detach(), rtol=relative, atol=0)
    cross_entropy.check_errors()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_another_stream(shape):
    logits, target = make(shape)
    expected = loss_and_grad(logits, target)
    late = torch.zeros_like(logits).requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        with torch.no_grad():
            late.copy_(logits)
        actual = loss_and_grad(late, target)
    stream.synchronize()
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    logits, target = make((9, 1001), device="cuda:1")
    loss, grad = loss_and_grad(logits, target)
    assert loss.device == grad.device == logits.device and torch.cuda.current_device() == 0
    assert_oracle(logits, target, loss, grad)
    target[0] = 5000
    cross_entropy.cross_entropy(logits, target)
    with pytest.raises(IndexError, match="on cuda:1"):
        cross_entropy.check_errors()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nobody_waits(shape):
    """A call returns while an earlier kernel still runs."""
    logits, target = make(shape)
    loss_and_grad(logits, target)
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    loss = cross_entropy.cross_entropy(logits, target)
    loss.backward()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_graph_capture(shape, dtype):
    logits, target = make(shape, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_and_grad(logits, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_grad(logits, target)
    for _ in range(3):
        with torch.no_grad():
            logits.copy_(torch.randn(shape, device="cuda"))
            target.copy_(torch.randint(shape[1], target.shape, device="cuda"))
        graph.replay()
        expected = loss_and_grad(logits, target)
        for ours, theirs in zip(captured, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_graph_reports_bad_targets_at_each_replay():
    logits, target = make((9, 100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy.cross_entropy(logits, target)
    for bad in (100, 12345):
        target[3] = bad
        graph.replay()
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds. It belongs to row 3 "):
            cross_entropy.check_errors()
        assert loss.isnan()
    target[3] = 5
    graph.replay()
    cross_entropy.check_errors()
    assert loss.isfinite()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_every_time(shape):
    logits, target = make(shape)
    loss, grad = loss_and_grad(logits, target)
    for _ in range(100):
        again, grad_again = loss_and_grad(logits, target)
        assert torch.equal(again, loss) and torch.equal(grad_again, grad)


def test_gradient_scaler():
    logits, target = make((64, 1000), torch.float16)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = cross_entropy.cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(scaler.scale(loss), logits)
    x = logits.detach().double().requires_grad_()
    expected = torch.autograd.grad(reference.cross_entropy(x, target), x)[0] * 2**16
    torch.testing.assert_close(grad.double(), expected, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bits", [31, 32])
def test_more_elements_than_bits(bits, inplace):
    classes = 65536 + 8
    rows = 2**bits // classes + 300
    needed = rows * classes * 2 * (1 if inplace else 2) + 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB")
    logits = torch.empty(rows, classes, device="cuda", dtype=torch.bfloat16)
    for part in logits.split(1024):
        part.normal_()
    target = torch.randint(classes, (rows,), device="cuda")
    picked = [0, 2**31 // classes, rows - 1]
    few, few_target = logits[picked].clone().requires_grad_(), target[picked]
    losses = cross_entropy.cross_entropy(logits, target, reduction="none")[picked]
    assert torch.equal(losses, cross_entropy.cross_entropy(few, few_target, reduction="none"))
    sum_of_few = cross_entropy.cross_entropy(few, few_target, reduction="sum")
    if inplace:
        torch.ops.cross_entropy.forward_grad_(logits, target, None, SUM, -100, 0.0, False)
        grad = logits
    else:
        logits.requires_grad_()
        grad = torch.autograd.grad(cross_entropy.cross_entropy(logits, target, reduction="sum"), logits)[0]
    # To one rounding: few rows are shared by more threads, which sum in another order.
    torch.testing.assert_close(grad[picked], torch.autograd.grad(sum_of_few, few)[0], rtol=2**-7, atol=0)


def benchmark(tmp_path, *arguments):
    """The entries of all cases that were measured on the GPU."""
    json = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", *arguments, "--device", "cuda", "--peers", "torch", "--seconds", "0"]
    ran = subprocess.run([*command, "--json", str(json)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    entries = [entry for case in load(json).cases for entry in case.entries]
    assert {entry.status for entry in entries} == {"measured"}
    assert all(entry.memory for entry in entries)
    return entries


def test_benchmark(tmp_path):
    entries = benchmark(tmp_path, "run", "--shape", "32,10", "--shape", "4096,1000", "--shape", "2,21,64,64")
    assert len(entries) == 3 * 2 * 3


def test_benchmark_of_a_training_step(tmp_path):
    entries = benchmark(tmp_path, "train", "--model", "imagenet", "--rows", "512")
    assert len(entries) == 2 * 3
