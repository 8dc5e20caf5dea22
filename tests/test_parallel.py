"""The loss of classes in shards on 2, 3 and 4 processes, which talk by gloo, against the oracle of the whole logits."""

import datetime
import functools
import itertools
import json
import random
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import cross_entropy
from cross_entropy.parallel import vocab_parallel_cross_entropy
from tests import reference
from tests.device import DEVICE
from tests.test_cross_entropy import DTYPES, class_dim
from tests.test_options import NAMES, accumulator, assert_close, make, without_divisor

WORLDS = (2, 3, 4)
Run = Callable[[], None]
CASES: dict[str, Run] = {}


def case(run: Run) -> Run:
    CASES[run.__name__] = run
    return run


def cuts(classes: int, generator: random.Random) -> list[int]:
    """Where each process's classes begin, and where the last ones end; some have none."""
    inner = sorted(generator.choices(range(classes + 1), k=dist.get_world_size() - 1))
    return [0, *inner, classes]


def own_classes(tensor: torch.Tensor, dim: int, at: list[int]) -> torch.Tensor:
    rank = dist.get_rank()
    return tensor.narrow(dim, at[rank], at[rank + 1] - at[rank])


def check(arguments: dict, at: list[int], upstream_seed: int = 0, inplace: bool = False) -> None:
    """Loss and gradients of this process against those of the whole."""
    arguments = dict(arguments)
    logits, target = arguments.pop("input"), arguments.pop("target")
    dim = -1 if arguments.get("class_dim") == -1 else class_dim(logits.shape)
    soft = target.is_floating_point()
    # The gradient of each operand, in float64, by the oracle.
    whole = [logits.double().requires_grad_(), target.double().requires_grad_() if soft else target]
    others = {
        name: arguments[name].detach().double().requires_grad_()
        for name in ("row_weight", "logit_scale")
        if torch.is_tensor(arguments.get(name))
    }
    wanted = [whole[0], *whole[1:] * soft, *others.values()]
    rest = {name: value for name, value in arguments.items() if name != "loss_dtype"}
    expected = reference.cross_entropy(*whole, **rest | others)
    torch.manual_seed(upstream_seed)
    upstream = torch.randn(expected.shape).to(arguments.get("loss_dtype", logits.dtype))
    expected_grads = list(torch.autograd.grad(expected, wanted, upstream.double()))

    local = [own_classes(logits, dim, at).clone().requires_grad_()]
    local += [own_classes(target, dim, at).clone().requires_grad_() if soft else target]
    of_call = {name: arguments[name].detach().clone().requires_grad_() for name in others}
    x = local[0] * 1 if inplace else local[0]
    loss = vocab_parallel_cross_entropy(x, local[1], **arguments | of_call, inplace=inplace)
    accurate = accumulator(logits.dtype)
    assert loss.dtype == upstream.dtype
    assert_close(loss, expected.detach(), accurate)
    same = [torch.empty_like(loss.detach()) for _ in range(dist.get_world_size())]
    dist.all_gather(same, loss.detach())
    assert all(torch.equal(other, loss) for other in same)
    grads = torch.autograd.grad(loss, [local[0], *local[1:] * soft, *of_call.values()], upstream)
    if inplace:
        assert torch.equal(x, grads[0])
    for i in range(1 + soft):
        expected_grads[i] = own_classes(expected_grads[i], dim, at)
    # What differences are of: a probability and (weighted) 1; a row's loss and the mean; the scale's sum of both signs.
    largest = float(logits.abs().nan_to_num().max())
    terms = float(upstream.abs().max()) * (1 + float(expected.detach().abs().max()) + largest * logits.numel() ** 0.5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        if expected_grad.numel():
            assert_close(grad, expected_grad, accurate, 8, terms)


@case
def each_option() -> None:
    generator = random.Random(1)
    for name in [None, *NAMES]:
        for kind in ("int64", "int32", "probabilities"):
            for shape in ((33, 10), (6, 300), (2, 21, 4, 9)):
                dtype = generator.choice(DTYPES)
                reduction = "mean" if name == "divisor" else generator.choice(["mean", "sum", "none"])
                smoothing, weighted = generator.choice([0.0, 0.1]), generator.choice([False, True])
                torch.manual_seed(generator.randrange(1000))
                arguments = make(
                    shape, [name] if name else [], dtype, kind, weighted, smoothing, reduction, seed=generator.random()
                )
                inplace = kind != "probabilities" and generator.choice([False, True])
                check(arguments, cuts(shape[class_dim(shape)], generator), inplace=inplace)


@case
def together() -> None:
    generator = random.Random(2)
    for _ in range(60):
        shape = generator.choice([(7,), (33, 10), (5, 1), (6, 1000), (3, 4, 20), (2, 21, 4, 9), (2, 20001)])
        axes = (DTYPES, ["int64", "int32", "probabilities"], (False, True), (0.0, 0.1), ["mean", "sum", "none"])
        options = [generator.choice(values) for values in axes]
        names = without_divisor([name for name in NAMES if generator.random() < 0.6], options[-1])
        torch.manual_seed(generator.randrange(1000))
        last = generator.random() < 0.4
        arguments = make(shape, names, *options, last=last, seed=generator.random())
        inplace = options[1] != "probabilities" and generator.choice([False, True])
        check(arguments, cuts(shape[class_dim(shape)], generator), inplace=inplace)


@case
def smoothing_is_over_all_classes() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(64, 50) * 3, torch.randint(50, (64,))
    for at in (cuts(50, random.Random(0)), [0] * dist.get_world_size() + [50]):
        loss = vocab_parallel_cross_entropy(own_classes(logits, 1, at), target, label_smoothing=0.3)
        expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.3)
        torch.testing.assert_close(loss, expected)


