"""The competitors, one adapter each: what it measures, what it lacks, and how to call it.

A new one is an entry in PEERS. `loss` imports it and returns its mean loss of (logits, target); `linear` does for those
that take the last layer too, of (hidden, weight, target).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cross_entropy

from .inputs import Head, Logits
from .refusal import Refusal, one_line
from .results import INPLACE, OURS
from .timing import Operation

Loss = Callable[[Tensor, Tensor], Tensor]
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Entrant:
    """A competitor with its inputs.

    Attributes:
        result: the loss, computed in some ways, and the gradients, as tensors of torch
    """

    operations: dict[str, Operation]
    result: Callable[[], tuple[list[Tensor], tuple[Tensor, ...]]]


def on_torch(loss: Loss, inputs: Logits) -> Entrant:
    """A function of torch tensors that leaves its logits alone."""

    def both(leaf: Tensor) -> Tensor:
        leaf.grad = None  # from the call before, where several follow each other
        value = loss(leaf, inputs.target)
        value.backward()
        return value.detach()

    def with_gradient(call: int) -> tuple[Tensor, Tensor]:
        leaf = inputs.leaf(call)
        return leaf, loss(leaf, inputs.target)

    def backward(prepared: tuple[Tensor, Tensor]) -> None:
        leaf, value = prepared
        leaf.grad = None  # nothing to add to
        value.backward()

    def result() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        leaf = inputs.leaf(0)
        losses = [forward(0), both(leaf)]
        assert leaf.grad is not None
        return losses, (leaf.grad,)

    @torch.no_grad()
    def forward(call: int) -> Tensor:
        return loss(inputs.logits(call), inputs.target)

    operations = {
        "forward": Operation(forward),
        "backward": Operation(backward, with_gradient),
        "both": Operation(both, inputs.leaf),
    }
    return Entrant(operations, result)


def overwriting(loss: Loss, inputs: Logits) -> Entrant:
    """A function of torch tensors that may write the gradient over the logits: each call gets a copy of its own.

    It is made a call ahead, so that it is no more in the caches than the logits that the others get.
    """
    copies: list[Tensor] = []

    def copy(call: int) -> tuple[Tensor, torch.autograd.graph.GradientEdge]:
        while len(copies) < 2:
            copies.append(inputs.leaf(call).clone())
        logits = copies.pop(0)
        return logits, torch.autograd.graph.get_gradient_edge(logits)  # asked for before it is overwritten

    def both(prepared: tuple[Tensor, torch.autograd.graph.GradientEdge]) -> tuple[Tensor, Tensor]:
        logits, edge = prepared
        value = loss(logits, inputs.target)
        (gradient,) = torch.autograd.grad(value, edge)
        return value.detach(), gradient

    forward = on_torch(loss, inputs).operations["forward"]  # has no gradient to write

    def result() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        value, gradient = both(copy(0))
        return [forward.run(0), value], (gradient,)

    return Entrant({"forward": forward, "both": Operation(both, copy)}, result)


def in_place(loss: Loss, inputs: Logits) -> Entrant:
    """Likewise; its forward pass without a gradient is that of the same function out of place."""
    entrant = overwriting(loss, inputs)
    return Entrant({"both": entrant.operations["both"]}, entrant.result)


def on_jax(loss: Callable[[Any, Any], Any], inputs: Logits) -> Entrant:
    """A function of jax arrays, compiled by jax.jit; the arrays share torch's memory where jax can."""
    import jax

    logits = jax.dlpack.from_dlpack(inputs.copies[0])
    target = jax.dlpack.from_dlpack(inputs.target.int())
    value, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))

    def result() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        forward, (again, gradient) = value(logits, target), both(logits, target)
        return [torch.from_dlpack(x) for x in (forward, again)], (torch.from_dlpack(gradient),)

    operations = {
        "forward": Operation(lambda call: jax.block_until_ready(value(logits, target))),
        "both": Operation(lambda call: jax.block_until_ready(both(logits, target))),
    }
    return Entrant(operations, result)


