"""Builds the extension `cross_entropy._C`: C++, and the CUDA kernels when nvcc is there.

Environment variables:
    CUDA_HOME                 the CUDA toolkit; otherwise that of the nvcc on PATH, or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST      the architectures to compile for, such as "9.0" or "8.0;9.0+PTX"
    MAX_JOBS                  how many files to compile at a time; otherwise as many as there are cores
    CROSS_ENTROPY_CUDA        0 leaves the CUDA kernels out, 1 makes it an error if they cannot be built
    CROSS_ENTROPY_CXXFLAGS    further flags for the C++ compiler
    CROSS_ENTROPY_NVCCFLAGS   further flags for nvcc
    CROSS_ENTROPY_SANITIZE    "address,undefined" builds with sanitizers, without nvcc
    CROSS_ENTROPY_EMULATE     1 compiles the CUDA kernels for the processor, on which the tests then run them
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup

try:
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        "cross_entropy is compiled against the torch it will run with, and torch cannot be imported "
        f"({error}). Install torch >= 2.11 first; `pip install .` then finds it."
    )

ROOT = Path(__file__).parent
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_cuda() -> Path | None:
    """The CUDA toolkit."""
    if chosen := os.environ.get("CUDA_HOME"):
        candidates = [Path(chosen)]
    else:
        candidates = [Path("/usr/local/cuda")]
        if nvcc := shutil.which("nvcc"):
            candidates.insert(0, Path(nvcc).resolve().parents[1])
    # The nvcc on PATH may be a script that calls one elsewhere: only a toolkit has both.
    needed = ["bin/nvcc", "include/cuda_runtime.h"]
    return next((home for home in candidates if all((home / name).is_file() for name in needed)), None)


class Nvcc:
    """What is to be known of a toolkit's compiler."""

    def __init__(self, home: Path) -> None:
        def ask(option: str) -> str:
            return subprocess.run([home / "bin/nvcc", option], check=True, capture_output=True, text=True).stdout

        self.home = home
        self.version = re.findall(r"release ([\d.]+)", ask("--version"))[0]
        known = ask("--list-gpu-arch").split()
        default = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(default) + "+PTX"
        self.architectures = chosen.replace(" ", ";")


def reason_against_cuda() -> str | None:
    if os.environ.get("CROSS_ENTROPY_EMULATE") == "1":
        return "CROSS_ENTROPY_EMULATE=1"
    if os.environ.get("CROSS_ENTROPY_SANITIZE"):
        return "CROSS_ENTROPY_SANITIZE is set"
    if os.environ.get("CROSS_ENTROPY_CUDA") == "0":
        return "CROSS_ENTROPY_CUDA=0"
    if not files("csrc/cuda/*.cu"):
        return "csrc/cuda has none"
    if find_cuda() is None:
        return "nvcc was not found (set CUDA_HOME)"
    return None


def extension() -> Extension:
    emulates = os.environ.get("CROSS_ENTROPY_EMULATE") == "1"
    # Where the CUDA kernels are emulated they take the place of the CPU's, which take longest to compile.
    on_cpu = ["csrc/cpu/isa.cpp", "csrc/cpu/large_memory.cpp"] if emulates else ["csrc/cpu/*.cpp"]
    sources = files("csrc/*.cpp", *on_cpu)
    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    nvcc: list[str] = []
    link = ["-fopenmp"]
    # Other projects' headers are not ours to warn about.
    for directory in [*cpp_extension.include_paths(), sysconfig.get_path("include")]:
        cxx += ["-isystem", directory]

    if reason := reason_against_cuda():
        message = f"cross_entropy: the CUDA kernels are not built: {reason}"
        if os.environ.get("CROSS_ENTROPY_CUDA") == "1":
            sys.exit(message)
        print(message, file=sys.stderr)
    elif home := find_cuda():
        toolkit = Nvcc(home)
        # torch looks for one only if it was itself built with CUDA. It need not be.
        cpp_extension.CUDA_HOME = str(home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.architectures
        sources += files("csrc/cuda/*.cu")
        cxx += ["-DCE_CUDA", f'-DCE_NVCC="{toolkit.version}"', f'-DCE_ARCHITECTURES="{toolkit.architectures}"']
        nvcc += ["-O3", "-std=c++17", "--threads", "2", "-Xcompiler", "-fvisibility=hidden,-Wall,-Wextra"]
        nvcc += ["-Xptxas", "-warn-spills,-warn-lmem-usage", "-Xfatbin", "-compress-all"]
        # Without CUDA in torch, ninja is not told which headers a kernel file includes; a changed command it sees.
        headers = files("csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh")
        nvcc += [f"-DCE_HEADERS={zlib.crc32(b''.join((ROOT / name).read_bytes() for name in headers))}"]
        nvcc += os.environ.get("CROSS_ENTROPY_NVCCFLAGS", "").split()
        link += [f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    if emulates:
        sources += [f"tests/emulator/{name}.cpp" for name in ("emulator", "forward_kernels", "other_kernels")]
        cxx += ["-DCE_CUDA", "-DCE_EMULATE", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/emulator'}"]
    if sanitizers := os.environ.get("CROSS_ENTROPY_SANITIZE"):
        # AddressSanitizer finds the accesses that these two look for, which take long to compile in the kernels.
        cxx += [f"-fsanitize={sanitizers}", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"]
        cxx += ["-DCE_SANITIZE", "-Og", "-g1"]
        link += [f"-fsanitize={sanitizers}"]
    cxx += os.environ.get("CROSS_ENTROPY_CXXFLAGS", "").split()
    return cpp_extension.CppExtension(
        "cross_entropy._C",
        sources,
        depends=files("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cu"),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )


# ninja's own choice is two more, which take a tenth longer: the compilers share the caches.
os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