@case
def every_split() -> None:
    """Of rows of five classes, the target and the largest logit in any of the shards."""
    torch.manual_seed(0)
    logits = torch.eye(5).mul(7).repeat(5, 1) + torch.randn(25, 5)
    target = torch.arange(5).repeat_interleave(5)
    world = dist.get_world_size()
    inner = torch.combinations(torch.arange(6), world - 1, with_replacement=True).view(-1, world - 1)
    for points in inner.tolist():
        check({"input": logits, "target": target, "label_smoothing": 0.1}, [0, *points, 5])


@case
def special_logits() -> None:
    torch.manual_seed(0)
    shape = (40, 11)
    at = cuts(11, random.Random(5))
    logits = torch.randn(shape) * 3
    logits[:, :4] = -torch.inf  # whole shards of them
    logits[3:6] = logits[3:6] + 5e4
    target = torch.randint(4, 11, (40,))
    target[::3] = -100
    logits[::3] = torch.nan
    check({"input": logits, "target": target}, at)
    loss = vocab_parallel_cross_entropy(own_classes(logits, 1, at), target * 0, reduction="none")
    assert loss.isinf().sum() == 26 and loss.isnan().sum() == 14


@case
def all_rows_ignored() -> None:
    at = cuts(9, random.Random(1))
    logits = own_classes(torch.full((5, 9), torch.nan), 1, at).requires_grad_()
    for empty in ("nan", "zero"):
        loss = vocab_parallel_cross_entropy(logits, torch.full((5,), -100), empty=empty)
        assert loss.isnan() if empty == "nan" else loss == 0
        (grad,) = torch.autograd.grad(loss, logits)
        assert empty == "nan" or grad.eq(0).all()


@case
def group_of_some() -> None:
    """The first and the last process are a group of their own."""
    world, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        torch.manual_seed(0)
        logits, target = torch.randn(6, 9), torch.randint(9, (6,))
        local = logits[:, :2] if rank == 0 else logits[:, 2:]
        loss = vocab_parallel_cross_entropy(local, target, group)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))


@case
def autocast() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4).bfloat16(), torch.randint(8, (6,))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = vocab_parallel_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, vocab_parallel_cross_entropy(logits, target, loss_dtype=torch.float32))


def raises(error: type[Exception], match: str, *args, **options) -> None:
    with pytest.raises(error, match=match):
        vocab_parallel_cross_entropy(*args, **options)
        cross_entropy.check_errors()


@case
def errors() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    logits, target = torch.randn(6, 4), torch.randint(4 * world, (6,))
    rows = 6 + (rank == world - 1)
    raises(ValueError, "same rows", torch.randn(rows, 4), torch.zeros(rows, dtype=torch.long))
    raises(ValueError, "same rows", torch.randn(6, 4, dtype=[torch.float32, torch.float64][rank % 2]), target)
    raises(ValueError, "no loss of", torch.zeros(6, 4, dtype=torch.long), target)
    raises(IndexError, "Target 99 is out of bounds", logits, target.index_fill(0, torch.tensor(2), 99))
    raises(IndexError, "out of bounds", logits, target.clamp(max=1) + 4 * world - 2, valid_classes=4 * world - 1)
    raises(ValueError, "batch_size", logits, target[:5])
    raises(RuntimeError, "weight tensor should be defined", logits, target, weight=torch.ones(4))
    raises(NotImplementedError, "weight", logits, target, weight=torch.ones(4 * world, requires_grad=True))
    raises(ValueError, "valid_classes", logits, target, valid_classes=4 * world + 1)
    raises(ValueError, "valid_classes", logits, target, valid_classes=0)
    raises(ValueError, "z_loss", logits, target, z_loss=-1.0)
    raises(ValueError, "softcap", logits, target, softcap=0.0)
    raises(ValueError, "divisor", logits, target, divisor=0.0)
    raises(ValueError, "divisor", logits, target, divisor=torch.tensor(0.0, device="cpu"))
    raises(ValueError, "divisor", logits, target, divisor=2.0, reduction="sum")
    raises(ValueError, "row_weight", logits, target, row_weight=torch.ones(5))
    raises(RuntimeError, "label_smoothing", logits, target, label_smoothing=1.5)
    raises(ValueError, "not a valid value for reduction", logits, target, reduction="batchmean")
    leaf = torch.randn(6, 4, requires_grad=True)
    raises(RuntimeError, "^a leaf Variable", leaf, target, inplace=True)
    raises(RuntimeError, "^a view of a leaf Variable", leaf[:], target, inplace=True)
    raises(RuntimeError, "do not overlap", (leaf * 1)[:, :1].expand(6, 4), target, inplace=True)
    raises(RuntimeError, "gradient of target", leaf * 1, torch.rand(6, 4, requires_grad=True), inplace=True)


