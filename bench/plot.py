"""Charts of results: bandwidth over the classes, ratios and memory as bars, and a training step's time and memory."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .operators import share
from .refusal import Refusal
from .report import bytes_text, time_text
from .results import CEILING_OF, INPLACE, OURS, Case, Entry, Results

# Okabe and Ito's colours, which all kinds of colour vision tell apart; variants of a competitor share its colour.
_STYLES = {
    OURS: ("#0072B2", "o", ""),
    INPLACE: ("#0072B2", "o", "///"),
    "torch": ("#E69F00", "s", ""),
    "torch-linear": ("#E69F00", "s", "///"),
    "compile": ("#009E73", "^", ""),
    "compile-static": ("#009E73", "v", "///"),
    "compile-autotune": ("#009E73", "<", "..."),
    "liger": ("#D55E00", "D", ""),
    "liger-linear": ("#D55E00", "D", "///"),
    "quack": ("#CC79A7", "P", ""),
    "flash-attn": ("#56B4E9", "X", ""),
    "cut-linear": ("#999999", "*", ""),
    "cut-linear-compile": ("#999999", "*", "///"),
    "trl": ("#000000", "h", ""),
    "jax": ("#56B4E9", "d", ""),
}
# What is in a chart of operators: lines and markers.
_OPERATORS = {
    "forward": "-o",
    "forward with gradient": "--s",
    "backward": "-.^",
    "torch forward": "-o",
    "torch forward + backward": "--s",
}
_RC: dict[Any, Any] = {
    "svg.hashsalt": "cross_entropy",  # the same figures give the same file
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "hatch.color": "white",
    "hatch.linewidth": 0.7,
    "font.size": 9,
}


def _style(peer: str) -> tuple[str, str, str]:
    """Colour, marker, and the hatch of a variant."""
    return _STYLES.get(peer, ("#999999", ".", ""))


def _dtypes(cases: Iterable[Case]) -> list[str]:
    return list(dict.fromkeys(case.dtype for case in cases))


def _handles(axes: Iterable[Axes]) -> dict[str, Artist]:
    """What the legend shows, by its label."""
    found: dict[str, Artist] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    return found


def _figure(panels: int, height: float, made: dict[str, Any], heading: str) -> Figure:
    """An empty figure under a heading and the machine it was made on."""
    figure = Figure(figsize=(2 + 3.2 * panels, height), layout="constrained")
    machine = f"{made.get('gpu') or made.get('cpu')}, torch {made.get('torch')}"
    figure.suptitle(f"{heading}\n{machine}", fontsize=10)
    return figure


def _over_classes(axis: Axes) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:.0f}K" if x >= 1024 else f"{x:.0f}")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)


def _longest(cases: list[Case]) -> list[Case]:
    """Of each number of classes the case with most rows, in the order of the classes."""
    by_classes: dict[int, Case] = {}
    for case in sorted((case for case in cases if len(case.shape) == 2), key=lambda case: case.shape):
        by_classes[case.shape[1]] = case
    return [case for _, case in sorted(by_classes.items())]


def bandwidth(results: Results, cases: list[Case]) -> Figure:
    """GB/s over the classes, a curve for each competitor, the ceiling as a line."""
    dtypes, operations = _dtypes(cases), ["forward", "both"]
    figure = _figure(len(dtypes), 6, results.provenance, "Bytes that have to move, per second")
    axes = figure.subplots(len(operations), len(dtypes), squeeze=False, sharey="row").tolist()
    for row, operation in zip(axes, operations, strict=True):
        for axis, dtype in zip(row, dtypes, strict=True):
            points = [c for c in _longest([c for c in cases if c.dtype == dtype]) if c.ceiling(CEILING_OF[operation])]
            for peer in results.peers():
                curve = [(c.shape[1], rate) for c in points if (rate := c.bandwidth(peer, operation))]
                if curve:
                    color, marker, hatch = _style(peer)
                    axis.plot(
                        [classes for classes, _ in curve],
                        [rate / 1e9 for _, rate in curve],
                        "--" if hatch else "-",
                        color=color,
                        marker=marker,
                        markersize=4,
                        linewidth=2.2 if peer == OURS else 1.2,
                        label=peer,
                    )
            name = CEILING_OF[operation]
            ceiling = [(case.ceiling(name) or 0) / 1e9 for case in points]
            xs = [case.shape[1] for case in points]
            axis.plot(xs, ceiling, ":", color="black", linewidth=1.5, label=f"ceiling: {name}")
            _over_classes(axis)
            axis.set_title(f"{'forward' if operation == 'forward' else 'forward + backward'}, {dtype}")
        row[0].set_ylabel("GB/s")
    for axis in axes[-1]:
        axis.set_xlabel("classes")
    handles = _handles(axis for row in axes for axis in row)
    order = sorted(handles, key=[*results.peers(), "ceiling: read", "ceiling: copy"].index)
    figure.legend([handles[name] for name in order], order, loc="outside right center", frameon=False)
    return figure


def _bars(
    axis: Axes,
    cases: list[Case],
    peers: list[str],
    value: Callable[[Case, Entry], float | None],
    text: Callable[[Case, Entry], str],
) -> None:
    """A group of bars for each case, from the top, each with what it says at its end."""
    height = 0.8 / len(peers)
    longest = 0.0
    for group, case in enumerate(cases):
        for index, peer in enumerate(peers):
            entry = case.entry(peer)
            length = value(case, entry) if entry else None
            where = group + (index - (len(peers) - 1) / 2) * height
            if entry is not None and length is not None:
                color, _, hatch = _style(peer)
                axis.barh(where, length, height * 0.9, color=color, hatch=hatch, linewidth=0, label=peer)
                axis.text(length, where, " " + text(case, entry), va="center", fontsize=7)
                longest = max(longest, length)
            elif entry is not None and entry.status != "measured":
                axis.text(0, where, f" {peer}: {entry.status}", va="center", fontsize=7)
    axis.set_xlim(0, longest * 1.25 or 1)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def _bar_figure(
    results: Results,
    cases: list[Case],
    heading: str,
    unit: str,
    value: Callable[[Case, Entry], float | None],
    text: Callable[[Case, Entry], str],
) -> Figure:
    """A panel of bars for each dtype."""
    dtypes = _dtypes(cases)
    peers = [peer for peer in results.peers() if any((e := c.entry(peer)) and value(c, e) is not None for c in cases)]
    shapes = max(len([case for case in cases if case.dtype == dtype]) for dtype in dtypes)
    height = 1.6 + shapes * (0.25 + 0.16 * len(peers))
    figure = _figure(len(dtypes), height, results.provenance, heading)
    axes = figure.subplots(1, len(dtypes), squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        shown = [case for case in cases if case.dtype == dtype]
        _bars(axis, shown, peers, value, text)
        axis.set_yticks(range(len(shown)), [f"{case.name}\n{case.shape}".strip() for case in shown])
        axis.set_title(dtype)
        axis.set_xlabel(unit)
    handles = _handles(axes)
    order = [peer for peer in peers if peer in handles]
    figure.legend([handles[peer] for peer in order], order, loc="outside lower center", ncols=4, frameon=False)
    return figure


def speedup(results: Results, cases: list[Case]) -> Figure:
    """How many times longer each competitor takes for forward and backward."""

    def ratio(case: Case, entry: Entry) -> float | None:
        return case.ratio(entry.peer, "both")

    heading = "Time of forward + backward (cross_entropy = 1; shorter is faster)"
    return _bar_figure(
        results, cases, heading, f"times as long as {OURS}", ratio, lambda case, entry: f"{ratio(case, entry):.2g}×"
    )


def memory(results: Results, cases: list[Case]) -> Figure:
    """The peak of forward and backward, in parts of the logits' size."""

    def share(case: Case, entry: Entry) -> float | None:
        return entry.memory["both"] / case.logits_bytes if "both" in entry.memory else None

    heading = "Peak memory of forward + backward, beyond the logits"
    return _bar_figure(
        results, cases, heading, "logits = 1", share, lambda case, entry: bytes_text(entry.memory["both"])
    )


