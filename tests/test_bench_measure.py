"""The benchmark's competitors against an oracle of their own, and how it times them and measures their memory."""

import itertools
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bench import machine, measure, operators, options, peers, timing
from bench.inputs import Head, Logits
from bench.memory import peak
from bench.options import OPTIONS, Given, competitors, option_errors
from bench.oracle import is_right, loss_errors, step_errors
from bench.peers import PEERS, Peer, chosen, on_torch
from bench.refusal import Refusal
from bench.results import INPLACE, OURS, Case, Results
from bench.shapes import DTYPES, MODELS, SETS, parse_shape, shapes_of
from tests import reference

ON_CPU = [name for name, peer in PEERS.items() if "cpu" in peer.devices and not peer.missing()]
LOSSES = [name for name in ON_CPU if PEERS[name].loss is not None]
COMPILED = [name for name in ON_CPU if name.startswith("compile")]


def case(shape=(37, 101), dtype="float32", **options):
    return Case("cpu", shape, dtype, torch.get_num_threads(), **options)


def test_continuous_integration_has_the_peers_that_it_can_have():
    assert {OURS, INPLACE, "torch", "compile", "compile-static", "compile-autotune", "jax"} <= set(LOSSES)


# Compiling takes long, and the adapters do not look at the dtype.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in LOSSES for dtype in ("float32", "bfloat16", "float16")[: 1 if name in COMPILED else 3]],
)
def test_losses(name, dtype):
    inputs = Logits.of(case(dtype=dtype))
    before = [logits.clone() for logits in inputs.copies]
    entrant = PEERS[name].run(inputs)
    x = inputs.copies[0].double().requires_grad_()
    expected = reference.cross_entropy(x, inputs.target)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    tolerance = 8 * torch.finfo(DTYPES[dtype]).eps
    for _ in range(2):  # a second time after all operations have run, once with several calls
        losses, (gradient,) = entrant.result()
        for loss in losses:
            assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
        torch.testing.assert_close(
            gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance * float(expected_gradient.abs().max())
        )
        assert is_right(loss_errors(inputs, losses, (gradient,)), DTYPES[dtype])
        for operation in entrant.operations.values():
            timing.cpu_clock(operation, 3)
    assert all(map(torch.equal, inputs.copies, before))
    assert "both" in entrant.operations


