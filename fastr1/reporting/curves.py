"""Draws a run: reward and its parts, completion length, KL and accuracy over the updates, as one PNG.

Several runs of the same length, such as three seeds, are drawn as their mean over the single runs, faint.
Reads metrics.jsonl of the run folder and, where present, summary.json, whose optional entries "title" (text) and
"accuracy" ({label: accuracy between 0 and 1}, drawn as horizontal lines) describe results measured outside the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastr1.reporting.run_log import METRICS_FILE, RunLogError, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_FILE = "report.png"
SUMMARY_FILE = "summary.json"

Series = tuple[np.ndarray, np.ndarray]  # steps (n,), values (n,), or (n, R) of R runs

_COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d")


class ReportError(RunLogError):
    """A run folder cannot be drawn. The message names the file and the remedy."""


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Draws the run in `run_dir` and returns the path of the PNG, `report.png` in that folder by default.

    Raises: RunLogError when the folder holds no metrics, ReportError when it holds none that can be drawn.
    """
    folder = Path(run_dir)
    series = read_series(folder / METRICS_FILE)
    summary = _read_summary(folder / SUMMARY_FILE)
    if not series:
        raise ReportError(f"{folder / METRICS_FILE} has no numbers yet; wait for the first update")
    target = Path(output) if output is not None else folder / REPORT_FILE
    title = str(summary.get("title", f"Run {folder.resolve().name}"))
    draw_report(series, target, title=title, accuracy=summary.get("accuracy", {}))
    return target