@case
def overwritten_logits() -> None:
    """Whoever needs them raises an error; without a gradient they are left alone."""
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4), torch.randint(4 * dist.get_world_size(), (6,))
    for reduction in ("mean", "none"):
        x = logits.clone().requires_grad_() * 1
        square = x.square().sum()
        loss = vocab_parallel_cross_entropy(x, target, reduction=reduction, inplace=True).sum()
        assert torch.equal(x, logits)
        loss.backward(retain_graph=True)
        for late in (loss, square):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                late.backward()
    x = logits.clone()
    vocab_parallel_cross_entropy(x, target, inplace=True)
    with torch.no_grad():
        vocab_parallel_cross_entropy(x.requires_grad_(), target, inplace=True)
    assert torch.equal(x, logits)


# DTensor logits.


def on_mesh(arguments: dict, mesh, placements) -> None:
    """The ordinary function on DTensors against itself on the whole."""
    arguments = dict(arguments)
    logits, target = arguments.pop("input"), arguments.pop("target")
    soft = target.is_floating_point()
    rows = [Replicate() if p.is_shard(class_dim(logits.shape)) else p for p in placements]
    whole = logits.clone().requires_grad_()
    whole_target = target.clone().requires_grad_(soft)
    expected = cross_entropy.cross_entropy(whole * 1, whole_target, **arguments)
    torch.manual_seed(1)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [whole, *[whole_target] * soft], upstream)

    x = distribute_tensor(logits, mesh, placements).requires_grad_()
    t = distribute_tensor(target, mesh, placements if soft else rows).requires_grad_(soft)
    of_mesh = {
        name: distribute_tensor(value, mesh, rows if name == "row_weight" else [Replicate()] * mesh.ndim)
        if torch.is_tensor(value) and value.dim() > 0
        else value
        for name, value in arguments.items()
    }
    loss = cross_entropy.cross_entropy(x * 1, t, **of_mesh)
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-5)
    of_loss = distribute_tensor(upstream, mesh, rows if loss.dim() else [Replicate()] * mesh.ndim)
    grads = torch.autograd.grad(loss, [x, *[t] * soft], of_loss)
    for grad, expected_grad in zip(grads, wanted, strict=True):
        assert list(grad.placements) == placements
        torch.testing.assert_close(grad.full_tensor(), expected_grad, rtol=1e-5, atol=1e-6)


@case
def dtensors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = random.Random(3)
    # Ten and five classes do not divide by all numbers of processes; of one class most have none.
    for shape in ((33, 10), (6, 5), (5, 1), (2, 21, 4, 9)):
        for kind in ("int64", "probabilities"):
            for reduction in ("mean", "sum", "none"):
                for inplace in (False, True):
                    names = without_divisor([name for name in NAMES if generator.random() < 0.4], reduction)
                    torch.manual_seed(generator.randrange(1000))
                    arguments = make(shape, names, torch.float32, kind, True, 0.1, reduction, seed=generator.random())
                    for name in ("input", "target"):
                        if arguments[name].is_floating_point():
                            arguments[name].nan_to_num_(0)
                    if inplace and kind == "int64":
                        arguments["inplace"] = True
                    on_mesh(arguments, mesh, [Shard(1)])


@case
def dtensors_of_rows_and_classes() -> None:
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    generator = random.Random(4)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(1)]):
        for reduction in ("mean", "sum", "none"):
            torch.manual_seed(generator.randrange(1000))
            arguments = make((7, 9), ["z_loss", "row_weight"], reduction=reduction, weighted=True, smoothing=0.1)
            on_mesh(arguments, mesh, placements)


