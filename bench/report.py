"""What was measured, as tables for a terminal."""

from collections.abc import Callable
from functools import partial

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .peers import PEERS
from .results import CEILING_OF, CEILINGS, OPERATIONS, OURS, PASSES, Case, Entry, Results, summary


def time_text(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def bytes_text(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def shape_text(case: Case) -> str:
    return f"{case.shape} from {case.hidden} features" if case.hidden else str(case.shape)


def title(case: Case) -> str:
    where = case.device if case.device == "cuda" else f"{case.threads} thread{'s' * (case.threads > 1)}"
    return f"{case.name + ' ' if case.name else ''}{shape_text(case)} {case.dtype}, {where}"


def _time(entry: Entry, operation: str) -> str:
    samples = entry.seconds.get(operation)
    if not samples:
        return ""
    times = summary(samples)
    return f"{time_text(times.median)} ±{times.spread:.0%}"


def _bandwidth(case: Case, entry: Entry, operation: str) -> str:
    bandwidth = case.bandwidth(entry.peer, operation)
    return f"{bandwidth / 1e9:.1f}" if bandwidth else ""


def _share(case: Case, entry: Entry, operation: str) -> str:
    share = case.share(entry.peer, operation)
    return f"{share:.0%}" if share else ""


def _ratio(case: Case, entry: Entry, operation: str) -> str:
    ratio = case.ratio(entry.peer, operation)
    return f"{ratio:.2f}" if ratio else ""


def _memory(entry: Entry, operation: str) -> str:
    return bytes_text(entry.memory[operation]) if operation in entry.memory else ""


def case_table(case: Case) -> RenderableType:
    """A line for each competitor: times with the spread, bandwidth, and how many times longer than ours it takes."""
    operations = [name for name in OPERATIONS if any(entry.seconds.get(name) for entry in case.entries)]
    remembered = [name for name in OPERATIONS if any(name in entry.memory for entry in case.entries)]
    columns: list[tuple[str, Callable[[Entry], str]]] = []
    for name in operations:
        columns.append((name, partial(_time, operation=name)))
        if name in ("forward", "both") and case.ceilings:
            columns.append(("GB/s", partial(_bandwidth, case, operation=name)))
            columns.append((f"% {CEILING_OF[name]}", partial(_share, case, operation=name)))
        if name in ("forward", "both", "step"):
            columns.append(("×", partial(_ratio, case, operation=name)))
    for name in remembered:
        columns.append((f"memory, {name}", partial(_memory, operation=name)))
    table = Table(title=title(case), title_justify="left")
    table.add_column("competitor", no_wrap=True)
    for label, _ in columns:
        table.add_column(label, justify="right")
    table.add_column("errors", justify="right")
    for entry in case.entries:
        errors = ", ".join(f"{error:.0e}" for error in entry.errors.values())
        cells = [cell(entry) for _, cell in columns]
        table.add_row(entry.peer, *cells, errors, style="bold" if entry.peer == OURS else "")
    lines = [f"{entry.peer}: {entry.status}: {entry.message}" for entry in case.entries if entry.status != "measured"]
    if case.ceilings:
        ceilings = ", ".join(f"{name} {(case.ceiling(name) or 0) / 1e9:.1f} GB/s" for name in case.ceilings)
        lines.append(f"ceilings of this machine, in the same turns: {ceilings}")
    return Group(table, *(Text(line) for line in lines))


def legend(results: Results) -> RenderableType:
    """What the columns mean, and who is missing."""
    lines = [
        "times: median ± half the distance of the quartiles; all competitors in one process, in turns, in random order",
        f"×: how many times as long as {OURS}; errors: relative to float64, of the loss and of the gradient's norm",
    ]
    timed = {name for case in results.cases for entry in case.entries for name in entry.seconds}
    lines += [f"{name}: {what}" for name, what in OPERATIONS.items() if name in timed]
    if results.kind != "train":
        lines += [
            f"GB/s: of the bytes that have to move, with N rows, V classes and s bytes a logit: {_formula('forward')}, "
            f"{_formula('both')}",
            "% read, % copy: in parts of what torch's sum over, or copy of, as many bytes reaches in the same turns; "
            f"the sum moves {CEILINGS['read']}·N·V·s, the copy {CEILINGS['copy']}·N·V·s",
            "memory: at the peak, beyond logits and target",
        ]
    else:
        lines.append("memory: at the peak, beyond features and weight")
    lines += [f"missing: {name}: {how}" for name, how in results.missing.items()]
    return Group(*(Text(line) for line in lines))


def _formula(operation: str) -> str:
    return f"{operation} {PASSES[operation]}·N·V·s"


def peers_table() -> Table:
    """Everybody who can take part."""
    table = Table("peer", "what is measured", "where", "lacks", "here", show_lines=True)
    for peer in PEERS.values():
        kinds = [kind for kind in ("run", "train") if kind == "train" or peer.loss is not None]
        where = f"{', '.join(peer.devices)}; {', '.join(kinds)}" + ("" if peer.default else "; if named")
        missing = peer.missing()
        here = f"missing: {missing}" if missing else "yes"
        table.add_row(peer.name, peer.what, where, peer.lacks or "nothing", here)
    return table
