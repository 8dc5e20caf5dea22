"""The build backend of pyproject.toml: setuptools', against the torch that is already installed.

A compiled extension works with the torch version that it was built against and no other, and an isolated build would
fetch whatever version is newest. So the outer interpreter is asked for its version, and that one is required.
"""

import subprocess
import sys
from typing import Any

from setuptools.build_meta import *  # noqa: F403


def _installed_torch() -> list[str]:
    version = "import importlib.metadata as m; print(m.version('torch'))"
    # Isolated builds put their own environment first on the path; -I looks past it.
    result = subprocess.run([sys.executable, "-I", "-c", version], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(
            "cross_entropy is compiled against the torch it will run with, and torch is not installed. "
            "Install torch >= 2.11 first."
        )
    # Without "+cpu" and the like: builds of one version share their headers, and an index may not list them all.
    return [f"torch=={result.stdout.strip().partition('+')[0]}", "ninja"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _installed_torch()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _installed_torch()


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _installed_torch()