@case
def row_stats_of_dtensors() -> None:
    """All that the operator `forward` gives, of ignored rows too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target = torch.randn(6, 9) * 3, torch.tensor([0, -100, 8, 4, -100, 5])
    for dtype in (torch.float32, torch.float64):
        whole = logits.to(dtype, copy=True).requires_grad_()
        expected = cross_entropy.row_stats(whole, target, label_smoothing=0.1)
        factors = torch.randn(2, 6, dtype=dtype)
        (wanted,) = torch.autograd.grad(expected[1:], whole, list(factors))
        x = distribute_tensor(logits.to(dtype), mesh, [Shard(1)]).requires_grad_()
        stats = cross_entropy.row_stats(x, distribute_tensor(target, mesh, [Replicate()]), label_smoothing=0.1)
        for result, whole_result in zip(stats, expected, strict=True):
            torch.testing.assert_close(result.full_tensor(), whole_result)
        of_rows = [distribute_tensor(factor, mesh, [Replicate()]) for factor in factors]
        (grad,) = torch.autograd.grad(stats[1:], x, of_rows)
        torch.testing.assert_close(grad.full_tensor(), wanted)


@case
def teachers_of_dtensors() -> None:
    """Rows sharded, which are not as many as the processes could share."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, teacher = torch.randn(7, 9), torch.randn(7, 9)
    top = teacher.softmax(1).topk(3)
    for reduction, inplace in itertools.product(("mean", "sum", "none"), (False, True)):
        for loss_of, operands in (
            (cross_entropy.distillation_loss, [teacher]),
            (cross_entropy.topk_distillation_loss, [top.indices, top.values]),
        ):
            options = {"reduction": reduction, "inplace": inplace}
            whole = logits.clone().requires_grad_()
            expected = loss_of(whole * 1, *operands, **options)
            (wanted,) = torch.autograd.grad(expected.sum(), whole)
            x = distribute_tensor(logits, mesh, [Shard(0)]).requires_grad_()
            loss = loss_of(x * 1, *[distribute_tensor(t, mesh, [Shard(0)]) for t in operands], **options)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            torch.testing.assert_close(loss.full_tensor(), expected)
            torch.testing.assert_close(grad.full_tensor(), wanted)


@case
def dtensor_errors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits = distribute_tensor(torch.randn(6, 9), mesh, [Shard(1)])
    target = distribute_tensor(torch.randint(9, (6,)), mesh, [Replicate()])
    with pytest.raises(NotImplementedError, match="sharded over their classes"):
        cross_entropy.row_stats(logits, target, outputs=("entropy",))
    with pytest.raises(NotImplementedError, match="sharded over their classes"):
        cross_entropy.distillation_loss(logits, logits)
    with pytest.raises(NotImplementedError, match="sharded over their classes"):
        picks = [distribute_tensor(t, mesh, [Replicate()]) for t in (torch.zeros(6, 2).long(), torch.zeros(6, 2))]
        cross_entropy.topk_distillation_loss(logits, *picks)
    if dist.get_world_size() == 4:
        twice = init_device_mesh("cpu", (2, 2))
        logits = distribute_tensor(torch.randn(6, 9), twice, [Shard(1), Shard(1)])
        target = distribute_tensor(torch.randint(9, (6,)), twice, [Replicate(), Replicate()])
        with pytest.raises(NotImplementedError, match="more than one mesh dimension"):
            cross_entropy.cross_entropy(logits, target)
    assert isinstance(logits, DTensor)


def run_rank(rank: int, world: int, directory: str) -> None:
    torch.set_default_device(DEVICE)
    torch.set_num_threads(1)
    timeout = datetime.timedelta(minutes=1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world, timeout=timeout)
    found = {}
    for name, run in CASES.items():
        try:
            torch.manual_seed(0)
            run()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
        dist.barrier()
    Path(directory, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@functools.cache
def errors_of_processes(world: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(run_rank, (world, directory), nprocs=world)
        of_ranks = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(world)]
    return {name: "".join(found[name] for found in of_ranks) for name in CASES}


@pytest.mark.skipif(DEVICE != "cpu", reason="processes that talk by gloo, on the CPU")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "world", [pytest.param(world, marks=pytest.mark.xdist_group(f"{world} processes")) for world in WORLDS]
)
def test_parallel(world, name):
    assert errors_of_processes(world)[name] == ""


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone, on the tests' device: of NCCL where that is a GPU."""
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
def test_one_process(alone, kind, reduction):
    mesh = init_device_mesh(DEVICE, (1,))
    for shape in ((33, 10), (3, 20001)):
        arguments = make(shape, without_divisor(NAMES, reduction), torch.float32, kind, True, 0.1, reduction)
        check(arguments, [0, shape[1]])
        for name in ("input", "target"):
            if arguments[name].is_floating_point():
                arguments[name].nan_to_num_(0)
        on_mesh(arguments, mesh, [Shard(1)])
