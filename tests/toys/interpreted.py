"""Tests of a room once more, their kernels run by Triton's interpreter, which must be chosen before the import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path


def run_interpreted(room: Path, *, without: Collection[str], more_than: int) -> None:
    """Run the test files of a folder in a process of their own; `without` are names of files.

    No more than `more_than` passed tests are a failure: a fixture that was renamed would leave its tests out without a
    word.
    """
    files = [path for path in sorted(room.glob("test_*.py")) if path.name not in without]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=room.parents[1], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > more_than
