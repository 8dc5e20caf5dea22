"""Two files of results side by side: what got faster or slower beyond the noise.

A competitor's operation has changed if its median has, by more than a threshold, and the ranges between the quartiles
do not overlap. Times of different days or machines compare better as a ratio to a competitor that has not changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import geometric_mean

from rich.table import Table

from .refusal import Refusal
from .report import shape_text, time_text, title
from .results import Case, Results, Summary, summary


@dataclass(frozen=True)
class Change:
    """A competitor's operation in both files; the summaries are of seconds, or of ratios to the base."""

    case: Case
    peer: str
    operation: str
    before: Summary
    after: Summary

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median

    def verdict(self, threshold: float) -> str:
        if self.ratio > 1 + threshold and self.after.low > self.before.high:
            return "slower"
        if self.ratio < 1 / (1 + threshold) and self.after.high < self.before.low:
            return "faster"
        return ""


def _summary(case: Case, peer: str, operation: str, base: str | None) -> Summary | None:
    entry = case.entry(peer)
    samples = entry.seconds.get(operation) if entry else None
    if not samples:
        return None
    if base is None:
        return summary(samples)
    unit = case.median(base, operation)
    return summary([seconds / unit for seconds in samples]) if unit else None


def changes(before: Results, after: Results, base: str | None = None) -> list[Change]:
    """All that both files have measured; with a base, as ratios to it."""

    def both() -> Iterator[Change]:
        old = {case.key: case for case in before.cases}
        for case in after.cases:
            for entry in case.entries if case.key in old else ():
                for operation in entry.seconds if entry.peer != base else ():
                    was = _summary(old[case.key], entry.peer, operation, base)
                    now = _summary(case, entry.peer, operation, base)
                    if was and now:
                        yield Change(case, entry.peer, operation, was, now)

    found = list(both())
    if not found:
        raise Refusal("the two files have measured nothing in common" + (f" beside {base}" if base else ""))
    return found


def lost(before: Results, after: Results, peer: str) -> list[str]:
    """What a competitor no longer manages: where, and why."""
    found = []
    old = {case.key: case.entry(peer) for case in before.cases}
    for case in after.cases:
        was, now = old.get(case.key), case.entry(peer)
        if was and now and was.status == "measured" != now.status:
            found.append(f"{title(case)}: {now.status}: {now.message}")
    return found


def drift(found: list[Change], peer: str) -> float | None:
    """How the others' times have changed together, the machine's doing rather than theirs; None without others."""
    others = [change.ratio for change in found if change.peer != peer]
    return geometric_mean(others) if others else None


def table(found: list[Change], threshold: float, base: str | None) -> Table:
    unit = f"{{:.3g}} × {base}".format if base else time_text
    result = Table("shape", "dtype", "threads", "competitor", "operation")
    for column in ("before", "after", "after / before", ""):
        result.add_column(column, justify="right")
    for change in found:
        case, verdict = change.case, change.verdict(threshold)
        times = [f"{unit(times.median)} ±{times.spread:.0%}" for times in (change.before, change.after)]
        style = {"slower": "red", "faster": "green"}.get(verdict, "")
        where = [shape_text(case), case.dtype, str(case.threads), change.peer, change.operation]
        result.add_row(*where, *times, f"{change.ratio:.2f}", verdict, style=style)
    return result
