"""What a source distribution contains, and what is said where torch or nvcc is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch

import cross_entropy

ROOT = Path(__file__).parents[1]
DIRECTORIES = ["cross_entropy", "csrc", "bench", "examples", "tests"]
FILES = [
    "build_backend.py",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "MANIFEST.in",
    "pyproject.toml",
    "README.md",
    "setup.py",
]


@pytest.fixture
def checkout(tmp_path):
    """The project's files without what has been built."""
    root = tmp_path / "checkout"
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in DIRECTORIES:
        shutil.copytree(ROOT / name, root / name, ignore=built)
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    return root


def call_backend(checkout, call):
    command = [sys.executable, "-c", f"import build_backend; print(build_backend.{call})"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_source_distribution_has_everything(checkout):
    result = call_backend(checkout, "build_sdist('dist')")
    assert result.returncode == 0, result.stderr
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as tar:
        packed = {str(Path(*Path(name).parts[1:])) for name in tar.getnames()}
    source_files = {str(p.relative_to(checkout)) for d in DIRECTORIES for p in (checkout / d).rglob("*.*")}
    assert source_files | set(FILES) <= packed


@pytest.fixture
def without_torch(checkout):
    """A directory first on the path whose torch cannot be imported."""
    (checkout / "torch.py").write_text("raise ImportError('No module named torch')\n")
    return checkout


def test_building_without_torch_says_so(without_torch):
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=without_torch, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Install torch >= 2.11 first" in result.stderr


def test_isolated_build_asks_for_the_installed_torch(checkout):
    result = call_backend(checkout, "get_requires_for_build_wheel()")
    assert result.returncode == 0, result.stderr
    assert f"'torch=={torch.__version__.partition('+')[0]}'" in result.stdout


def configure(checkout, **variables):
    """What setup.py says before it compiles anything, in a checkout that has a CUDA kernel."""
    (checkout / "csrc/cuda").mkdir(exist_ok=True)
    (checkout / "csrc/cuda/kernel.cu").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CROSS_ENTROPY_", "CUDA_"))}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=checkout, env=kept | variables, capture_output=True, text=True)


NOT_BUILT = "cross_entropy: the CUDA kernels are not built: "


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CROSS_ENTROPY_CUDA": "0"}, "CROSS_ENTROPY_CUDA=0"),
        ({"CUDA_HOME": "/nowhere"}, "nvcc was not found (set CUDA_HOME)"),
        ({"CROSS_ENTROPY_SANITIZE": "address"}, "CROSS_ENTROPY_SANITIZE is set"),
    ],
)
def test_build_says_why_it_is_without_cuda(checkout, variables, reason):
    result = configure(checkout, **variables)
    assert result.returncode == 0, result.stderr
    assert f"{NOT_BUILT}{reason}\n" in result.stderr


def test_build_fails_without_nvcc_where_cuda_is_required(checkout):
    result = configure(checkout, CROSS_ENTROPY_CUDA="1", CUDA_HOME="/nowhere")
    assert result.returncode != 0
    assert f"{NOT_BUILT}nvcc was not found (set CUDA_HOME)\n" in result.stderr


def test_build_info():
    info = cross_entropy.build_info()
    assert (
        info.version
        == cross_entropy.__version__
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    )
    assert info.torch == torch.__version__.partition("+")[0]
    assert info.compiler.startswith(("g++ ", "clang "))
    assert (info.cuda is None) == (info.cuda_architectures == [])
    assert not (info.emulated and info.cuda)
    assert info.cpu in ["avx512", "avx2", "portable"]
