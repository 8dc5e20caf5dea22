"""The command line: `python -m bench` in a checkout, `cross-entropy-bench` where it is installed."""

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import compare, measure, readme, report
from .machine import ROOT, provenance
from .memory import is_exhausted
from .options import OPTIONS, competitors
from .peers import PEERS, Peer, chosen
from .refusal import Refusal, one_line
from .results import INPLACE, OURS, Case, Results, load
from .shapes import DTYPES, MODELS, SETS, Device, Shape, parse_shape, shapes_of

NamedShape = tuple[str, Shape, int | None]
"""The model, the logits' shape, and the features before the head of a training step."""
INTERRUPTED = 130
"""The exit status of a program that SIGINT ended, by convention."""
WIDTH = 170


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="cross-entropy-bench",
        description="Measures cross_entropy against its peers on this machine. All competitors are checked against a "
        "float64 oracle, then timed in one process in turns; medians count.",
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="time the loss and its gradient", description="Times the loss.")
    _add_shapes(run)
    _add_peers(run)
    _add_common(run)
    run.set_defaults(main=_run)

    train = commands.add_parser(
        "train", help="time a training step", description="Times head, loss and backward() of a model's last layer."
    )
    train.add_argument("--model", nargs="+", metavar="MODEL", help=f"{', '.join(MODELS)}; without: gpt2")
    train.add_argument("--rows", type=int, metavar="N", help="tokens or images of a batch; without: the model's own")
    train.add_argument("--quick", action="store_true", help="a small batch and few steps")
    _add_peers(train)
    _add_common(train)
    train.set_defaults(main=_train)

    options = commands.add_parser(
        "options",
        help="time the options and outputs beyond torch's",
        description="Times the loss with each option against the loss without, and against the same put together from "
        "torch's operators.",
    )
    _add_shapes(options)
    options.add_argument("--options", nargs="+", metavar="OPTION", help=f"{', '.join(OPTIONS)}; without: all")
    _add_common(options)
    options.set_defaults(main=_options)

    plot = commands.add_parser("plot", help="draw charts from result files", description="Draws charts.")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    plot.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="where to; without: here")
    plot.add_argument("--format", nargs="+", choices=["png", "svg"], default=["png", "svg"])
    plot.set_defaults(main=_plot)

    difference = commands.add_parser(
        "compare",
        help="what got faster or slower beyond the noise",
        description="Compares two result files. The exit status is 1 if the competitor got slower or fails, else 0.",
    )
    difference.add_argument("before", type=Path)
    difference.add_argument("after", type=Path)
    difference.add_argument("--peer", default=OURS, help=f"whose slowing down counts; without: {OURS}")
    difference.add_argument("--relative-to", metavar="PEER", help="compare ratios to this one's times, not seconds")
    difference.add_argument("--threshold", type=float, default=0.05, help="the least change; without: 0.05, 5 %%")
    difference.set_defaults(main=_compare)

    peers = commands.add_parser("peers", help="list the competitors", description="Lists the competitors.")
    peers.set_defaults(main=_peers)

    figures = commands.add_parser(
        "readme", help="make the README's figures", description="Writes the README's tables and charts, in a checkout."
    )
    figures.set_defaults(main=_readme)
    return main


def _add_shapes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shape", action="append", metavar="N,V", help="of the logits; N,C,d1,… too; may be repeated")
    command.add_argument(
        "--shapes", nargs="+", metavar="SET", help=f"named shapes: {', '.join(SETS)}; without: regimes"
    )
    command.add_argument("--quick", action="store_true", help="less of everything, in under a minute")


def _add_peers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--peers", nargs="+", metavar="PEER", help=f"{', '.join(p for p in PEERS if p not in (OURS, INPLACE))}, or all"
    )


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=["cpu", "cuda"], help="without: cuda if there is one")
    command.add_argument("--dtype", nargs="+", metavar="DTYPE", help=f"{', '.join(DTYPES)}; without: float32 bfloat16")
    command.add_argument("--threads", nargs="+", type=int, metavar="T", help="on the CPU; without: torch's number")
    command.add_argument("--seconds", type=float, metavar="S", help="for timing each case; without: 8")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the provenance")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each median")


