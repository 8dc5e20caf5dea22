"""The README's figures, made from the result files in bench/results.

A block of the README between `<!-- WHAT FILE -->` and `<!-- end -->` is written by what it names: `provenance`,
`ratios`, `steps` or `options` of a result file, or one of its charts, such as `chart-speedup`; `operators` and
`chart-operators` are of a file of bench.gpu_check.
"""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from .operators import FIGURES, figures
from .options import IN_TORCH
from .refusal import Refusal
from .report import bytes_text, time_text
from .results import OURS, Case, Results, load

CHART = "chart-"
_BLOCK = re.compile(r"(<!-- ([\w-]+) (bench/results/[\w.-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def update(root: Path) -> list[Path]:
    """Writes the README and its charts; returns the files that it wrote."""
    from . import plot  # matplotlib is not needed for the rest

    path = root / "README.md"
    text = path.read_text()
    written = []
    for _, what, file, _ in _BLOCK.findall(text):
        if what.startswith(CHART):
            name = what.removeprefix(CHART)
            if name == "operators":
                chart = root / _chart(name, file)
                plot.draw_operators(json.loads((root / file).read_text()), chart)
                written.append(chart)
            else:
                written += plot.draw(load(root / file), Path(file).stem, root / "bench/results", ["svg"], [name])
    path.write_text(render(text, root))
    return [path, *written]


def render(text: str, root: Path) -> str:
    """The README with what its blocks should say."""

    def block(match: re.Match[str]) -> str:
        begin, what, file, end = match.groups()
        if what.startswith(CHART):
            name = what.removeprefix(CHART)
            content = f"![{name}]({_chart(name, file)})"
        elif what == "operators":
            content = operators(json.loads((root / file).read_text()))
        else:
            content = _content(what, load(root / file))
        return begin + content + "\n" + end

    return _BLOCK.sub(block, text)


def _chart(name: str, file: str) -> str:
    """Where the chart of a result file is."""
    return f"{file.removesuffix('.json')}-{name}.svg"


def _content(what: str, results: Results) -> str:
    writers = {"provenance": provenance, "ratios": ratios, "steps": steps, "options": options}
    if what not in writers:
        raise Refusal(f"the README asks for {what!r}; there are {', '.join(writers)} and charts")
    return writers[what](results)


def provenance(results: Results) -> str:
    return _provenance(results.provenance)


def _provenance(made: dict[str, Any]) -> str:
    machine = f"{made['gpu']}, driver {made['driver']}" if made.get("gpu") else f"{made['cpu']}, {made['cores']} cores"
    versions = made.get("versions")
    others = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    software = ", ".join([f"torch {made['torch']}", *others])
    where = f"{machine} ({made['instructions']}); {software}; commit {str(made['commit'])[:7]}, {made['date']}"
    return f"{where}:\n\n    {made['command']}"


def _peers(results: Results) -> list[str]:
    return [peer for peer in results.peers() if peer != OURS]


def _table(header: list[str], rows: list[list[str]], text_columns: int) -> str:
    align = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def _cell(case: Case, peer: str) -> str:
    """How many times longer a peer takes, forward and both."""
    entry = case.entry(peer)
    if entry is None:
        return ""
    if entry.status != "measured":
        return entry.status
    return ", ".join(_ratio(case.ratio(peer, operation)) for operation in ("forward", "both"))


def _ratio(ratio: float | None) -> str:
    """Two digits, in bold if the peer is faster."""
    if ratio is None:
        return "–"
    text = f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
    return f"**{text}**" if ratio < 1 else text


def _label(case: Case) -> str:
    return f"{case.name} {case.shape}".strip()


def ratios(results: Results) -> str:
    """Times of forward and of forward + backward, and how many times longer each peer takes for them."""
    header = ["shape", "dtype", "threads", "forward", "of read", "both", "of copy"]
    header += [f"× {peer}" for peer in _peers(results)]
    rows = []
    for case in results.cases:
        row = [_label(case), case.dtype, str(case.threads)]
        for operation in ("forward", "both"):
            seconds, share = case.median(OURS, operation), case.share(OURS, operation)
            row += [time_text(seconds) if seconds else "failed", f"{share:.0%}" if share else ""]
        rows.append(row + [_cell(case, peer) for peer in _peers(results)])
    return _table(header, rows, 2)


def options(results: Results) -> str:
    """How many times as long as without an option it takes with it, forward and both; then torch's operators for it."""
    header = ["option"] + [f"{_label(case)} {case.dtype}" for case in results.cases]
    rows = []
    for name in results.peers():
        if name.endswith(IN_TORCH):
            continue
        row = [name if name != OURS else "none"]
        for case in results.cases:
            cost, in_torch = (
                ", ".join(_ratio(case.ratio(peer, operation, base)) for operation in ("forward", "both"))
                for peer, base in ((name, OURS), (name + IN_TORCH, name))
            )
            row.append(f"{cost}; {in_torch}")
        rows.append(row)
    return _table(header, rows, 1)


def operators(file: dict[str, Any]) -> str:
    """Where the operators' times are from, and for each shape their figures in bfloat16 and float32."""
    dtypes = ("bfloat16", "float32")
    header = ["rows", "classes", *(f"{dtype}: {name}" for dtype in dtypes for name in FIGURES)]

    def shape(result: dict[str, Any]) -> tuple[int, int]:
        return result["classes"], result["rows"]

    lines = []
    for (classes, rows), group in groupby(sorted(file["results"], key=shape), key=shape):
        of = {result["dtype"]: figures(result) for result in group}
        lines.append([str(rows), str(classes), *(cell for dtype in dtypes for cell in of[dtype])])
    return _provenance(file["provenance"]) + "\n\n" + _table(header, lines, 0)


def steps(results: Results) -> str:
    """Time and memory of a training step with each competitor."""
    rows = []
    for case in results.cases:
        for entry in case.entries:
            seconds, memory = entry.median("step"), entry.memory.get("step")
            ratio = case.ratio(entry.peer, "step", "torch")
            rows.append(
                [
                    _label(case),
                    case.dtype,
                    entry.peer,
                    time_text(seconds) if seconds else entry.status,
                    f"{ratio:.2f}" if ratio else "",
                    bytes_text(memory) if memory else "",
                ]
            )
    return _table(["model (rows, classes)", "dtype", "loss", "step", "torch = 1", "peak memory"], rows, 3)
