"""Geometry of the line charts of a page: numbers in, paths and ticks of an SVG out. Templates write the SVG.

A line of more than `MAX_POINTS` is thinned to the mean of as many bins, between whose smallest and largest value a band
is drawn, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastr1.reporting.curves import Series, smooth

MAX_POINTS = 300
MAX_LINES = 24  # of a chart
WIDTH, HEIGHT = 460, 210  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 22  # margins
FEW_POINTS = 60  # up to here, points that were measured now and then are marked


@dataclass(frozen=True)
class Line:
    """One line: values (n,) float at steps (n,) int, NaN where there is none."""

    label: str
    points: Series
    color: int  # of the palette, from 0
    is_bold: bool = False
    has_markers: bool = False  # measured now and then: not smoothed
    spread: tuple[np.ndarray, np.ndarray] | None = None  # (n,) lowest and highest, of several runs


@dataclass(frozen=True)
class Chart:
    """What is drawn together. A stacked chart has the lines on top of each other, all at the same steps."""

    title: str
    unit: str
    lines: Sequence[Line]
    hint: str = ""  # how to read it
    empty: str = ""  # why there are no lines, where that is known
    levels: Mapping[str, float] = field(default_factory=dict)  # horizontal lines
    bottom: float | None = None  # the axis reaches at least to here
    top: float | None = None
    is_stacked: bool = False
    is_smoothed: bool = True


def layout(chart: Chart, identifier: str, steps: tuple[int, int] | None = None) -> dict[str, Any]:
    """What the template writes: paths, ticks, legend, and the values that a page shows under the pointer. `steps` are
    the first and last of the axis, the same for all charts of a page; None: those of the lines."""
    lines = [line for line in chart.lines if np.isfinite(line.points[1]).any()]
    lines, num_more = lines[:MAX_LINES], max(0, len(lines) - MAX_LINES)
    hint = f"{chart.hint} {num_more} further lines are left out." if num_more else chart.hint
    drawn: dict[str, Any] = {"id": identifier, "title": chart.title, "unit": chart.unit, "hint": hint}
    drawn |= {"is_empty": not lines, "empty": chart.empty, "lines": [], "levels": [], "data": []}
    if not lines:
        return drawn
    shapes = (
        _stack(lines, chart.is_smoothed) if chart.is_stacked else [_shape(line, chart.is_smoothed) for line in lines]
    )
    axes = _Axes(chart, shapes, steps)
    for line, shape in zip(lines, shapes, strict=True):
        places, values = _thin(*line.points)[:2]
        last = values[np.isfinite(values)][-1]
        drawn["data"].append({"steps": _numbers(places), "values": _numbers(values)})
        drawn["lines"].append(
            {
                "label": line.label,
                "color": line.color,
                "is_bold": line.is_bold,
                "path": axes.path(shape.steps, shape.middle),
                "faint": None if shape.raw is None else axes.path(*shape.raw),
                "band": None if shape.low is None else axes.band(shape.steps, shape.low, shape.high),
                "markers": axes.places(shape.steps, shape.middle) if shape.has_markers else [],
                "last": format_number(float(last)),
            }
        )
    drawn["levels"] = [
        {"label": label, "y": axes.y(value), "value": format_number(value)} for label, value in chart.levels.items()
    ]
    drawn["x_ticks"] = [{"x": axes.x(tick), "text": format_number(tick)} for tick in axes.x_ticks]
    drawn["y_ticks"] = [{"y": axes.y(tick), "text": format_number(tick)} for tick in axes.y_ticks]
    drawn["x_range"], drawn["is_stacked"] = [axes.first, axes.last], chart.is_stacked
    return drawn


def format_number(value: float) -> str:
    """Short: 0.0123, 1.5, 27.3, 1,544, 2.1M, 3.2e-07."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e9:.3g}G" if size >= 1e9 else f"{value / 1e6:.3g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 0.001:
        return f"{value:.3g}"
    return f"{value:.2g}"


@dataclass(frozen=True)
class _Shape:
    steps: np.ndarray
    middle: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    raw: Series | None = None
    has_markers: bool = False


