"""The tests of this folder once more on a CPU, in a process whose Triton interprets the kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parent


def test_interpreted_kernels() -> None:
    pytest.importorskip("triton")
    files = [path for path in sorted(ROOM.glob("test_*.py")) if path.name != Path(__file__).name]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOM.parents[1], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 50, "a fixture that was renamed would leave its tests out without a word"
