"""How times are taken: all competitors in one process, taking turns in random order, the median counts."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
QUEUED_CYCLES = 200_000
"""The device waits so long for each call, a tenth of a millisecond or more, while the processor queues it."""


@dataclass(frozen=True)
class Operation:
    """What is timed is `run`, on what `prepare`, which is not timed, made for the call with this number."""

    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda call: call


Clock = Callable[[Operation, int], float]
"""Seconds a call of an operation, of so many that follow each other."""


def cpu_clock(operation: Operation, calls: int) -> float:
    prepared = [operation.prepare(call) for call in range(calls)]
    started = time.perf_counter()
    kept = [operation.run(inputs) for inputs in prepared]
    seconds = time.perf_counter() - started
    del kept  # freeing what a call returned is not its time
    return seconds / calls


CACHES = 2**28
"""Bytes that no device's caches hold."""


@cache
def _in_the_way() -> torch.Tensor:
    return torch.zeros(CACHES // 4, device="cuda")


def read_caches_full() -> None:
    """Whatever ran before has left in them what has to be written yet, which the next call would wait for."""
    _in_the_way().sum()


def cuda_clock(operation: Operation, calls: int) -> float:
    """The device's time. It waits until the calls are queued, so that it never waits between them."""
    prepared = [operation.prepare(call) for call in range(calls)]
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    read_caches_full()
    torch.cuda._sleep(calls * QUEUED_CYCLES)
    started.record()
    kept = [operation.run(inputs) for inputs in prepared]
    ended.record()
    ended.synchronize()
    del kept
    return started.elapsed_time(ended) / 1e3 / calls


def cuda_overhead_clock(operation: Operation, calls: int) -> float:
    """The processor's time until the calls have returned, which does not wait for the device."""
    torch.cuda.synchronize()
    seconds = cpu_clock(operation, calls)
    torch.cuda.synchronize()
    return seconds


def clock_of(device: str) -> Clock:
    return cuda_clock if device == "cuda" else cpu_clock


@dataclass(frozen=True)
class Timed:
    """An operation, the clock to take, and how many calls make a sample."""

    operation: Operation
    clock: Clock
    calls: int = 1

    def sample(self) -> float:
        return round(self.clock(self.operation, self.calls), 10)


def turns_within(seconds: float, one_turn: float, fewest: int) -> int:
    """An odd number of turns, so that the median is one of them: at most 51."""
    turns = min(51, max(fewest, int(seconds / one_turn)))
    return turns if turns % 2 else turns + 1


def take_turns(
    timed: Mapping[Key, Timed],
    samples: Mapping[Key, list[float]],
    failed: Callable[[Key, Exception], None],
    progress: Callable[[int, int], None],
    seconds: float,
    fewest: int,
) -> None:
    """Appends to each one's samples, turn by turn; the first turn warms up and does not count.

    One that raises is reported by `failed` and takes part no longer. `progress(turn, turns)` comes before each turn.
    """
    order = list(timed)
    shuffled = random.Random(0)
    turns = turn = 0
    while turn <= turns:
        progress(turn, turns)
        started = time.perf_counter()
        shuffled.shuffle(order)
        for key in list(order):
            try:
                sample = timed[key].sample()
            except Exception as error:  # whatever a peer raises is the peer's result
                failed(key, error)
                order.remove(key)
                continue
            if turn > 0:
                samples[key].append(sample)
        if turn == 0:
            turns = turns_within(seconds, time.perf_counter() - started, fewest)
        turn += 1
