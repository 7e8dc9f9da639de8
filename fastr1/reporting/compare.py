"""Several runs on one page: curves over each other, final numbers and settings side by side.

Runs that differ only in their seed are a set: its curve is the mean with the range of its runs as a band, its numbers
are the mean and the range.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastr1.reporting.charts import Chart, Line, format_number, layout
from fastr1.reporting.curves import Series
from fastr1.reporting.page import first_notes, headline, render, training_seconds, write_text
from fastr1.reporting.read_run import Run, read_run
from fastr1.reporting.run_charts import metric_title
from fastr1.reporting.run_log import RunLogError
from fastr1.reporting.settings import SEED, differing, flatten, identity

MAX_CHARTS = 60
# what a page of several runs shows first; the other metrics follow by name
_FIRST = (
    *("reward", "eval/accuracy", "eval/strict_accuracy", "completion_length", "completion_clipped_ratio", "kl"),
    *("entropy", "groups_without_signal", "reward_std", "grad_norm", "tokens_per_second", "time/step_seconds"),
)


@dataclass(frozen=True)
class RunSet:
    """Runs that differ only in their seed, at least one."""

    label: str
    runs: tuple[Run, ...]


def write_comparison(run_dirs: Sequence[str | Path], output: str | Path) -> Path:
    """Writes one page of several runs and returns its path.

    Raises: RunLogError when one of them is not the folder of a run, has no numbers yet, or is named twice.
    """
    places = [Path(folder).resolve() for folder in run_dirs]
    for folder, place in zip(run_dirs, places, strict=True):
        if places.count(place) > 1:
            raise RunLogError(f"{folder} is named twice, and would count twice in a mean; name every run once")
    runs = [read_run(folder, with_rollouts=False) for folder in run_dirs]
    for run in runs:
        if not run.series:
            raise RunLogError(
                f"{run.folder} has no rows of metrics.jsonl to compare; leave it out, or wait for the first"
            )
    return write_text(Path(output), build_comparison(runs), "--output")


def build_comparison(runs: Sequence[Run]) -> str:
    """The page as text."""
    sets = group_runs(runs)
    last = max(run.last_step for run in runs)
    charts = [layout(chart, f"chart-{i}", (1, last)) for i, chart in enumerate(compare_charts(sets))]
    return render(
        "compare.html",
        title="Runs beside each other",
        version=None,
        sets=[_set_view(place, found) for place, found in enumerate(sets)],
        notes=first_notes(
            [
                *_repeated_seeds(sets),
                *_left_out(sets),
                *(f"{run.name}: {note}" for run in runs for note in run.notes),
            ]
        ),
        rows=_final_rows(sets),
        settings=differing([run.config for run in runs]),
        names=_names(runs),
        charts=charts,
        chart_data={chart["id"]: chart["data"] for chart in charts},
        sheets={},
    )


def group_runs(runs: Sequence[Run]) -> list[RunSet]:
    """Sets in the order of their first runs. Runs without settings are alone: nothing says what they share."""
    found: list[list[Run]] = []
    for run in runs:
        alike = (group for group in found if run.config and identity(group[0].config) == identity(run.config))
        group = next(alike, None)
        if group is None:
            found.append([run])
        else:
            group.append(run)
    names = dict(zip(map(id, runs), _names(runs), strict=True))
    return [RunSet(_label([names[id(run)] for run in group]), tuple(group)) for group in found]


def _names(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path) for path in parts]


def _label(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def compared_metrics(sets: Sequence[RunSet]) -> list[str]:
    """Every metric that a run has, in the order of the page."""
    names = dict.fromkeys(name for found in sets for run in found.runs for name in run.series)
    return [name for name in _FIRST if name in names] + sorted(set(names) - {*_FIRST, "epoch"})


def compare_charts(sets: Sequence[RunSet]) -> list[Chart]:
    """One chart for each of the first metrics, a line for every set."""
    charts = []
    for name in compared_metrics(sets)[:MAX_CHARTS]:
        lines = []
        for place, found in enumerate(sets):
            merged = merge([run.series[name] for run in found.runs if name in run.series])
            if merged is not None:
                points, spread = merged
                few = name.startswith("eval/")
                lines.append(Line(found.label, points, place, has_markers=few, spread=spread))
        title, unit, bottom = metric_title(name)
        charts.append(Chart(title, unit, lines, bottom=bottom))
    return charts


def merge(series: Sequence[Series]) -> tuple[Series, tuple[np.ndarray, np.ndarray] | None] | None:
    """Mean, and of several the lowest and highest, at the steps that all have; None where there is no such step."""
    if not series:
        return None
    steps = series[0][0]
    for other, _ in series[1:]:
        steps = np.intersect1d(steps, other)
    if not len(steps):
        return None
    table = np.stack([values[np.isin(places, steps)] for places, values in series])
    if len(series) == 1:
        return (steps, table[0]), None
    return (steps, table.mean(axis=0)), (table.min(axis=0), table.max(axis=0))


def _seeds(found: RunSet) -> list[str]:
    return [str(flatten(run.config).get(SEED, "?")) for run in found.runs]


def _repeated_seeds(sets: Sequence[RunSet]) -> Iterator[str]:
    for found in sets:
        for seed, number in Counter(_seeds(found)).items():
            if number > 1:
                yield f"{found.label}: {number} runs have the seed {seed}; the mean counts each of them."


def _left_out(sets: Sequence[RunSet]) -> Iterator[str]:
    number = len(compared_metrics(sets)) - MAX_CHARTS
    if number > 0:
        yield f"{number} metrics are left out to keep the page small; metrics.jsonl of the runs has them."


def _set_view(place: int, found: RunSet) -> dict[str, Any]:
    states = ["finished" if run.is_finished else f"update {run.last_step}, not finished" for run in found.runs]
    folders = [str(run.folder) for run in found.runs]
    return {
        "label": found.label,
        "color": place,
        "seeds": ", ".join(_seeds(found)),
        "runs": list(zip(folders, states, strict=True)),
    }


def _final_rows(sets: Sequence[RunSet]) -> list[tuple[str, list[str]]]:
    """(name, text per set) of what each came to."""
    rows: dict[str, Callable[[Run], float | None]] = {
        "accuracy before": lambda run: (headline(run) or {}).get("before"),
        "accuracy after": lambda run: (headline(run) or {}).get("after"),
        "strict accuracy, last in training": lambda run: _last(run, "eval/strict_accuracy"),
        "reward, last tenth": lambda run: _last_tenth(run, "reward"),
        "completion length, last tenth": lambda run: _last_tenth(run, "completion_length"),
        "KL, last tenth": lambda run: _last_tenth(run, "kl"),
        "entropy, last tenth": lambda run: _last_tenth(run, "entropy"),
        "tokens per second, mean": lambda run: _mean(run, "tokens_per_second", 1.0),
        "training time, minutes": _minutes,
        "updates": lambda run: float(run.last_step),
    }
    table = [
        (name, [_spread([pick(run) for run in found.runs], name) for found in sets]) for name, pick in rows.items()
    ]
    table.insert(2, ("accuracy of", ["; ".join(dict.fromkeys(map(_measured_on, found.runs))) for found in sets]))
    return [(name, texts) for name, texts in table if any(text != "–" for text in texts)]


def _measured_on(run: Run) -> str:
    found = headline(run)
    return "–" if found is None else f"{found['of']}, {found['when']}"


def _spread(values: Sequence[float | None], name: str) -> str:
    """The mean, and of several their range; – where a run has none."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return "–"

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if "accuracy" in name else format_number(value)

    mean, low, high = text(sum(numbers) / len(numbers)), text(min(numbers)), text(max(numbers))
    return mean if low == high else f"{mean} ({low} – {high})"


def _last(run: Run, name: str) -> float | None:
    return float(run.series[name][1][-1]) if name in run.series else None


def _last_tenth(run: Run, name: str) -> float | None:
    return _mean(run, name, 0.1)


def _mean(run: Run, name: str, share: float) -> float | None:
    """Over the last share of the run."""
    if name not in run.series:
        return None
    values = run.series[name][1]
    values = values[-max(1, round(len(values) * share)) :]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _minutes(run: Run) -> float | None:
    seconds = training_seconds(run)
    return None if seconds is None else seconds / 60
