"""The memory that a call needs at its peak, beyond what there was before.

On a CUDA device torch's allocator counts it. On the CPU every library allocates for itself, so the system's count is
taken, of resident pages, whose peak is reset before the call (proc_pid_clear_refs(5)).
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

import cross_entropy

from .machine import bytes_in

_STATUS = "/proc/self/status"


def peak(device: str, call: Callable[[], object]) -> int | None:
    """Bytes; None where the system does not tell. What the call returns is kept until its peak has been read."""
    gc.collect()
    return _peak_on_cuda(call) if device == "cuda" else _peak_on_cpu(call)


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception says that there was too little memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _peak_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    after = torch.cuda.max_memory_allocated()
    del kept
    return after - before


def _peak_on_cpu(call: Callable[[], object]) -> int | None:
    # What is kept for later would seem to be needed by nobody.
    cross_entropy.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = bytes_in(_STATUS, "VmRSS")
    kept = call()
    after = bytes_in(_STATUS, "VmHWM")
    del kept
    return max(0, after - before)
