"""Reading a run back and drawing it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastr1.reporting import curves as report
from fastr1.reporting.curves import ReportError, merge_runs, read_series, smooth, write_report
from fastr1.reporting.run_log import RunLogError


def write_run(folder: Path, rows: list[dict[str, Any]], summary: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def row(step: int, **others: float) -> dict[str, Any]:
    return {
        "step": step,
        "reward": step / 40,
        "rewards/accuracy_reward": step / 50,
        "rewards/format_reward": 0.5,
        "rewards/tinyllava_video_r1": step / 40,  # the only reward function: the total again
        "completion_length": 30 + step,
        "kl": 0.001 * step,
        **others,
    }


def draw(panel: str, rows: list[dict[str, Any]], folder: Path, *arguments: Any) -> Axes:
    axes = Figure().subplots()
    getattr(report, f"_draw_{panel}")(axes, read_series(write_run(folder, rows) / "metrics.jsonl"), *arguments)
    return axes


def labelled(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([1, 2, 3, 4], 1, [1, 2, 3, 4]),
        ([0, 3, 0, 3], 3, [1.5, 1, 2, 1.5]),
        ([5, 5, 5, 5, 5], 4, [5, 5, 5, 5, 5]),
        ([1, math.nan, 3], 3, [1, 2, 3]),
        ([math.nan, math.nan, 1], 1, [math.nan, math.nan, 1]),
        ([], 3, []),
        ([7], 9, [7]),
    ],
)
def test_smoothing_table(values: list[float], window: int, expected: list[float]) -> None:
    np.testing.assert_allclose(smooth(np.array(values, dtype=float), window), expected)


def test_smoothing_does_not_lag(tmp_path: Path) -> None:
    line = np.arange(50.0)
    np.testing.assert_allclose(smooth(line, 11)[5:-5], line[5:-5])


def test_series_are_sorted_and_merge_rows_of_a_step(tmp_path: Path) -> None:
    rows = [{"step": 2, "kl": None}, {"step": 1, "kl": 0.5, "note": "text"}, {"step": 2, "eval/accuracy": 0.25}]
    series = read_series(write_run(tmp_path, rows) / "metrics.jsonl")
    assert set(series) == {"kl", "eval/accuracy"}
    np.testing.assert_array_equal(series["kl"][0], [1, 2])
    np.testing.assert_array_equal(series["kl"][1], [0.5, math.nan])


def test_report_is_a_png_in_the_run_folder_or_where_asked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [row(step) for step in range(1, 41)])
    assert write_report(folder) == folder / "report.png"
    assert write_report(folder, tmp_path / "new" / "x.png") == tmp_path / "new" / "x.png"
    for path in (folder / "report.png", tmp_path / "new" / "x.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        ([row(1)], {"reward", "length", "kl", "accuracy"}),
        ([{"step": 1, "loss": 0.5}], set()),  # a supervised run
        ([row(1, kl=math.nan), row(2)], {"reward", "length", "kl", "accuracy"}),
        ([{"step": 1, "kl": None, "reward": None}], {"reward", "kl"}),
    ],
)
def test_short_and_sparse_runs_can_be_drawn(tmp_path: Path, rows: list[dict[str, Any]], drawn: set[str]) -> None:
    rows = [{k: None if v is not None and v != v else v for k, v in one.items()} for one in rows]
    panels = {"reward": (), "length": (), "kl": (), "accuracy": ({},)}
    assert {panel for panel, arguments in panels.items() if draw(panel, rows, tmp_path, *arguments).lines} == drawn
    assert write_report(tmp_path).exists()


def test_runs_are_drawn_as_their_mean_over_the_single_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), [row(s, reward=s + i) for s in range(1, 41)]) for i in range(3)]
    merged = merge_runs([read_series(run / "metrics.jsonl") for run in runs])
    assert merged["reward"][1].shape == (40, 3)
    axes = Figure().subplots()
    report._draw_reward(axes, merged)
    np.testing.assert_allclose(labelled(axes)["total"].get_ydata()[1:-1], np.arange(3, 41))
    assert sum(str(line.get_label()).startswith("_") for line in axes.lines) == 3 * len(labelled(axes))


def test_runs_logged_at_different_steps_are_not_merged() -> None:
    steps = np.array([1, 2])
    runs = [{"kl": (steps, np.zeros(2)), "loss": (steps, np.zeros(2))}, {"kl": (steps + 1, np.zeros(2))}]
    with pytest.raises(ReportError, match="kl was not logged at the same steps"):
        merge_runs(runs)
    assert merge_runs([runs[0], {"loss": runs[0]["loss"]}]).keys() == {"loss"}


@pytest.mark.parametrize(
    ("panel", "arguments", "unit"),
    [
        ("reward", (), "mean reward per completion"),
        ("length", (), "tokens per completion (mean)"),
        ("kl", (), "nats per token (mean)"),
        ("accuracy", ({},), "correct answers (%)"),
    ],
)
def test_axes_are_labelled_with_units(tmp_path: Path, panel: str, arguments: tuple[Any, ...], unit: str) -> None:
    axes = draw(panel, [row(1), row(2)], tmp_path, *arguments)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("update", unit)
    assert axes.get_title()


def test_reward_panel_shows_the_total_and_each_part_once(tmp_path: Path) -> None:
    axes = draw("reward", [row(step) for step in range(1, 41)], tmp_path)
    lines = labelled(axes)
    assert list(lines) == ["total", "accuracy reward", "format reward"]
    np.testing.assert_allclose(lines["total"].get_ydata()[1:-1], np.arange(2, 40) / 40)
    assert len(axes.lines) == 6  # raw and smoothed of each


def test_accuracy_panel_shows_training_held_out_and_fixed_results_in_percent(tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 4)] + [{"step": 2, "eval/accuracy": 0.25}, {"step": 3, "eval/accuracy": 0.5}]
    lines = labelled(draw("accuracy", rows, tmp_path, {"blank video": 0.2}))
    assert list(lines) == ["training rollouts (sampled)", "held-out", "blank video (20 %)"]
    np.testing.assert_allclose(lines["training rollouts (sampled)"].get_ydata(), [2, 4, 6])
    np.testing.assert_allclose(lines["held-out"].get_xdata(), [2, 3])
    np.testing.assert_allclose(lines["held-out"].get_ydata(), [25, 50])
    np.testing.assert_allclose(lines["blank video (20 %)"].get_ydata(), [20, 20])


def test_a_panel_without_data_says_so(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.5}]
    for panel, arguments in (("reward", ()), ("length", ()), ("kl", ()), ("accuracy", ({},))):
        axes = draw(panel, rows, tmp_path, *arguments)
        assert "not measured" in axes.texts[0].get_text()


@pytest.mark.parametrize(
    ("summary", "part"),
    [
        ([1], "object"),
        ({"accuracy": [1]}, "object"),
        ({"accuracy": {"base": 31}}, "31"),
        ({"accuracy": {"b": "x"}}, "x"),
    ],
)
def test_a_wrong_summary_is_refused(tmp_path: Path, summary: Any, part: str) -> None:
    with pytest.raises(ReportError, match=part):
        write_report(write_run(tmp_path, [row(1)], summary))


def test_a_folder_without_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ReportError, match="no numbers"):
        write_report(write_run(tmp_path, []))
