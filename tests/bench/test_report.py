"""The table of the kernels' README says what the rows say; `--check` sees a difference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# The benches are no package. At the end of the path: a conftest is there too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
report = pytest.importorskip("report", reason="bench/ is not there")


def row(provider: str, **changes: Any) -> dict[str, Any]:
    fields = {
        "time": "2026-01-02T03:04:05Z",
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": "CPU Model X",
        "threads": 2,
        "torch": "2.13.0",
        "triton": "3.7.1",
        "op": "linear_grpo_loss",
        "shape": {"head": "Small", "rows": 1024, "D": 896, "V": 32768},
        "dtype": "float32",
        "dead": 0.0,
        "cold": False,
        "frozen": True,
        "floor_ms": 720.0,
        "spread": 0.03,
        "provider": provider,
        "status": "ok",
        "median_ms": 800.0,
        "p20_ms": 790.0,
        "p80_ms": 820.0,
        "rounds": 5,
        "peak_bytes": 3 * 2**20,
        "floor_fraction": 0.9,
        "time_over_ours": 1.0,
    }
    return fields | changes


def unmeasured(provider: str, status: str, **more: Any) -> dict[str, Any]:
    measured = ("median_ms", "p20_ms", "p80_ms", "rounds", "floor_fraction")
    kept = {k: v for k, v in row(provider).items() if k not in measured}
    return kept | {"status": status, "time_over_ours": None, **more}


ROWS = [
    row("ours", target_ms=750, passes=False),
    row("eager", median_ms=1.25, p20_ms=0.4, p80_ms=2.0, time_over_ours=2.5, floor_fraction=None, peak_bytes=None),
    unmeasured("peer", "skipped", reason="peer is not installed"),
    unmeasured("large", "out of memory"),
    unmeasured("wrong", "mismatch", errors={"loss": 0.4}),
]


def test_table_has_every_row_with_its_result() -> None:
    table = report.render_table(ROWS)
    assert "`linear_grpo_loss`: 1,024 × 32,768, D 896, float32, frozen head, measured floor 720 ms, spread 3%" in table
    assert "| **ours** | 800 (790 to 820) | 1.00 | 3 | 90% | matches, target 750 ms: missed |" in table
    assert "| eager | 1.2 (0.400 to 2.0) | 2.50 | | | matches |" in table
    assert "| peer | | | | | peer is not installed |" in table
    assert "| large | | | | | out of memory |" in table
    assert "| wrong | | | | | differs from the reference |" in table
    assert "commit 0123456789, 2026-01-02" in table


def test_only_the_last_run_of_a_case_is_shown() -> None:
    table = report.render_table([row("ours", median_ms=5555.0), row("ours", time="2026-02-03T00:00:00Z")])
    assert "5,555" not in table
    assert table.count("**ours**") == 1
    assert report.render_table([]) == "No results yet."


def test_check_sees_a_stale_table_and_a_stale_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results, readme, chart = tmp_path / "rows.jsonl", tmp_path / "README.md", tmp_path / "docs" / "chart.png"
    results.write_text("".join(json.dumps(x) + "\n" for x in ROWS))
    readme.write_text(f"before\n{report.START}\n{report.END}\nafter\n")
    places = ["--results", str(results), "--readme", str(readme), "--chart", str(chart)]
    assert report.main([*places, "--check"]) == 1
    assert report.main(places) == 0
    assert readme.read_text().startswith(f"before\n{report.START}\n**CPU Model X**")
    assert report.main([*places, "--check"]) == 0
    first = chart.read_bytes()
    assert report.main(places) == 0
    assert chart.read_bytes() == first
    results.write_text(results.read_text().replace("800.0", "801.0"))
    assert report.main([*places, "--check"]) == 1
    readme.write_text("nothing\n")
    with pytest.raises(ValueError, match="is missing"):
        report.main(places)


def test_shipped_table_and_chart_are_those_of_the_shipped_rows() -> None:
    assert report.main(["--check"]) == 0
