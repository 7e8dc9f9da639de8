"""The tests of this folder once more on a CPU, in a process whose Triton interprets the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import run_interpreted

ROOM = Path(__file__).parent


def test_interpreted_kernels() -> None:
    pytest.importorskip("triton")
    run_interpreted(ROOM, without={Path(__file__).name}, more_than=50)