def step_on_torch(loss: LinearLoss, inputs: Head) -> Entrant:
    def step(head: Head) -> Tensor:
        value = loss(head.hidden, head.weight, head.target)
        value.backward()
        return value.detach()

    def result() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        value = step(inputs.clear())
        assert inputs.hidden.grad is not None and inputs.weight.grad is not None
        return [value], (inputs.hidden.grad, inputs.weight.grad)

    return Entrant({"step": Operation(step, lambda call: inputs.clear())}, result)


def step_on_jax(loss: Callable[[Any, Any, Any], Any], inputs: Head) -> Entrant:
    import jax

    hidden, weight = (jax.dlpack.from_dlpack(tensor.detach()) for tensor in (inputs.hidden, inputs.weight))
    target = jax.dlpack.from_dlpack(inputs.target.int())
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def result() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        value, gradients = step(hidden, weight, target)
        return [torch.from_dlpack(value)], tuple(torch.from_dlpack(gradient) for gradient in gradients)

    return Entrant({"step": Operation(lambda call: jax.block_until_ready(step(hidden, weight, target)))}, result)


def headed(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """The last layer of a model, and a loss of its logits, in torch or jax."""
    return lambda hidden, weight, target: loss(hidden @ weight.T, target)


@dataclass(frozen=True)
class Peer:
    """A competitor.

    Attributes:
        what: what is measured
        lacks: of torch's function; empty for nothing
        install: the command that makes it importable; empty if it always is
        devices: where it runs
        default: whether it takes part without being named
        enter: makes an entrant of what `loss` returns
    """

    name: str
    what: str
    lacks: str = ""
    install: str = ""
    loss: Callable[[], Any] | None = None
    linear: Callable[[], LinearLoss] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    default: bool = True
    enter: Callable[[Any, Logits], Entrant] = on_torch
    enter_step: Callable[[Any, Head], Entrant] = step_on_torch

    def run(self, inputs: Logits) -> Entrant:
        assert self.loss is not None
        return self.enter(self.loss(), inputs)

    def train(self, inputs: Head) -> Entrant:
        if self.linear is not None:
            return self.enter_step(self.linear(), inputs)
        assert self.loss is not None
        return self.enter_step(headed(self.loss()), inputs)

    def takes_part(self, kind: str, device: str) -> bool:
        return device in self.devices and (kind == "train" or self.loss is not None)

    def missing(self) -> str:
        """How to install it and why it cannot be imported, empty if it can."""
        try:
            for load in (self.loss, self.linear):
                if load is not None:
                    load()
        except Exception as error:  # some look for a GPU when they are imported
            return f"{self.install} ({one_line(error)})"
        return ""


def _eager(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def _eager_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _compiled(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """torch.compile keeps what it compiled with the function's code, so that every variant gets code of its own."""
    copy = FunctionType(function.__code__.replace(), function.__globals__)
    return torch.compile(copy, **options)


_STATIC = {"dynamic": False}
_AUTOTUNED = {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}


def _torch_linear() -> LinearLoss:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()  # otherwise it makes the logits whole
    return partial(F.linear_cross_entropy, options=options)


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def _liger_linear() -> LinearLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _quack() -> Loss:
    import quack

    return quack.cross_entropy


def _flash_attention() -> Loss:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()


def _cut() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _cut_compiled() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy

    return partial(linear_cross_entropy, impl="torch_compile")


def _trl() -> Loss:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, target: -selective_log_softmax(logits, target).mean()


def _optax() -> Callable[[Any, Any], Any]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's remarks on its own speed
    import jax  # noqa: F401
    import optax

    return lambda logits, target: optax.softmax_cross_entropy_with_integer_labels(logits, target, axis=1).mean()


_INDICES_ONLY = "class probabilities, logits of other than two dimensions"

PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, "cross_entropy.cross_entropy", loss=lambda: cross_entropy.cross_entropy),
        Peer(
            INPLACE,
            "the same with inplace=True, which writes the gradient over the logits",
            loss=lambda: partial(cross_entropy.cross_entropy, inplace=True),
            enter=in_place,
        ),
        Peer("torch", "torch.nn.functional.cross_entropy, eager", loss=lambda: F.cross_entropy),
        Peer(
            "compile",
            "the same under torch.compile",
            loss=partial(_compiled, _eager),
            linear=partial(_compiled, _eager_linear),
        ),
        Peer(
            "compile-static",
            "likewise with dynamic=False",
            loss=partial(_compiled, _eager, **_STATIC),
            linear=partial(_compiled, _eager_linear, **_STATIC),
            default=False,
        ),
        Peer(
            "compile-autotune",
            "likewise with dynamic=False and max-autotune, without CUDA graphs, which would copy the logits",
            loss=partial(_compiled, _eager, **_AUTOTUNED),
            linear=partial(_compiled, _eager_linear, **_AUTOTUNED),
            default=False,
        ),
        Peer(
            "torch-linear",
            "torch.nn.functional.linear_cross_entropy in chunks: head and loss in one",
            lacks="label smoothing in chunks, double backward",
            install='pip install "torch>=2.13"',
            linear=_torch_linear,
        ),
        Peer(
            "liger",
            "Liger-Kernel's cross entropy (Triton), which writes the gradient over the logits",
            lacks=_INDICES_ONLY + ", logits left alone, CUDA graphs, double backward, CPU",
            install="pip install liger-kernel",
            loss=_liger,
            devices=("cuda",),
            enter=overwriting,
        ),
        Peer(
            "liger-linear",
            "Liger-Kernel's fused head and loss (Triton)",
            lacks=_INDICES_ONLY + ", double backward, CPU",
            install="pip install liger-kernel",
            linear=_liger_linear,
            devices=("cuda",),
        ),
        Peer(
            "quack",
            "QuACK's cross entropy (CuTe DSL)",
            lacks=_INDICES_ONLY + ", label smoothing, double backward, CPU, GPUs before compute capability 8.0",
            install="pip install quack-kernels",
            loss=_quack,
            devices=("cuda",),
        ),
        Peer(
            "flash-attn",
            "flash-attention's cross entropy (Triton)",
            lacks=_INDICES_ONLY + ", class weights, double backward, CPU",
            install="pip install flash-attn --no-build-isolation",
            loss=_flash_attention,
            devices=("cuda",),
        ),
        Peer(
            "cut-linear",
            "Apple's cut cross-entropy (Triton): head and loss in one, without the logits in memory",
            lacks=_INDICES_ONLY + ", class weights, label smoothing, float32, small gradients (filtered), CPU",
            install="pip install cut-cross-entropy",
            linear=_cut,
            devices=("cuda",),
        ),
        Peer(
            "cut-linear-compile",
            "the implementation of Apple's cut cross-entropy in torch.compile, which runs on the CPU too",
            lacks=_INDICES_ONLY + ", class weights, label smoothing",
            install="pip install cut-cross-entropy",
            linear=_cut_compiled,
        ),
        Peer(
            "trl",
            "TRL's selective_log_softmax (Triton on CUDA, torch on the CPU), negated and averaged",
            lacks=_INDICES_ONLY + ", ignore_index, class weights, label smoothing",
            install="pip install trl",
            loss=_trl,
        ),
        Peer(
            "jax",
            "optax.softmax_cross_entropy_with_integer_labels under jax.jit (no backward by itself)",
            lacks="torch's tensors and autograd, ignore_index, class weights",
            install="pip install jax optax",
            loss=_optax,
            devices=("cpu",),
            enter=on_jax,
            enter_step=step_on_jax,
        ),
    )
}


def chosen(names: list[str] | None, kind: str, device: str) -> tuple[list[Peer], dict[str, str]]:
    """This library and its peers, and what was named, or would take part, but is missing: with how to install it."""
    unknown = [name for name in names or [] if name not in PEERS and name != "all"]
    if unknown:
        raise Refusal(f"unknown peer {unknown[0]!r}; there are {', '.join(PEERS)}, and all")
    everybody = "all" in (names or [])
    peers, missing = [], {}
    for peer in PEERS.values():
        ours = peer.name in (OURS, INPLACE)
        named = peer.name in names if names is not None and not everybody else peer.default or everybody
        if not (ours or named):
            continue
        if not peer.takes_part(kind, device):
            if names and peer.name in names:
                here = f"on {device}" if device not in peer.devices else f"in {kind}"
                raise Refusal(f"{peer.name} does not take part {here}: {peer.what}; lacks {peer.lacks}")
        elif how := peer.missing():
            missing[peer.name] = how
        else:
            peers.append(peer)
    return peers, missing