def step_time(results: Results, cases: list[Case]) -> Figure:
    """Seconds of a training step."""

    def seconds(case: Case, entry: Entry) -> float | None:
        return entry.median("step")

    heading = "Time of a training step: head, loss, backward"
    return _bar_figure(
        results, cases, heading, "seconds", seconds, lambda case, entry: time_text(entry.median("step") or 0)
    )


def step_memory(results: Results, cases: list[Case]) -> Figure:
    """Bytes at the peak of a training step."""

    def mib(case: Case, entry: Entry) -> float | None:
        return entry.memory["step"] / 2**20 if "step" in entry.memory else None

    heading = "Peak memory of a training step, beyond features and weight"
    return _bar_figure(results, cases, heading, "MiB", mib, lambda case, entry: bytes_text(entry.memory["step"]))


def operators(file: dict[str, Any]) -> Figure:
    """Of a file of bench.gpu_check: what each operator reaches of a copy's bandwidth over the classes, and torch."""
    dtypes = list(dict.fromkeys(result["dtype"] for result in file["results"]))
    figure = _figure(len(dtypes), 3.6, file["provenance"], "Bytes that have to move, per second")
    axes = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        results = sorted((r for r in file["results"] if r["dtype"] == dtype), key=lambda r: r["classes"])
        for name, line in _OPERATORS.items():
            is_torch = name.startswith("torch")
            color = _style("torch" if is_torch else OURS)[0]
            label = name if is_torch else f"{OURS} {name}"
            shares = [100 * share(result, name) for result in results]
            classes = [result["classes"] for result in results]
            axis.plot(classes, shares, line, color=color, markersize=4, linewidth=1.5, label=label)
        axis.axhline(100, linestyle=":", color="black", linewidth=1.5, label="copy on the device")
        _over_classes(axis)
        axis.set_title(dtype)
        axis.set_xlabel("classes")
    axes[0].set_ylabel("% of a copy")
    handles = _handles(axes)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    return figure


