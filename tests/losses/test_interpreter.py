"""The tests of this folder once more on a CPU, with Triton's interpreter running the kernels.

The interpreter is chosen when triton is imported, so these tests have a process of their own: it takes those that run
kernels (`backend`, `kernels`: see conftest). On a GPU run `make test-gpu`, which compiles the kernels.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from interpreted import run_interpreted

ROOM = Path(__file__).parent


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def test_interpreted_kernels() -> None:
    pytest.importorskip("triton")
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 fails with numpy >= 2.4 (scalars of one-element arrays)")
    run_interpreted(ROOM, without={Path(__file__).name, "test_aot.py"}, more_than=250)
