"""The benchmark's command line, end to end on the CPU."""

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import cli
from bench.peers import PEERS, Peer
from bench.results import INPLACE, OURS, load

ROOT = Path(__file__).parents[1]


def bench(*arguments, **options):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_run_plot_and_compare(tmp_path):
    json, table = tmp_path / "results.json", tmp_path / "results.csv"
    shapes = ["--shape", "8,100", "--shape", "300,5000", "--shape", "2,5,3,7"]
    options = ["--peers", "torch", "--dtype", "float32", "bfloat16", "--threads", 1, "--seconds", 0]
    ran = bench("run", *shapes, *options, "--json", json, "--csv", table)
    assert ran.returncode == 0, ran.stderr
    found = load(json)
    assert [(case.shape, case.dtype) for case in found.cases] == [
        (shape, dtype) for shape in ((8, 100), (300, 5000), (2, 5, 3, 7)) for dtype in ("float32", "bfloat16")
    ]
    for case in found.cases:
        assert [entry.peer for entry in case.entries] == [OURS, INPLACE, "torch"]
        assert all(entry.status == "measured" for entry in case.entries)
        assert case.threads == 1
        assert (set(case.ceilings) == {"read", "copy"}) == (case.shape == (300, 5000))
    assert found.provenance["torch"] == torch.__version__
    assert found.provenance["command"].startswith("python -m bench run --shape 8,100")
    for text in ("(300, 5000) float32, 1 thread", "% read", "N·V·s", "GB/s"):
        assert text in ran.stdout
    assert table.read_text().startswith("device,")

    plotted = bench("plot", json, "--out", tmp_path / "charts", "--format", "svg")
    assert plotted.returncode == 0, plotted.stderr
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {
        f"results-{chart}.svg" for chart in ("bandwidth", "speedup", "memory")
    }

    assert bench("compare", json, json).returncode == 0
    for case in found.cases:
        case.entries[0].seconds = {
            name: [100 * x for x in samples] for name, samples in case.entries[0].seconds.items()
        }
    slower = tmp_path / "slower.json"
    found.save(slower)
    compared = bench("compare", json, slower)
    assert compared.returncode == 1
    assert f"{OURS}: 18 slower and 0 faster" in compared.stdout
    assert bench("compare", slower, json).returncode == 0

    found.cases[0].entries[0].status, found.cases[0].entries[0].message = "failed", "no more"
    found.cases[0].entries[0].seconds = {}
    found.save(slower)
    compared = bench("compare", slower, slower)
    assert compared.returncode == 0
    compared = bench("compare", json, slower, "--threshold", 9)
    assert compared.returncode == 1
    assert f"{OURS} no longer: (8, 100) float32, 1 thread: failed: no more" in compared.stdout


def test_train(tmp_path):
    json = tmp_path / "results.json"
    options = ["--model", "cifar10", "--rows", 16, "--dtype", "float32", "--peers", "torch", "--seconds", 0]
    ran = bench("train", *options, "--json", json)
    assert ran.returncode == 0, ran.stderr
    (case,) = load(json).cases
    assert (case.name, case.shape, case.hidden) == ("cifar10", (16, 10), 512)
    assert {entry.peer: list(entry.seconds) for entry in case.entries} == {
        name: ["step"] for name in (OURS, INPLACE, "torch")
    }


def test_options(tmp_path):
    json = tmp_path / "results.json"
    shapes = ["--shape", "8,10", "--shape", "37,5000", "--dtype", "bfloat16"]
    ran = bench("options", *shapes, "--options", "softcap", "topk", "--seconds", 0, "--json", json)
    assert ran.returncode == 0, ran.stderr
    found = load(json)
    assert [case.shape for case in found.cases] == [(8, 10), (37, 5000)]
    names = [name + who for name in (OURS, "softcap", "topk") for who in ("", " in torch")]
    for case in found.cases:
        assert [entry.peer for entry in case.entries] == names
        assert all(entry.status == "measured" for entry in case.entries)
        assert all(case.ratio(name, operation) for name in names for operation in ("forward", "backward", "both"))
    assert "softcap in torch" in ran.stdout
    drawn = bench("plot", json, "--out", tmp_path)
    assert drawn.returncode == 2
    assert drawn.stderr == "cross-entropy-bench: there is nothing to draw\n"


