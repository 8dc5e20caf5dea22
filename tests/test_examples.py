"""The demo, a few steps of it, and its verdict."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_demo(tmp_path):
    chart = tmp_path / "chart.png"
    command = [sys.executable, "-m", "examples", "--quick", "--output", str(chart)]
    environment = os.environ | {"COLUMNS": "140"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("digits", "language model", "final loss", "held-out accuracy", "torch", "ours"):
        assert text in result.stdout
    assert chart.read_bytes().startswith(b"\x89PNG")