def _device(arguments: argparse.Namespace) -> Device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch finds no CUDA device (torch.cuda.is_available() is false)")
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _cases(arguments: argparse.Namespace, device: Device, shapes: list[NamedShape]) -> list[Case]:
    names = arguments.dtype or (["float32"] if arguments.quick else ["float32", "bfloat16"])
    for name in names:
        if name not in DTYPES:
            raise Refusal(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    counts = arguments.threads or [torch.get_num_threads()]
    allowed = len(os.sched_getaffinity(0))
    if device == "cuda":
        counts = counts[:1]
    for count in counts:
        if not 1 <= count <= allowed:
            raise Refusal(f"--threads {count}: this process may use 1 to {allowed}")
    return [
        Case(device, shape, dtype, count, name, hidden)
        for name, shape, hidden in shapes
        for dtype in names
        for count in counts
    ]


def _named_shapes(arguments: argparse.Namespace, device: Device) -> list[NamedShape]:
    sets = arguments.shapes or ([] if arguments.shape else ["quick" if arguments.quick else "regimes"])
    shapes: list[NamedShape] = [("", parse_shape(text), None) for text in arguments.shape or ()]
    return shapes + [
        (name if name in MODELS else "", shape, None) for name in sets for shape in shapes_of(name, device)
    ]


def _run(arguments: argparse.Namespace, console: Console) -> int:
    device = _device(arguments)
    peers, missing = _peers_of("run", arguments, device)
    cases = _cases(arguments, device, _named_shapes(arguments, device))
    return _measure(Results("run", provenance(device), missing), peers, arguments, console, cases)


def _options(arguments: argparse.Namespace, console: Console) -> int:
    device = _device(arguments)
    peers = competitors(arguments.options)
    cases = _cases(arguments, device, _named_shapes(arguments, device))
    for case in cases:
        if len(case.shape) != 2:
            raise Refusal(f"the options are measured with logits of (rows, classes), not {case.shape}")
    return _measure(Results("options", provenance(device)), peers, arguments, console, cases)


def _train(arguments: argparse.Namespace, console: Console) -> int:
    device = _device(arguments)
    if arguments.rows is not None and arguments.rows < 1:
        raise Refusal(f"--rows {arguments.rows}: a batch has at least one row")
    shapes: list[NamedShape] = []
    for name in arguments.model or ["gpt2"]:
        if name not in MODELS:
            raise Refusal(f"unknown model {name!r}; there are {', '.join(MODELS)}")
        model = MODELS[name]
        rows = arguments.rows or (64 if arguments.quick else model.rows(device))
        shapes.append((name, (rows, model.classes), model.hidden))
    peers, missing = _peers_of("train", arguments, device)
    return _measure(
        Results("train", provenance(device), missing), peers, arguments, console, _cases(arguments, device, shapes)
    )


def _peers_of(kind: str, arguments: argparse.Namespace, device: Device) -> tuple[list[Peer], dict[str, str]]:
    names = ["torch", "compile"] if arguments.quick and not arguments.peers else arguments.peers
    return chosen(names, kind, device)


def _measure(
    results: Results, peers: list[Peer], arguments: argparse.Namespace, console: Console, cases: list[Case]
) -> int:
    fitting = []
    for case in cases:
        if reason := measure.too_large(results.kind, case):
            console.print(f"left out: {reason}")
        else:
            fitting.append(case)
    if not fitting:
        raise Refusal("no case fits into memory")
    seconds = arguments.seconds if arguments.seconds is not None else (1.0 if arguments.quick else 8.0)
    if seconds < 0:
        raise Refusal(f"--seconds {seconds}: a time is not negative")
    settings = measure.Settings(seconds, fewest=3 if arguments.quick else 7)

    def save() -> None:
        for path, write in ((arguments.json, results.save), (arguments.csv, results.save_csv)):
            if path:
                write(path)

    save()  # tells now whether it can

    def finished(case: Case) -> None:
        console.print(report.case_table(case))
        save()

    try:
        with measure.Screen(len(fitting), console=console) as screen:
            measure.measure(results, fitting, peers, settings, screen, finished)
    except KeyboardInterrupt:
        console.print("interrupted; what was measured so far is kept")
        return INTERRUPTED
    console.print(report.legend(results))
    return 0


def _plot(arguments: argparse.Namespace, console: Console) -> int:
    try:
        from . import plot
    except ModuleNotFoundError as error:
        raise Refusal(f'{error}: pip install "cross-entropy[bench]"') from error

    for file in arguments.files:
        for path in plot.draw(load(file), file.stem, arguments.out, arguments.format):
            console.print(path)
    return 0


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    base, threshold = arguments.relative_to, arguments.threshold
    before, after = load(arguments.before), load(arguments.after)
    lost = compare.lost(before, after, arguments.peer)
    found = compare.changes(before, after, base)
    if not lost and not any(change.peer == arguments.peer for change in found):
        raise Refusal(f"the two files have nothing in common of {arguments.peer}")
    console.print(compare.table(found, threshold, base))
    if base is None and (drift := compare.drift(found, arguments.peer)):
        console.print(f"the other competitors' times changed by {drift:.2f} together")
    for text in lost:
        console.print(f"{arguments.peer} no longer: {text}")
    verdicts = [change.verdict(threshold) for change in found if change.peer == arguments.peer]
    slower, faster = verdicts.count("slower"), verdicts.count("faster")
    console.print(f"{arguments.peer}: {slower} slower and {faster} faster, by more than {threshold:.0%} and the noise")
    return 1 if slower or lost else 0


def _peers(arguments: argparse.Namespace, console: Console) -> int:
    console.print(report.peers_table())
    return 0


def _readme(arguments: argparse.Namespace, console: Console) -> int:
    for path in readme.update(ROOT):
        console.print(path)
    return 0


def main() -> int:
    arguments = parser().parse_args()
    console = _console()
    try:
        return arguments.main(arguments, console)
    except Refusal as refusal:
        print(f"cross-entropy-bench: {refusal}", file=sys.stderr)
    except OSError as error:
        print(f"cross-entropy-bench: {error.filename}: {error.strerror}", file=sys.stderr)
    except Exception as error:
        if not is_exhausted(error):
            raise
        print(f"cross-entropy-bench: out of memory: {one_line(error)}", file=sys.stderr)
    return 2
