"""What a call does besides computing: the operators that it dispatches, the memory that it asks for."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LogOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def allocations(function: Callable[[], Any], nbytes: int) -> int:
    """How many blocks of at least so many bytes the CPU's allocator is asked for."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() >= nbytes for event in events if event.name() == "[memory]")
