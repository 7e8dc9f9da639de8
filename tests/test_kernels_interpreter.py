"""The tests of the Triton kernels on a CPU, where Triton's interpreter runs them.

The interpreter is chosen when triton is imported, so these tests have a process of their own. On a GPU run
`make test-gpu`, which compiles the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.parametrize("name", ["advantages", "logps", "losses"])
def test_interpreted_kernels(name: str) -> None:
    pytest.importorskip("triton")
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 fails with numpy >= 2.4 (scalars of one-element arrays)")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        TESTS / f"test_kernels_triton_{name}.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
