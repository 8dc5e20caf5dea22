"""What a source distribution contains, and what is said where torch is missing."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

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
    results = {name for name in source_files if name.startswith("bench/results")}
    assert source_files - results | set(FILES) <= packed


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