def _shape(line: Line, is_smoothed: bool) -> _Shape:
    steps, values = line.points
    has_markers = len(steps) == 1 or (line.has_markers and len(steps) <= FEW_POINTS)
    window = 1 if line.has_markers or not is_smoothed else max(1, len(values) // 20)
    if line.spread is not None:
        places, middle, low, high = _thin(steps, *(smooth(part, window) for part in (values, *line.spread)))
        return _Shape(places, middle, low, high, has_markers=has_markers)
    middle = smooth(values, window)
    if len(values) > MAX_POINTS:
        places, _, low, high = _thin(steps, values)
        return _Shape(places, _thin(steps, middle)[1], low, high)
    return _Shape(steps, middle, raw=(steps, values) if window > 1 else None, has_markers=has_markers)


def _stack(lines: Sequence[Line], is_smoothed: bool) -> list[_Shape]:
    """Areas on top of each other: every one from the sum of those before it to its own."""
    shapes: list[_Shape] = []
    below = np.zeros(1)
    for line in lines:
        steps, values = line.points[0], np.nan_to_num(line.points[1])
        window = max(1, len(values) // 20) if is_smoothed else 1
        steps, values, _, _ = _thin(steps, smooth(values, window))
        above = below + values
        shapes.append(_Shape(steps, above, np.broadcast_to(below, above.shape), above))
        below = above
    return shapes


def _thin(
    steps: np.ndarray, values: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` bins of neighbours: last step, mean, lowest and highest, ignoring NaN."""
    low, high = values if low is None else low, values if high is None else high
    if len(values) <= MAX_POINTS:
        return steps, values, low, high
    bins = np.array_split(np.arange(len(values)), MAX_POINTS)
    thinned = [(steps[b[-1]], _mean(values[b]), *_extremes(low[b], high[b])) for b in bins]
    columns = list(zip(*thinned, strict=True))
    return np.array(columns[0]), np.array(columns[1]), np.array(columns[2]), np.array(columns[3])


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _extremes(low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    low, high = low[np.isfinite(low)], high[np.isfinite(high)]
    return (float(low.min()), float(high.max())) if len(low) and len(high) else (math.nan, math.nan)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


class _Axes:
    """Steps and values → places in the drawing."""

    def __init__(self, chart: Chart, shapes: Sequence[_Shape], steps: tuple[int, int] | None) -> None:
        self.first = float(min(shape.steps[0] for shape in shapes) if steps is None else steps[0])
        self.last = float(max(shape.steps[-1] for shape in shapes) if steps is None else steps[1])
        found = [part for shape in shapes for part in (shape.middle, shape.low, shape.high) if part is not None]
        found += [shape.raw[1] for shape in shapes if shape.raw is not None]
        values = np.concatenate([*found, np.array(list(chart.levels.values()), dtype=float)])
        values = values[np.isfinite(values)]
        low = min(float(values.min()), math.inf if chart.bottom is None else chart.bottom)
        high = max(float(values.max()), -math.inf if chart.top is None else chart.top)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            margin = abs(high) / 10 or 1.0
            low, high = low - margin if chart.bottom is None else low, high + margin
        self.y_ticks = _ticks(low, high, 4)
        self.low, self.high = min(low, self.y_ticks[0]), max(high, self.y_ticks[-1])
        self.x_ticks = [tick for tick in _ticks(self.first, self.last, 5) if tick == int(tick)]

    def x(self, step: float) -> float:
        width = WIDTH - LEFT - RIGHT
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return round(LEFT + width * share, 1)

    def y(self, value: float) -> float:
        height = HEIGHT - TOP - BOTTOM
        return round(TOP + height * (self.high - value) / (self.high - self.low), 1)

    def places(self, steps: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
        pairs = zip(steps.tolist(), values.tolist(), strict=True)
        return [(self.x(step), self.y(value)) for step, value in pairs if math.isfinite(value)]

    def path(self, steps: np.ndarray, values: np.ndarray) -> str:
        """Broken where a value is missing."""
        parts, command = [], "M"
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            if math.isfinite(value):
                parts.append(f"{command}{self.x(step):g} {self.y(value):g}")
                command = "L"
            else:
                command = "M"
        return "".join(parts)

    def band(self, steps: np.ndarray, low: np.ndarray, high: np.ndarray | None) -> str:
        assert high is not None
        is_there = np.isfinite(low) & np.isfinite(high)
        places = self.places(steps[is_there], high[is_there]) + self.places(steps[is_there], low[is_there])[::-1]
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in places) + "Z"


def _ticks(low: float, high: float, number: int) -> list[float]:
    """Round numbers within [low, high]; at least one, which may lie outside where the range is a point."""
    if high <= low:
        return [low]
    raw = (high - low) / number
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = [
        round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, math.floor(high / step + 1e-9) + 1)
    ]
    return ticks or [low]
