"""The tests of this folder once more on a CPU, with Triton's interpreter running the kernels.

The interpreter is chosen when triton is imported, so these tests have a process of their own: it takes those that run
kernels (`backend`, `kernels`: see conftest). On a GPU run `make test-gpu`, which compiles the kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOM = Path(__file__).parent


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def test_interpreted_kernels() -> None:
    pytest.importorskip("triton")
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 fails with numpy >= 2.4 (scalars of one-element arrays)")
    files = [path for path in sorted(ROOM.glob("test_*.py")) if path.name not in (Path(__file__).name, "test_aot.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOM.parents[1], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 250, "a fixture that was renamed would leave its tests out without a word"
