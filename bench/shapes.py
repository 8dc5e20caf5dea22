"""Shapes to measure: those of real models, and sweeps over the classes.

A shape is that of the logits, (rows, classes) or (N, C, d1, …).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from .refusal import Refusal

Shape = tuple[int, ...]
Device = Literal["cpu", "cuda"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SWEEP = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 50257, 65536, 128256, 151936, 262144]
SMALL = 10**5
"""Up to so many logits a call is bound by what surrounds the kernel."""


@dataclass(frozen=True)
class Model:
    """What a model's last layer makes of `hidden` features, and how many rows a step of training it has."""

    classes: int
    hidden: int
    rows_cuda: int
    rows_cpu: int

    def rows(self, device: str) -> int:
        return self.rows_cuda if device == "cuda" else self.rows_cpu


MODELS = {
    "gpt2": Model(classes=50257, hidden=768, rows_cuda=8192, rows_cpu=512),
    "llama3": Model(classes=128256, hidden=4096, rows_cuda=8192, rows_cpu=256),  # 8B
    "deepseek": Model(classes=129280, hidden=7168, rows_cuda=8192, rows_cpu=256),  # V3
    "qwen": Model(classes=151936, hidden=4096, rows_cuda=8192, rows_cpu=256),  # Qwen3-8B
    "gemma": Model(classes=262144, hidden=1152, rows_cuda=8192, rows_cpu=128),  # Gemma 3 1B
    "imagenet": Model(classes=1000, hidden=2048, rows_cuda=4096, rows_cpu=1024),  # ResNet-50
    "cifar10": Model(classes=10, hidden=512, rows_cuda=1024, rows_cpu=128),  # ResNet-18
}
SETS = [*MODELS, "segmentation", "regimes", "few-rows", "sweep", "quick"]


def shapes_of(name: str, device: str) -> list[Shape]:
    """The logits' shapes of a set."""
    on_cuda = device == "cuda"
    if name in MODELS:
        return [(MODELS[name].rows(device), MODELS[name].classes)]
    match name:
        case "segmentation":  # Pascal VOC's 21 classes
            return [(16 if on_cuda else 2, 21, 512, 512)]
        case "regimes":  # bound by the call, by the cache, and by memory
            if on_cuda:
                return [(32, 10), (32768, 1024), (8192, 32000), (8192, 128256)]
            return [(32, 10), (1024, 1000), (512, 32000), (256, 128256)]
        case "few-rows":
            return [(rows, classes) for classes in (32000, 128256) for rows in (1, 8, 64)]
        case "sweep":  # as many logits each, but for short rows, which would be too many
            logits = 2**30 if on_cuda else 2**24
            return [(max(logits // 2**18, min(32768, logits // classes)), classes) for classes in SWEEP]
        case "quick":
            return [(32, 10), (1024, 1000), (128, 32000)]
    raise Refusal(f"unknown shape set {name!r}; there are {', '.join(SETS)}")


def parse_shape(text: str) -> Shape:
    """A shape from "rows,classes" or "N,C,d1,…"."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise Refusal(f"impossible shape {text!r}: give rows,classes or N,C,d1,… of at least 1 each, such as 512,32000")
    return shape
