"""What the benchmark runs on: its provenance, its memory, and how many of its cores may be used."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import cross_entropy

ROOT = Path(__file__).parents[1]
PACKAGES = ["jax", "optax", "triton", "liger-kernel", "quack-kernels", "flash-attn", "cut-cross-entropy", "trl"]


def _output(*command: str) -> str | None:
    """The first line that a command prints, None where it cannot run."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _commit() -> str | None:
    """The commit of a checkout, and whether what is measured has changed since."""
    commit = _output("git", "rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    changed = _output("git", "status", "--porcelain", "--", "setup.py", "csrc", "cross_entropy", "bench/*.py")
    return f"{commit} with changes" if commit and changed else commit


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _read(path: str) -> dict[str, str]:
    """A file of "name: value" lines, the first of each name."""
    values: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, separator, value = line.partition(":")
        if separator:
            values.setdefault(name.strip(), value.strip())
    return values


def bytes_in(path: str, name: str) -> int:
    """What a file of /proc says in kB."""
    return int(_read(path)[name].split()[0]) * 1024


def provenance(device: str, module: str = "bench") -> dict[str, Any]:
    """Everything that a figure depends on and a reader cannot see; `module` is what was run."""
    build = cross_entropy.build_info()
    described: dict[str, Any] = {
        "cpu": _read("/proc/cpuinfo").get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "load": round(os.getloadavg()[0], 2),
        "instructions": build.cpu,
        "system": platform.system() + " " + platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cross_entropy": build.version,
        "compiler": build.compiler,
        "nvcc": build.cuda,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": _versions(),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        described |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gb": round(torch.cuda.get_device_properties().total_memory / 1e9),
            "driver": _output(*query),
            "cuda": torch.version.cuda,
        }
    return described


def free_memory(device: str) -> int:
    """Bytes that can still be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return bytes_in("/proc/meminfo", "MemAvailable")


def _by_core(cpus: set[int]) -> list[int]:
    """Logical processors, one of each core before the second of any."""

    def siblings(cpu: int) -> str:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return path.read_text() if path.exists() else str(cpu)

    cores: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        cores.setdefault(siblings(cpu), []).append(cpu)
    rank = {cpu: place for core in cores.values() for place, cpu in enumerate(core)}
    return sorted(cpus, key=lambda cpu: (rank[cpu], cpu))


def _run_on(cpus: set[int]) -> None:
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), cpus)
        except ProcessLookupError:  # a thread that has ended meanwhile
            continue


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets the process use so many of its cores: torch by its setting, others by where their threads may run."""
    allowed, before = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(count)
    if count < len(allowed):
        _run_on(set(_by_core(allowed)[:count]))
    try:
        yield
    finally:
        _run_on(allowed)
        torch.set_num_threads(before)
