"""Measures competitors at shapes: checks each against the oracle, then its memory, then all of them in turns."""

import gc
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median_low
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from .inputs import Head, Logits
from .machine import free_memory, threads
from .memory import is_exhausted, peak
from .options import Given, option_errors
from .oracle import TOLERANCE, is_right, loss_errors, step_errors
from .peers import Entrant, Peer
from .refusal import one_line
from .report import title
from .results import Case, Entry, Results
from .shapes import DTYPES
from .timing import Operation, Timed, clock_of, cuda_overhead_clock, take_turns

SEEN_IN_PAGES = 2**20
"""Bytes of logits from which on the CPU an allocation stands out of the process's resident pages."""
MEMORY_CALLS = 3


@dataclass(frozen=True)
class Settings:
    """How long to time each case, and the fewest turns that count."""

    seconds: float
    fewest: int


@dataclass(frozen=True)
class Kind:
    """What a kind of benchmark gives its competitors, and how it checks their results."""

    inputs: Any
    enter: Callable[[Peer, Any], Entrant]
    errors: Callable[[Peer, Any, list[Tensor], tuple[Tensor, ...]], dict[str, float]]
    has_ceilings: bool


KINDS = {
    "run": Kind(Logits, Peer.run, lambda peer, *found: loss_errors(*found), has_ceilings=True),
    "train": Kind(Head, Peer.train, lambda peer, *found: step_errors(*found), has_ceilings=False),
    "options": Kind(Given, Peer.run, option_errors, has_ceilings=True),
}


def too_large(kind: str, case: Case) -> str:
    """Why a case does not fit into memory, empty if it does."""
    needed, free = KINDS[kind].inputs.bytes_needed(case), free_memory(case.device)
    if needed <= free:
        return ""
    return f"{case.shape} in {case.dtype} needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _ceilings(case: Case, inputs: Logits) -> dict[str, Operation]:
    """Reading as many bytes as the logits have, and copying them; float32, whose sum is fastest on a CPU."""
    if case.is_small:
        return {}
    size = max(1, case.logits_bytes // (4 * 4096))
    sources = [torch.ones(size, 4096, device=case.device) for _ in inputs.copies]
    copied = torch.empty_like(sources[0])
    return {
        "read": Operation(lambda call: sources[call % len(sources)].sum(1)),
        "copy": Operation(lambda call: copied.copy_(sources[call % len(sources)])),
    }


class Screen(Progress):
    """What runs, what is left, and for how long."""

    def __init__(self, cases: int, **options: Any) -> None:
        columns = [BarColumn(), TextColumn("{task.description}"), TextColumn("left:"), TimeRemainingColumn()]
        super().__init__(*columns, TimeElapsedColumn(), **options)
        self.bar = self.add_task("starting", total=cases)
        self.done = 0

    def show(self, case: Case, what: str, part: float) -> None:
        """What runs now, when this part of the case is done."""
        text = f"case {self.done + 1} of {self.tasks[0].total:.0f}: {title(case)}: {what}"
        self.update(self.bar, completed=self.done + part, description=text)

    def finish_case(self) -> None:
        self.done += 1
        self.update(self.bar, completed=self.done)


CHECKING = 0.4
"""The part of a case's time that checking takes, roughly: compilers run then."""


def measure(
    results: Results,
    cases: Iterable[Case],
    peers: list[Peer],
    settings: Settings,
    screen: Screen,
    finished: Callable[[Case], None],
) -> None:
    """Appends the cases to the results; `finished` gets each, and what an interrupted one has measured."""
    kind = KINDS[results.kind]
    for case in cases:
        try:
            with threads(case.threads) if case.device == "cpu" else nullcontext():
                _measure_case(case, kind, peers, settings, screen)
        finally:
            case.entries = [entry for entry in case.entries if entry.seconds or entry.status != "measured"]
            if case.entries:
                results.cases.append(case)
                finished(case)
        screen.finish_case()


def _measure_case(case: Case, kind: Kind, peers: list[Peer], settings: Settings, screen: Screen) -> None:
    torch._dynamo.reset()  # each case is compiled for its own shape
    inputs = kind.inputs.of(case)
    entrants = {}
    for index, peer in enumerate(peers):
        screen.show(case, f"checking {peer.name}", CHECKING * index / len(peers))
        entry = Entry(peer.name)
        case.entries.append(entry)
        if entrant := _enter(case, kind, peer, inputs, entry):
            entrants[peer.name] = entrant

    timed: dict[tuple[str, str], Timed] = {}
    samples: dict[tuple[str, str], list[float]] = {}
    clock = clock_of(case.device)
    for peer_name, entrant in entrants.items():
        entry = _entry(case, peer_name)
        operations = {name: Timed(operation, clock, inputs.calls) for name, operation in entrant.operations.items()}
        if case.is_small and case.device == "cuda" and "forward" in operations:
            operations["overhead"] = Timed(entrant.operations["forward"], cuda_overhead_clock, inputs.calls)
        for name, operation in operations.items():
            timed[peer_name, name] = operation
            samples[peer_name, name] = entry.seconds.setdefault(name, [])
    for name, ceiling in _ceilings(case, inputs).items() if kind.has_ceilings else ():
        timed["", name] = Timed(ceiling, clock, inputs.calls)
        samples["", name] = case.ceilings.setdefault(name, [])

    def failed(key: tuple[str, str], error: Exception) -> None:
        _fail(_entry(case, key[0]), error, f" ({key[1]})")

    def progress(turn: int, turns: int) -> None:
        what = f"turn {turn} of {turns}" if turn else "warming up"
        screen.show(case, what, CHECKING + (1 - CHECKING) * turn / (turns + 1))

    try:
        take_turns(timed, samples, failed, progress, settings.seconds, settings.fewest)
    finally:
        for entry in case.entries:
            entry.seconds = {name: taken for name, taken in entry.seconds.items() if taken}
        case.ceilings = {name: taken for name, taken in case.ceilings.items() if taken}


def _entry(case: Case, peer: str) -> Entry:
    entry = case.entry(peer)
    assert entry is not None
    return entry


def _enter(case: Case, kind: Kind, peer: Peer, inputs: Any, entry: Entry) -> Entrant | None:
    """The competitor, if its results are right; what is wrong with it goes into its entry."""
    dtype = DTYPES[case.dtype]
    try:
        entrant = kind.enter(peer, inputs)
        entry.errors = kind.errors(peer, inputs, *entrant.result())
        if not is_right(entry.errors, dtype):
            entry.status = "wrong"
            entry.message = f"an error of more than {TOLERANCE[dtype]:g} against the float64 oracle; not timed"
            return None
        for name in ("forward", "both", "step"):
            if name in entrant.operations and (case.device == "cuda" or case.logits_bytes >= SEEN_IN_PAGES):
                _measure_memory(case, entrant.operations[name], name, entry)
    except Exception as error:  # whatever a peer raises is the peer's result
        _fail(entry, error)
        return None
    return entrant


def _measure_memory(case: Case, operation: Operation, name: str, entry: Entry) -> None:
    peaks = []
    for _ in range(MEMORY_CALLS):
        call = partial(operation.run, operation.prepare(0))
        if (measured := peak(case.device, call)) is not None:
            peaks.append(measured)
    if peaks:
        entry.memory[name] = median_low(peaks)


def _fail(entry: Entry, error: Exception, where: str = "") -> None:
    entry.status = "failed"
    entry.message = ("out of memory" if is_exhausted(error) else f"{type(error).__name__}: {one_line(error)}") + where
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
