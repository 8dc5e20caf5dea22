"""Predict the next word of Python code with a neural n-gram: `python -m examples.language_model`.

The text is one that every machine has, the standard library's own sources. With 32000 words to
choose from, the last layer and the loss are nearly all of the work.
"""

import re
import sysconfig
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.training import Task, main

VOCABULARY = 32000
UNKNOWN = 0
CONTEXT = 4
WIDTH = 64

WORD_OR_SYMBOL = re.compile(r"\w+|[^\w\s]")
SKIPPED_FOLDERS = {"dist-packages", "idle_test", "site-packages", "test", "tests"}


def standard_library() -> list[Path]:
    """The sources of Python's standard library, without its tests and what pip installed."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return [file for file in files if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts)]


def read(files: Iterable[Path], numbers: dict[str, int]) -> Tensor:
    """The files' words as numbers; a new word gets the next number."""
    words = array("q")
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        words.extend(numbers.setdefault(w, len(numbers)) for w in WORD_OR_SYMBOL.findall(text))
    return torch.tensor(words)


def by_frequency(training: Tensor, distinct: int) -> Tensor:
    """For each of the distinct words its token: 1 for the most frequent; rare ones are UNKNOWN."""
    order = torch.bincount(training, minlength=distinct).argsort(descending=True, stable=True)
    tokens = torch.empty_like(order)
    tokens[order] = torch.arange(1, distinct + 1)
    tokens[tokens >= VOCABULARY] = UNKNOWN
    return tokens


def examples(tokens: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """The words before, and the word that follows, at every so many places of the text."""
    windows = tokens.unfold(0, CONTEXT + 1, every)
    return windows[:, :-1], windows[:, -1]


def make_task(loss_class: Callable[..., nn.Module], quick: bool) -> Task:
    """Every tenth file is held out; of those, every 20th place is enough to measure accuracy."""
    files = standard_library()[:: 20 if quick else 1]
    numbers: dict[str, int] = {}
    training = read((file for i, file in enumerate(files) if i % 10), numbers)
    held_out = read(files[::10], numbers)
    tokens = by_frequency(training, distinct=len(numbers))
    vocabulary = int(tokens.max()) + 1

    model = nn.Sequential(
        nn.Embedding(vocabulary, WIDTH),
        nn.Flatten(),
        nn.Linear(CONTEXT * WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, vocabulary),
    )
    return Task(
        model=model,
        loss=loss_class(ignore_index=UNKNOWN),
        optimizer=torch.optim.Adagrad(model.parameters(), lr=0.05),
        training=examples(tokens[training], every=1),
        held_out=examples(tokens[held_out], every=20),
        batch_size=512,
        steps=5 if quick else 400,
    )


if __name__ == "__main__":
    main(make_task)
