"""What a benchmark measured, and its file.

A file holds every sample, so that whoever reads it can take their own medians, and enough about the machine and the
versions to measure it again.
"""

import csv
import json
import math
import os
import re
from pathlib import Path
from statistics import median, quantiles
from typing import Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import Field

from .refusal import Refusal
from .shapes import DTYPES, SMALL, Device, Shape

OURS = "cross_entropy"
INPLACE = "cross_entropy-inplace"

OPERATIONS = {
    "forward": "the loss without a gradient; of a small shape on the CPU little but the call's overhead",
    "backward": "backward() alone; where the forward pass has made the gradient it only scales it",
    "both": "the loss and backward()",
    "overhead": "the processor's part of a call without a gradient",
    "step": "head, loss and backward()",
}
PASSES = {"forward": 1, "backward": 2, "both": 2}
"""How often an operation has to move the logits' bytes between memory and processor: it reads them, and writes as many
for a gradient. What autograd does besides, and a second read of the logits, is the implementation's choice."""
CEILINGS = {"read": 1, "copy": 2}
"""Likewise for the ceilings: torch's sum over as many bytes as the logits have, and a copy of as many."""
CEILING_OF = {"forward": "read", "backward": "copy", "both": "copy"}

_STRICT = ConfigDict(extra="forbid")


class Summary(NamedTuple):
    """Median and quartiles of some samples."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, in parts of the median."""
        return (self.high - self.low) / 2 / self.median


def summary(samples: list[float]) -> Summary:
    if len(samples) < 2:
        return Summary(samples[0], samples[0], samples[0])
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return Summary(median(samples), low, high)


@dataclass(config=_STRICT)
class Entry:
    """One competitor at one case.

    Attributes:
        errors: of the loss and of the gradients, relative to a float64 oracle
        seconds: a call, of each operation; one sample for each turn
        memory: bytes at an operation's peak beyond its inputs; for a training step, beyond the parameters
    """

    peer: str
    status: Literal["measured", "failed", "wrong"] = "measured"
    message: str = ""
    errors: dict[str, float] = Field(default_factory=dict)
    seconds: dict[str, list[float]] = Field(default_factory=dict)
    memory: dict[str, int] = Field(default_factory=dict)

    def median(self, operation: str) -> float | None:
        samples = self.seconds.get(operation)
        return median(samples) if samples else None


@dataclass(config=_STRICT)
class Case:
    """One shape of logits in one dtype on so many threads, and all competitors there.

    Attributes:
        hidden: features before the head of a training step
        ceilings: seconds to read and to copy as many bytes as the logits have; one sample for each turn
    """

    device: Device
    shape: Shape
    dtype: str
    threads: int
    name: str = ""
    hidden: int | None = None
    ceilings: dict[str, list[float]] = Field(default_factory=dict)
    entries: list[Entry] = Field(default_factory=list)

    @property
    def key(self) -> tuple[str, Shape, int | None, str, int]:
        """What makes two files' cases comparable."""
        return self.device, self.shape, self.hidden, self.dtype, self.threads

    @property
    def logits_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def is_small(self) -> bool:
        """Whether a call is bound by what surrounds the kernel."""
        return math.prod(self.shape) <= SMALL

    def entry(self, peer: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.peer == peer), None)

    def median(self, peer: str, operation: str) -> float | None:
        """Median seconds, None where it was not measured."""
        entry = self.entry(peer)
        return entry.median(operation) if entry else None

    def ratio(self, peer: str, operation: str, base: str = OURS) -> float | None:
        """How many times longer a peer takes."""
        theirs, ours = self.median(peer, operation), self.median(base, operation)
        return theirs / ours if theirs and ours else None

    def bandwidth(self, peer: str, operation: str) -> float | None:
        """Bytes a second, of those that have to move."""
        seconds = self.median(peer, operation)
        return PASSES[operation] * self.logits_bytes / seconds if seconds else None

    def ceiling(self, name: str) -> float | None:
        """Bytes a second that the ceiling moves."""
        samples = self.ceilings.get(name)
        return CEILINGS[name] * self.logits_bytes / median(samples) if samples else None

    def share(self, peer: str, operation: str) -> float | None:
        """A competitor's bandwidth in parts of the ceiling's."""
        bandwidth, ceiling = self.bandwidth(peer, operation), self.ceiling(CEILING_OF[operation])
        return bandwidth / ceiling if bandwidth and ceiling else None


@dataclass(config=_STRICT)
class Results:
    """A whole run.

    Attributes:
        missing: peers that could not be imported, and how to install them
    """

    kind: Literal["run", "train", "options"]
    provenance: dict[str, str | int | float | None | dict[str, str]]
    missing: dict[str, str] = Field(default_factory=dict)
    cases: list[Case] = Field(default_factory=list)
    schema: Literal[1] = 1

    def peers(self) -> list[str]:
        """Those in any case, in their order."""
        return list(dict.fromkeys(entry.peer for case in self.cases for entry in case.entries))

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        content = _RESULTS.dump_python(self, mode="json")
        text = json.dumps(content, indent=1)
        on_one_line = re.sub(r"\[[-+\d.e,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
        unfinished.write_text(on_one_line + "\n")
        os.replace(unfinished, path)

    def save_csv(self, path: Path) -> None:
        """One line for each competitor's operation."""
        columns = ["device", "name", "shape", "dtype", "threads", "peer", "status", "message", "loss_error"]
        columns += ["gradient_error", "operation", "samples", "median_s", "low_s", "high_s", "gb_s", "of_ceiling"]
        columns += ["memory_bytes"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for case in self.cases:
                for entry in case.entries:
                    writer.writerows(_rows(case, entry))


def _rows(case: Case, entry: Entry) -> list[dict[str, object]]:
    common: dict[str, object] = {
        "device": case.device,
        "name": case.name,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "threads": case.threads,
        "peer": entry.peer,
        "status": entry.status,
        "message": entry.message,
        "loss_error": entry.errors.get("loss"),
        "gradient_error": entry.errors.get("gradient"),
    }
    rows = []
    for operation, samples in entry.seconds.items():
        times = summary(samples)
        row = {"operation": operation, "samples": len(samples), "memory_bytes": entry.memory.get(operation)}
        row |= {"median_s": times.median, "low_s": times.low, "high_s": times.high}
        if operation in PASSES:
            bandwidth = case.bandwidth(entry.peer, operation)
            row |= {"gb_s": bandwidth and bandwidth / 1e9, "of_ceiling": case.share(entry.peer, operation)}
        rows.append(common | row)
    return rows or [common]


_RESULTS: TypeAdapter[Results] = TypeAdapter(Results)


def load(path: Path) -> Results:
    try:
        return _RESULTS.validate_json(path.read_bytes())
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(f"{path} is not a file of benchmark results: {where or 'JSON'}: {first['msg']}") from error
