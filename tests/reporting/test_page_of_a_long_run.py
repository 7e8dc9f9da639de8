"""A long run is reported in bounded time, memory and size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastr1.reporting.page import MAX_BYTES

# The benches are no package. At the end of the path: a conftest is there too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
bench = pytest.importorskip("page", reason="bench/ is not there")


@pytest.mark.parametrize("num_updates", [150, pytest.param(bench.NUM_UPDATES, marks=pytest.mark.slow)])
def test_time_memory_and_size_do_not_grow_out_of_bounds(tmp_path: Path, num_updates: int) -> None:
    bench.write_long_run(tmp_path, num_updates)
    found = bench.measure(tmp_path)
    assert found["seconds"] <= 60
    assert found["peak_mib"] <= 1024
    assert found["page_bytes"] <= MAX_BYTES