CHARTS: dict[str, dict[str, tuple[Callable[[Results, list[Case]], Figure], Callable[[Case], bool]]]] = {
    "run": {
        "bandwidth": (bandwidth, lambda case: bool(case.ceilings) and len(case.shape) == 2),
        "speedup": (speedup, lambda case: case.median(OURS, "both") is not None),
        "memory": (memory, lambda case: any("both" in entry.memory for entry in case.entries)),
    },
    "train": {
        "time": (step_time, lambda case: any(entry.seconds.get("step") for entry in case.entries)),
        "memory": (step_memory, lambda case: any("step" in entry.memory for entry in case.entries)),
    },
    "options": {},
}
"""Each kind's charts, and the cases that have something to show there."""


def draw_operators(file: dict[str, Any], path: Path) -> None:
    """Writes the chart of the operators."""
    with matplotlib.rc_context(_RC):
        _save(operators(file), path)


def _save(figure: Figure, path: Path) -> None:
    """Writes a file that depends on nothing but the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=150, metadata=metadata)  # type: ignore[arg-type]


def draw(
    results: Results, stem: str, into: Path, formats: Iterable[str], names: Iterable[str] | None = None
) -> list[Path]:
    """Writes the charts of these names or all that have something to show, of times one for each number of threads."""
    written = []
    counts = sorted({case.threads for case in results.cases})
    with matplotlib.rc_context(_RC):
        for name in names or CHARTS[results.kind]:
            chart, suits = CHARTS[results.kind][name]
            for count in counts[:1] if name == "memory" else counts:
                cases = [case for case in results.cases if case.threads == count and suits(case)]
                if not cases:
                    continue
                suffix = f"-{count}-threads" if len(counts) > 1 and count > 1 else ""
                for kind in formats:
                    path = into / f"{stem}-{name}{suffix}.{kind}"
                    _save(chart(results, cases), path)
                    written.append(path)
    if not written:
        raise Refusal("there is nothing to draw" + (": no case was measured" if CHARTS[results.kind] else ""))
    return written