def draw_report(
    series: Mapping[str, Series],
    target: Path,
    *,
    title: str,
    accuracy: Mapping[str, float],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Draws metrics as a PNG, with `accuracy` as horizontal lines; `metadata` becomes text chunks of the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever the user's matplotlib settings
    axes = figure.subplots(2, 2)
    figure.suptitle(_plain(title), fontsize=14, fontweight="bold")
    _draw_reward(axes[0, 0], series)
    _draw_length(axes[0, 1], series)
    _draw_kl(axes[1, 0], series)
    _draw_accuracy(axes[1, 1], series, accuracy)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(str(target), metadata=dict(metadata or {}))
    except OSError as error:
        raise ReportError(f"{target} cannot be written ({error.strerror}); choose another place") from error


def merge_runs(runs: Sequence[Mapping[str, Series]]) -> dict[str, Series]:
    """The metrics that all runs have, their values side by side, (n, R).

    Raises: ReportError when runs have a metric at different steps.
    """
    merged = {}
    for name in runs[0]:
        if not all(name in run for run in runs):
            continue
        steps = runs[0][name][0]
        if not all(np.array_equal(run[name][0], steps) for run in runs):
            raise ReportError(f"{name} was not logged at the same steps in all runs; draw them one by one")
        merged[name] = (steps, np.stack([run[name][1] for run in runs], axis=1))
    return merged


def read_series(path: Path) -> dict[str, Series]:
    """Every metric of a file of rows, as `to_series`."""
    return to_series(read_rows(path))


def to_series(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Every metric as (steps, values), sorted by step; nulls become NaN, a later row of a step replaces an earlier."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, (int, float))):
                found.setdefault(name, {})[row["step"]] = float("nan") if value is None else float(value)
    return {
        name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in found.items()
    }


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values (half as many at both ends), ignoring NaN; NaN where all are NaN.

    Shapes: values (n,) float → (n,) float. The result does not lag behind its input.
    """
    valid = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(valid, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(valid)])
    positions = np.arange(len(values))
    low = np.maximum(positions - window // 2, 0)
    high = np.minimum(positions + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}; repair or remove it") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("accuracy", {}), dict):
        raise ReportError(f'{path} must be an object and its "accuracy" an object of numbers; repair or remove it')
    for label, value in summary.get("accuracy", {}).items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ReportError(f'{path}: accuracy of "{label}" is {value!r}; it must be a number between 0 and 1')
    return summary


def _draw_reward(axes: Axes, series: Mapping[str, Series]) -> None:
    names = ["reward"] if "reward" in series else []
    # A single reward function is the total itself: drawn once.
    total = series.get("reward", (np.empty(0), np.empty(0)))[1]
    parts = sorted(name for name in series if name.startswith("rewards/"))
    names += [name for name in parts if not np.array_equal(series[name][1], total, equal_nan=True)]
    for name, color in zip(names, _COLORS, strict=False):
        label = "total" if name == "reward" else name.removeprefix("rewards/").replace("_", " ")
        _draw_line(axes, series[name], label, color, width=2.4 if name == "reward" else 1.5)
    _finish(axes, "Reward", "mean reward per completion", len(names))


def _draw_length(axes: Axes, series: Mapping[str, Series]) -> None:
    if "completion_length" in series:
        _draw_line(axes, series["completion_length"], "completion length", _COLORS[0])
    _finish(axes, "Completion length", "tokens per completion (mean)", int("completion_length" in series))
    if "completion_length" in series:
        axes.set_ylim(bottom=0)


def _draw_kl(axes: Axes, series: Mapping[str, Series]) -> None:
    if "kl" in series:
        _draw_line(axes, series["kl"], "KL to the reference", _COLORS[0])
        axes.set_ylim(bottom=min(0.0, float(np.nanmin(series["kl"][1], initial=0.0))))
    _finish(
        axes,
        "KL to the reference model",
        "nats per token (mean)",
        int("kl" in series),
        empty="not measured\n(no reference model)",
    )


def _draw_accuracy(axes: Axes, series: Mapping[str, Series], fixed: Mapping[str, float]) -> None:
    train = sorted(name for name in series if name.startswith("rewards/") and "accuracy" in name)
    held_out = [name for name in sorted(series) if name == "eval/strict_accuracy" or name.startswith("eval/accuracy")]
    for name, color in zip(train, cycle(_COLORS), strict=False):
        _draw_line(axes, _percent(series[name]), "training rollouts (sampled)", color)
    for name, color in zip(held_out, cycle(_COLORS[1:]), strict=False):
        is_total = name == "eval/accuracy"
        label = "held-out" if is_total else _plain(name.removeprefix("eval/accuracy/").replace("_", " "))
        steps, values = _percent(series[name])
        width, style = (2.4, "o-") if is_total else (1.2, "o:")
        if is_total and values.ndim == 2:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _mean(values), style, color=color, linewidth=width, markersize=2.5 * width**0.5, label=label)
    for (label, value), style in zip(fixed.items(), cycle(("--", "-.", ":")), strict=False):
        text = _plain(f"{label} ({100 * value:.0f} %)")
        axes.axhline(100 * value, linestyle=style, linewidth=1.2, color="black", label=text)
    axes.set_ylim(-2, 102)
    _finish(axes, "Accuracy", "correct answers (%)", len(train) + len(held_out) + len(fixed), always_legend=True)
    if axes.get_legend() is not None:  # many lines: beside the panel, not over it
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _plain(text: str) -> str:
    """For matplotlib, which takes what is between two dollar signs for a formula and refuses one that is none."""
    return text.replace("$", r"\$")


def _percent(points: Series) -> Series:
    return points[0], 100 * points[1]


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the runs: (n,) or (n, R) → (n,)."""
    return values if values.ndim == 1 else values.mean(axis=1)


def _draw_line(axes: Axes, points: Series, label: str, color: str, width: float = 2.0) -> None:
    """The moving average over a twentieth of the run; behind it, faint, the raw values, or the average of each run."""
    steps, values = points
    window = max(1, len(values) // 20)
    faint = values if values.ndim == 1 else np.stack([smooth(run, window) for run in values.T], axis=1)
    if window > 1:
        axes.plot(steps, faint, color=color, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) == 1 else None  # a line through one point is invisible
    axes.plot(steps, smooth(_mean(values), window), color=color, linewidth=width, label=_plain(label), marker=marker)


def _finish(
    axes: Axes, title: str, unit: str, num_lines: int, *, empty: str = "not measured", always_legend: bool = False
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=12)
    axes.set_xlabel("update")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if num_lines == 0:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", color="#666666")
        axes.set_xticks([])
        axes.set_yticks([])
    elif num_lines > 1 or always_legend:
        axes.legend(fontsize=9, framealpha=0.85)