@pytest.fixture
def interruptible():
    """Whoever runs the tests in the background may have had SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path, monkeypatch, capsys):
    json, calls = tmp_path / "results.json", itertools.count()

    def interrupts(logits, target):
        if len(logits) == 9 and next(calls) == 500:  # a turn has 150 calls of it
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(logits, target)

    monkeypatch.setitem(PEERS, "interrupts", Peer("interrupts", "", loss=lambda: interrupts))
    arguments = ["run", "--shape", "8,10", "--shape", "9,10", "--dtype", "float32", "--peers", "interrupts"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--seconds", "0", "--json", str(json)])
    assert cli.main() == cli.INTERRUPTED
    assert "interrupted; what was measured so far is kept" in capsys.readouterr().out
    first, second = load(json).cases
    assert [len(samples) for samples in first.entries[0].seconds.values()] == [7, 7, 7]
    assert all(2 <= len(samples) <= 3 for entry in second.entries for samples in entry.seconds.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--shape", "12"], "impossible shape '12'"),
        (["run", "--shape", "12,0"], "impossible shape '12,0'"),
        (["run", "--shape", "a,b"], "impossible shape 'a,b'"),
        (["run", "--shape", "10000000,1000000", "--peers", "torch"], "no case fits into memory"),
        (["run", "--shapes", "gpt9"], "unknown shape set 'gpt9'; there are gpt2, "),
        (["run", "--peers", "tensorflow"], "unknown peer 'tensorflow'; there are "),
        (["run", "--dtype", "int8"], "unknown dtype 'int8'; there are float32, "),
        (["run", "--threads", "0"], "--threads 0: this process may use 1 to "),
        (["run", "--seconds", "-1"], "--seconds -1.0"),
        (["run", "--json", "/dev/null/results.json"], "/dev/null"),
        (["train", "--model", "gpt9"], "unknown model 'gpt9'; there are gpt2, "),
        (["train", "--rows", "0"], "--rows 0"),
        (["options", "--options", "hardcap"], "unknown option 'hardcap'; there are cross_entropy, z_loss, "),
        (["options", "--shape", "2,3,4"], "logits of (rows, classes), not (2, 3, 4)"),
        (["plot", "/nowhere.json"], "/nowhere.json: No such file"),
        (["compare", "/nowhere.json", "/nowhere.json"], "/nowhere.json: No such file"),
    ],
)
def test_refusals_are_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert cli.main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("cross-entropy-bench: ")
    assert said in errors
    assert errors.count("\n") == 1


def test_memory_that_runs_out(monkeypatch, capsys):
    monkeypatch.setattr("bench.measure.free_memory", lambda device: 2**80)
    monkeypatch.setattr(sys, "argv", ["bench", "run", "--shape", "10000000,1000000", "--peers", "torch"])
    assert cli.main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("cross-entropy-bench: out of memory: ")
    assert errors.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "run", "--device", "cuda"])
    assert cli.main() == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_what_is_not_installed_is_named():
    code = "import sys; sys.modules['rich'] = None; import bench.__main__ as m; m.main()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == 'cross-entropy-bench needs rich: pip install "cross-entropy[bench]"\n'


def test_gpu_check_can_build_what_it_checks():
    code = "import bench.gpu_check, sys; sys.exit('cross_entropy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_list_of_peers():
    result = bench("peers")
    assert result.returncode == 0, result.stderr
    for name in ("liger", "quack", "flash-attn", "cut-linear", "trl", "jax"):
        assert name in result.stdout


def test_installed_command():
    script = Path(sys.executable).with_name("cross-entropy-bench")
    shown = subprocess.run([script, "--help"], cwd="/", capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == bench("--help").stdout