def reference_of(name, given, x):
    """The loss of an option from the tests' own formulas."""
    scale, cap, zeta = options.LOGIT_SCALE, options.SOFTCAP, options.Z_LOSS
    of_rows = {"row_weight": given.row_weight}
    losses = {
        "z_loss": {"z_loss": zeta},
        "softcap": {"softcap": cap},
        "logit_scale": {"logit_scale": scale},
        "row_weight": of_rows,
        "divisor": {"divisor": given.divisor},
        "valid_classes": {"valid_classes": given.valid_classes},
        "all": of_rows
        | {"z_loss": zeta, "softcap": cap, "logit_scale": scale, "divisor": given.divisor, "label_smoothing": 0.1}
        | {"valid_classes": given.valid_classes},
    }
    match name:
        case "log_prob" | "entropy" | "log_prob+entropy":
            stats = reference.row_stats(x, given.target)
            return sum(stats[output].mean() for output in name.split("+"))
        case "distillation" | "reverse":
            return reference.distillation_loss(x, given.teacher, reverse=name == "reverse")
        case "topk":
            q, indices = given.teacher.double().softmax(1).topk(min(options.PICKS, x.shape[1]), 1)
            return reference.topk_distillation_loss(x, indices, q)
    return reference.cross_entropy(x, given.target, **losses.get(name, {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    given = Given.of(case((37, 301), dtype=dtype))
    x = given.copies[0].double().requires_grad_()
    expected = reference_of(name, given, x)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    tolerance = 8 * torch.finfo(DTYPES[dtype]).eps
    ours, in_torch = (peer for peer in competitors([name]) if peer.name.removesuffix(options.IN_TORCH) == name)
    for peer in (ours, in_torch):
        losses, (gradient,) = peer.run(given).result()
        for loss in losses:
            assert abs(loss.item() - expected.item()) <= tolerance * expected.abs().item()
        torch.testing.assert_close(
            gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance * float(expected_gradient.abs().max())
        )
        assert is_right(option_errors(peer, given, losses, (gradient,)), DTYPES[dtype])
        assert not is_right(option_errors(peer, given, [2 * losses[0]], (gradient,)), DTYPES[dtype])


@pytest.mark.parametrize("name", [OURS, INPLACE, "torch", "jax"])
def test_losses_of_images(name):
    inputs = Logits.of(case((2, 5, 3, 7)))
    assert is_right(loss_errors(inputs, *PEERS[name].run(inputs).result()), torch.float32)


@pytest.mark.parametrize("name", [name for name in ON_CPU if name not in ("compile-static", "compile-autotune")])
def test_steps(name):
    inputs = Head.of(case(hidden=16))
    entrant = PEERS[name].train(inputs)
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    expected = reference.cross_entropy(hidden @ weight.T, inputs.target)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    (operation,) = entrant.operations.values()
    timing.cpu_clock(operation, 2)
    (loss,), found = entrant.result()
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()
    for gradient, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))
    assert is_right(step_errors(inputs, [loss], found), torch.float32)


def test_the_oracle_sees_chunks_as_a_whole(monkeypatch):
    inputs, head = Logits.of(case((2, 5, 3, 7))), Head.of(case(hidden=16))
    results = on_torch(F.cross_entropy, inputs).result(), PEERS["torch"].train(head).result()
    whole = loss_errors(inputs, *results[0]), step_errors(head, *results[1])
    monkeypatch.setattr("bench.oracle.CHUNK", 5 * 3 * 7)
    assert loss_errors(inputs, *results[0]) == pytest.approx(whole[0], rel=1e-3, abs=1e-12)
    assert step_errors(head, *results[1]) == pytest.approx(whole[1], rel=1e-3, abs=1e-12)


def test_underflow_is_no_error_but_loss_is():
    """A mean over so many rows that float16 has three bits of its gradient."""
    inputs = Logits.of(case((2**15, 8), "float16"))
    losses, (gradient,) = PEERS[OURS].run(inputs).result()
    assert float(gradient.abs().max()) < torch.finfo(torch.float16).smallest_normal
    assert is_right(loss_errors(inputs, losses, (gradient,)), torch.float16)
    assert not is_right(loss_errors(inputs, losses, (torch.zeros_like(gradient),)), torch.float16)


WRONG = {
    "loss": lambda logits, target: 1.001 * F.cross_entropy(logits, target),
    "gradient": lambda logits, target: F.cross_entropy(logits, target) + 1e-4 * (logits[0, 0] - logits[0, 0].detach()),
    "nan": lambda logits, target: F.cross_entropy(logits, target) + 0 * logits.mean() / 0,
}


def measured(*competitors, settings=None, cases=None, kind="run"):
    """The entries of one case, by their peers."""
    results = Results(kind, {})
    with measure.Screen(1, disable=True) as screen:
        settings = settings or measure.Settings(seconds=0, fewest=3)
        measure.measure(results, cases or [case()], list(competitors), settings, screen, lambda case: None)
    return {entry.peer: entry for entry in results.cases[0].entries}


def test_wrong_and_failing_peers_are_reported_and_the_others_timed():
    def fails_later(logits, target, calls=itertools.count()):  # noqa: B008
        if next(calls) > 5:
            raise ValueError("no more\nof this")
        return F.cross_entropy(logits, target)

    def fails(logits, target):
        raise torch.OutOfMemoryError("tried to allocate")

    losses = WRONG | {"fails": fails, "fails later": fails_later, "right": F.cross_entropy}
    entries = measured(*(Peer(name, "", loss=lambda loss=loss: loss) for name, loss in losses.items()))
    assert list(entries) == list(losses)
    for name in WRONG:
        assert (entries[name].status, entries[name].seconds) == ("wrong", {})
        assert "float64 oracle" in entries[name].message
    assert math.isnan(entries["nan"].errors["loss"])
    assert (entries["fails"].status, entries["fails"].message) == ("failed", "out of memory")
    assert entries["fails later"].status == "failed"
    assert entries["fails later"].message.startswith("ValueError: no more (")
    assert entries["right"].status == "measured"
    assert {name: len(samples) for name, samples in entries["right"].seconds.items()} == {
        "forward": 3,
        "backward": 3,
        "both": 3,
    }


@pytest.mark.parametrize("shape", [(3, 10), (101, 1001)])  # many calls a sample, and one
def test_times_are_of_the_call_alone(monkeypatch, shape):
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))

    def slow(logits, target):
        nonlocal now
        now += 4 if logits.requires_grad else 2
        return F.cross_entropy(logits, target)

    timed = case(shape)
    entry = measured(Peer("slow", "", loss=lambda: slow), cases=[timed])["slow"]
    assert entry.seconds == {"forward": [2, 2, 2], "backward": [0, 0, 0], "both": [4, 4, 4]}
    assert set(timed.ceilings) == (set() if shape == (3, 10) else {"read", "copy"})


