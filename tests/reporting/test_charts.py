"""Numbers in, places of a drawing out; and which metrics are drawn together."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from decoder_toys import build_text_model
from run_folders import metrics_row, write_lines, write_run

from fastr1.reporting.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    format_number,
    layout,
)
from fastr1.reporting.read_run import read_run
from fastr1.reporting.rollout_picks import Picks
from fastr1.reporting.run_charts import other_charts, run_charts
from fastr1.rollout.costs import RolloutCosts
from fastr1.rollout.graphs import StepGraphs


def line(values: list[float], **options: object) -> Line:
    return Line("x", (np.arange(1, len(values) + 1), np.array(values, dtype=float)), 0, **options)  # type: ignore[arg-type]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) (-?[\d.]+)", path)]


def test_a_line_spans_the_drawing_from_first_to_last_and_low_to_high() -> None:
    drawn = layout(Chart("t", "u", [line([0.0, 1.0, 0.5])]), "c")
    assert points(drawn["lines"][0]["path"]) == [
        (LEFT, HEIGHT - BOTTOM),
        (LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP),
        (WIDTH - RIGHT, TOP + (HEIGHT - TOP - BOTTOM) / 2),
    ]
    assert drawn["data"] == [{"steps": [1.0, 2.0, 3.0], "values": [0.0, 1.0, 0.5]}]
    assert drawn["lines"][0]["last"] == "0.5"
    assert [tick["text"] for tick in drawn["y_ticks"]] == ["0", "0.25", "0.5", "0.75", "1"]


def test_all_charts_of_a_page_can_share_their_axis() -> None:
    drawn = layout(Chart("t", "u", [line([1.0, 2.0])]), "c", (1, 3))
    assert points(drawn["lines"][0]["path"])[1][0] == LEFT + (WIDTH - LEFT - RIGHT) / 2
    assert drawn["x_range"] == [1.0, 3.0]


def test_missing_values_break_the_line() -> None:
    drawn = layout(Chart("t", "u", [line([1.0, math.nan, 2.0, 3.0])]), "c")
    assert drawn["lines"][0]["path"].count("M") == 2
    assert drawn["data"][0]["values"] == [1.0, None, 2.0, 3.0]
    assert drawn["lines"][0]["last"] == "3"
    assert layout(Chart("t", "u", [line([math.nan])]), "c")["is_empty"]


def test_a_long_line_is_thinned_and_keeps_every_spike_in_its_band() -> None:
    values = [0.0] * 10_000
    values[4321] = 50.0
    values[77] = -50.0
    drawn = layout(Chart("t", "u", [line(values)], bottom=-50, top=50), "c")
    (shape,) = drawn["lines"]
    assert len(points(shape["path"])) == len(drawn["data"][0]["values"]) == MAX_POINTS
    heights = [y for _, y in points(shape["band"].replace("Z", ""))]
    assert (min(heights), max(heights)) == (TOP, HEIGHT - BOTTOM)
    assert drawn["data"][0]["steps"][-1] == 10_000


def test_a_line_of_middle_length_is_smoothed_over_its_faint_values() -> None:
    values = [0.0, 1.0] * 30
    shape = layout(Chart("t", "u", [line(values)]), "c")["lines"][0]
    assert {y for _, y in points(shape["faint"])} == {TOP, HEIGHT - BOTTOM}
    assert all(TOP + 20 < y < HEIGHT - BOTTOM - 20 for _, y in points(shape["path"]))
    marked = layout(Chart("t", "u", [line(values, has_markers=True)]), "c")["lines"][0]
    assert (len(marked["markers"]), marked["faint"]) == (60, None)


def test_a_stack_reaches_the_sum_of_its_lines() -> None:
    lines = [line([1.0, 1.0]), line([2.0, 3.0])]
    drawn = layout(Chart("t", "u", lines, bottom=0, is_stacked=True), "c")
    first, second = (points(shape["path"]) for shape in drawn["lines"])
    height = HEIGHT - TOP - BOTTOM
    assert [round((HEIGHT - BOTTOM - y) / height * 4, 2) for _, y in first + second] == [1, 1, 3, 4]
    assert drawn["data"][1]["values"] == [2.0, 3.0]  # its own, not the sum


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [0.0, 0.0], [-3.0], [1e-9, 2e-9], [1e12, 2e12]])
def test_flat_and_extreme_lines_are_drawn_inside(values: list[float]) -> None:
    drawn = layout(Chart("t", "u", [line(values)]), "c")
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in points(drawn["lines"][0]["path"]))
    assert drawn["y_ticks"]
    assert drawn["x_ticks"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.01234, "0.0123"), (1.5, "1.5"), (1544.4, "1,544"), (2.1e6, "2.1M"), (-0.5, "-0.5")),
        *((3.2e9, "3.2G"), (3.21e-7, "3.2e-07"), (math.nan, "–"), (0.0009, "0.0009")),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_a_run_is_drawn_with_what_a_reward_is_debugged_with_first(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    charts = run_charts(run.series, run.picks, {"chance": 0.2})
    titles = ["Reward", "Held-out accuracy", "Held-out accuracy, strict", "Prompts by outcome"]
    assert [chart.title for chart in charts[:4]] == titles
    drawn = {chart.title: [line.label for line in chart.lines] for chart in charts}
    assert drawn["Reward"] == ["total", "accuracy reward", "format reward"]
    assert drawn["Held-out accuracy"] == drawn["Held-out accuracy, strict"] == ["all", "colour"]
    assert drawn["Clipped tokens"] == ["below", "above"]
    assert drawn["Groups without signal"] == ["without signal"]
    assert drawn["Time of an update"] == ["rollout", "train", "other"]
    assert drawn["KL to the reference"] == []
    assert drawn["Fraction of the limit"] == ["step"]
    by_title = {chart.title: chart for chart in charts}
    assert [points[1][0] for _, points in ((x.label, x.points) for x in by_title["Time of an update"].lines)] == [
        2,
        1,
        1,
    ]
    assert by_title["Peak memory"].lines[0].points[1][0] == 1.0
    assert by_title["Held-out accuracy"].levels == {"chance": 0.2}
    assert [line.points[1][0] for line in by_title["Held-out accuracy, strict"].lines] == [0.25, 0.5]
    assert by_title["Held-out accuracy, strict"].levels == {}


def test_every_metric_is_in_a_chart(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    charts = run_charts(run.series, run.picks, {})
    assert [chart.title for chart in other_charts(run.series, charts)] == ["my_own_number"]


def test_metrics_of_a_rollout_have_a_title() -> None:
    """All that there are: with steps, with guesses and with graphs."""
    costs = RolloutCosts()
    costs.prefill_seconds = costs.decode_seconds = 1.0
    costs.add_step(1, 1)
    costs.add_guess(1, 1)
    names = [f"rollout/{name}" for name in costs.metrics(build_text_model("llama"), 1, StepGraphs(lambda *_: None))]
    assert len(names) > 9
    series = {name: (np.array([1]), np.array([1.0])) for name in (*names, "rollout/unheard_of")}
    charts = run_charts(series, Picks(), {})
    (speed,) = (chart for chart in charts if chart.title == "Tokens per second")
    assert [line.label for line in speed.lines] == ["drawn, while sampling"]
    others = other_charts(series, charts)
    assert len(others) == len(names)  # one is drawn above
    assert [chart.title for chart in others if "_" in chart.title or "/" in chart.title] == ["rollout/unheard_of"]
    assert all(chart.unit and chart.bottom == 0 for chart in others if chart.title != "rollout/unheard_of")


def test_the_speed_of_a_rollout_under_its_earlier_name(tmp_path: Path) -> None:
    """A run of an earlier version has it twice, one without an engine only so."""
    old = {"rollout_tokens_per_second": 8.0, "rollout/tokens_per_second": 9.0}
    for given, shown in ((old, 9.0), ({"rollout_tokens_per_second": 8.0}, 8.0)):
        folder = write_run(tmp_path / str(shown))
        write_lines(folder / "metrics.jsonl", [metrics_row(step, **given) for step in (1, 2)])
        run = read_run(folder)
        charts = run_charts(run.series, run.picks, {})
        (speed,) = (chart for chart in charts if chart.title == "Tokens per second")
        drawn = {line.label: line.points[1].tolist() for line in speed.lines}
        assert drawn == {"completion tokens, whole update": [100.0] * 2, "drawn, while sampling": [shown] * 2}
        assert [chart.title for chart in other_charts(run.series, charts)] == ["my_own_number"]


def test_a_single_reward_function_is_drawn_once(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    run.series["rewards/only"] = (run.series["reward"][0], run.series["reward"][1].copy())
    labels = [line.label for line in run_charts(run.series, run.picks, {})[0].lines]
    assert labels == ["total", "accuracy reward", "format reward"]
    assert other_charts(run.series, run_charts(run.series, run.picks, {}))[0].title == "my_own_number"


def test_a_phase_that_some_updates_lack_leaves_the_stack_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    run.series["time/evaluation_seconds"] = (np.array([10, 20]), np.array([0.5, 0.25]))
    (times,) = (chart for chart in run_charts(run.series, run.picks, {}) if chart.title == "Time of an update")
    assert np.sum([line.points[1] for line in times.lines], axis=0).tolist() == [4.0] * 20
    assert times.lines[2].points[1].tolist() == [0.0] * 9 + [0.5] + [0.0] * 9 + [0.25]
