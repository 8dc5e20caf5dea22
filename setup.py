"""Builds the extension `cross_entropy._C`. CROSS_ENTROPY_SANITIZE=address,undefined builds it with sanitizers."""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    sys.exit(
        "cross_entropy is compiled against the torch it will run with, and torch cannot be imported "
        f"({error}). Install torch >= 2.11 first; `pip install .` then finds it."
    )

ROOT = Path(__file__).parent


def extension() -> Extension:
    compile_args = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    # Other projects' headers are not ours to warn about.
    for directory in [*include_paths(), sysconfig.get_path("include")]:
        compile_args += ["-isystem", directory]
    link_args = ["-fopenmp"]
    if sanitizers := os.environ.get("CROSS_ENTROPY_SANITIZE"):
        compile_args += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g1"]
        link_args += [f"-fsanitize={sanitizers}"]
    compile_args += os.environ.get("CROSS_ENTROPY_CXXFLAGS", "").split()
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    return CppExtension(
        "cross_entropy._C",
        sources,
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