def test_turns_are_shuffled_and_the_first_does_not_count():
    calls, samples = [], {name: [] for name in "abc"}
    timed = {
        name: timing.Timed(timing.Operation(lambda call, name=name: calls.append(name)), timing.cpu_clock, 2)
        for name in "abc"
    }
    timing.take_turns(timed, samples, None, lambda turn, turns: None, seconds=0, fewest=21)
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys("abc", 21)
    turns = [tuple(calls[first : first + 6 : 2]) for first in range(0, len(calls), 6)]
    assert len(turns) == 22
    assert len(set(turns)) > 1
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators_one_by_one(dtype):
    found = operators.measure(case(dtype=dtype), seconds=0)
    assert {"copy", "forward", "forward with gradient", "backward", "torch forward"} < set(found)
    assert all(seconds > 0 for seconds in found.values())


class Device(TorchFunctionMode):
    """Stands in for torch.cuda: its tensors are on the CPU, a call takes 2 s, and it writes down what it is asked."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.asked, self.now, self.allocated = [], 0.0, 100
        for name in ("_sleep", "synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: self.asked.append(name))
        monkeypatch.setattr(timing, "read_caches_full", lambda: self.asked.append("read"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.allocated + 7)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    def call(self, _=None):
        self.asked.append("call")
        self.now += 2


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.asked.append("record")
        self.time = self.device.now

    def synchronize(self):
        self.device.asked.append("wait")

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def test_the_device_waits_until_its_calls_are_queued(monkeypatch):
    device = Device(monkeypatch)
    operation = timing.Operation(device.call, prepare=lambda call: device.asked.append("prepare"))
    assert timing.cuda_clock(operation, 3) == 2
    assert device.asked == [*["prepare"] * 3, "read", "_sleep", "record", *["call"] * 3, "record", "wait"]
    device.asked.clear()
    timing.cuda_overhead_clock(operation, 2)
    assert device.asked == ["synchronize", "prepare", "prepare", "call", "call", "synchronize"]


@pytest.mark.parametrize(
    ("shape", "copies", "calls"),
    # Small calls are bound by the processor; the others take as many copies as the caches cannot hold, at most 8.
    [((32, 10), 8, 50), ((1024, 1024), 8, 8), ((8192, 4096), 2, 2), ((8192, 8192), 1, 1)],
)
def test_inputs_on_cuda(monkeypatch, shape, copies, calls):
    with Device(monkeypatch):
        inputs = Logits.of(Case("cuda", shape, "float32", 1))
    assert (len(inputs.copies), inputs.calls) == (copies, calls)
    assert len({logits.data_ptr() for logits in inputs.copies}) == copies
    assert all(torch.equal(logits, inputs.copies[0]) for logits in inputs.copies)


@pytest.mark.parametrize("shape", [(32, 10), (400, 1000)])
def test_cuda_end_to_end_on_a_stand_in(monkeypatch, shape):
    timed = Case("cuda", shape, "float32", 1)
    with Device(monkeypatch):
        entries = measured(PEERS[OURS], PEERS[INPLACE], PEERS["torch"], cases=[timed])
    small = shape == (32, 10)
    assert {name: (entry.status, set(entry.seconds), entry.memory) for name, entry in entries.items()} == {
        OURS: (
            "measured",
            {"forward", "backward", "both"} | ({"overhead"} if small else set()),
            dict(forward=7, both=7),
        ),
        INPLACE: ("measured", {"both"}, {"both": 7}),
        "torch": (
            "measured",
            {"forward", "backward", "both"} | ({"overhead"} if small else set()),
            dict(forward=7, both=7),
        ),
    }
    assert set(timed.ceilings) == (set() if small else {"read", "copy"})


def test_a_training_step_on_a_stand_in(monkeypatch):
    cases = [Case("cuda", (64, 1000), "float32", 1, hidden=32)]
    peers = [PEERS[name] for name in (OURS, INPLACE, "torch")]
    with Device(monkeypatch):
        entries = measured(*peers, cases=cases, kind="train")
    assert set(entries) == {OURS, INPLACE, "torch"}
    for entry in entries.values():
        assert (entry.status, entry.memory) == ("measured", {"step": 7}), entry
        assert set(entry.seconds) == {"step"}


def test_number_of_turns():
    assert timing.turns_within(seconds=10, one_turn=1, fewest=7) == 11
    assert timing.turns_within(seconds=1, one_turn=1, fewest=7) == 7
    assert timing.turns_within(seconds=10, one_turn=1e-6, fewest=7) == 51


MIB = 2**20


def test_peak_memory():
    def call():
        for size in (80, 50):  # one after the other, so that the larger counts
            torch.ones(size * MIB // 4)
        return torch.ones(30 * MIB // 4)

    assert abs(peak("cpu", call) / MIB - 80) < 8


def test_peak_memory_counts_memory_that_was_kept():
    inputs = Logits.of(case((128, 32768)))
    operation = PEERS[OURS].run(inputs).operations["both"]
    peaks = []
    for _ in range(2):
        leaf = operation.prepare(0)
        peaks.append(peak("cpu", lambda leaf=leaf: operation.run(leaf)) / MIB)
    assert all(abs(found - 16) < 3 for found in peaks), peaks


def cores_of_each_thread():
    return {frozenset(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}


def test_threads_bind_all_that_the_process_runs():
    torch.ones(10**7).sum()  # has threads of its own from here on
    before, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    with machine.threads(1):
        assert torch.get_num_threads() == 1
        (cores,) = cores_of_each_thread()
        assert len(cores) == 1
    assert torch.get_num_threads() == before
    assert cores_of_each_thread() == {frozenset(allowed)}


def test_provenance():
    made = machine.provenance("cpu")
    assert made["torch"] == torch.__version__
    assert made["versions"]["jax"]
    assert made["cores"] == len(os.sched_getaffinity(0))
    assert all(made[name] for name in ("cpu", "memory_gb", "python", "instructions", "command", "date", "compiler"))


def test_missing_peers(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)  # cannot be imported
    found, missing = chosen(None, "run", "cpu")
    assert "jax" not in [peer.name for peer in found]
    assert missing["jax"].startswith("pip install jax optax (")


def test_chosen_peers():
    def names(*arguments):
        return [peer.name for peer in chosen(*arguments)[0]]

    assert names(["torch"], "run", "cpu") == [OURS, INPLACE, "torch"]
    assert "compile-static" not in names(None, "run", "cpu")
    assert "compile-static" in names(["all"], "run", "cpu")
    assert "torch-linear" not in names(["all"], "run", "cpu")
    with pytest.raises(Refusal, match="unknown peer 'tensorflow'; there are"):
        chosen(["tensorflow"], "run", "cpu")
    with pytest.raises(Refusal, match="liger does not take part on cpu"):
        chosen(["liger"], "run", "cpu")
    with pytest.raises(Refusal, match="torch-linear does not take part in run"):
        chosen(["torch-linear"], "run", "cpu")


def test_every_adapter_says_what_it_is():
    for name, peer in PEERS.items():
        assert name == peer.name
        assert peer.what
        assert peer.loss or peer.linear
        assert peer.install or not peer.missing()
        assert peer.devices


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes(device):
    for name in SETS:
        for shape in shapes_of(name, device):
            assert len(shape) >= 2
            assert min(shape) > 0
            assert math.prod(shape) <= (2**31 if device == "cuda" else 2**26), "fits neither in memory nor in the time"
    published = {"gpt2": 50257, "llama3": 128256, "deepseek": 129280, "qwen": 151936, "gemma": 262144}
    assert published.items() <= {name: model.classes for name, model in MODELS.items()}.items()
    assert parse_shape("2,3,4") == (2, 3, 4)


def test_calls_take_the_copies_in_turn():
    inputs = Logits.of(case())
    copies = Logits([inputs.copies[0], inputs.copies[0].clone()], inputs.target)
    forward = on_torch(peers.PEERS["torch"].loss(), copies).operations["forward"]
    assert [copies.logits(call).data_ptr() for call in range(3)] == [
        copies.copies[index].data_ptr() for index in (0, 1, 0)
    ]
    assert forward.prepare(5) == 5
