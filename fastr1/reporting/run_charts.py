"""Which metrics of a run are drawn together, and how each chart is read. What no chart names is drawn on its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fastr1.reporting.charts import Chart, Line
from fastr1.reporting.curves import Series
from fastr1.reporting.rollout_picks import SHARES, Picks

_ACCURACIES = (
    ("Held-out accuracy", "eval/accuracy", "Greedy, on the held-out questions of the run; every right letter counts."),
    ("Held-out accuracy, strict", "eval/strict_accuracy", "The same answers: right and well formed."),
)
# Title, unit and bottom of the axis of what is drawn alone.
_ALONE: dict[str, tuple[str, str, float | None]] = {
    "rollout/prefill_tokens_per_second": ("Rollout: reading prompts", "tokens per second", 0),
    "rollout/decode_tokens_per_second": ("Rollout: drawing", "tokens per second", 0),
    "rollout/decode_gb_per_second": ("Rollout: memory read while drawing", "10⁹ bytes per second", 0),
    "rollout/decode_steps": ("Rollout: steps", "per update", 0),
    "rollout/wasted_rows": ("Rollout: rows that gave no token", "share of rows", 0),
    "rollout/warm_up_seconds": ("Rollout: memory, first step and graphs made anew", "seconds", 0),
    "rollout/mean_acceptance_length": ("Speculation: tokens of a completion", "per step", 0),
    "rollout/draft_acceptance_rate": ("Speculation: right guesses", "share of guessed tokens", 0),
    "rollout/graph_replays": ("Rollout: graphs replayed", "so far", 0),
    "rollout/graph_captures": ("Rollout: graphs captured", "so far", 0),
    "sampler_ratio_max": ("Sampler against trainer: largest ratio", "trainer over sampler", None),
    "sampler_ess": ("Sampler against trainer: effective samples", "share of tokens", None),
    "sampler_weight": ("Weight of the sampler correction", "mean", 0),
    "ratio": ("Ratio of new and old probabilities", "mean of tokens", None),
    "bad_samples": ("Bad samples", "so far", 0),
    "eval/num_questions": ("Held-out questions", "answered", 0),
    "eval/num_left_out": ("Held-out questions left out", "bad ones", 0),
}
_ASIDE = "time/step_seconds"  # the whole of which the other times are parts

# title, unit, hint, {metric: label}, options
_FIXED: tuple[tuple[str, str, str, dict[str, str], dict[str, float]], ...] = (
    (
        "Spread of rewards in a group",
        "standard deviation",
        "What GRPO learns from. Near 0, all completions of a prompt get the same reward.",
        {"reward_std": "within a group", "advantage_abs": "mean |advantage|"},
        {"bottom": 0},
    ),
    (
        "Groups without signal",
        "groups per update",
        "All completions were rewarded alike; they take no part in the update.",
        {"groups_without_signal": "without signal", "extra_groups": "drawn in addition"},
        {"bottom": 0},
    ),
    (
        "Completion length",
        "tokens",
        "A mean that creeps to the limit, or falls to nothing, is a reward that is played.",
        {"completion_length": "mean", "completion_length_max": "longest"},
        {"bottom": 0},
    ),
    (
        "Cut off at the length limit",
        "share of completions",
        "Truncated completions have no answer.",
        {"completion_clipped_ratio": "truncated"},
        {"bottom": 0, "top": 0.05},
    ),
    (
        "KL to the reference",
        "nats per token",
        "How far the policy has moved. Jumps come before collapse.",
        {"kl": "KL"},
        {"bottom": 0},
    ),
    (
        "Entropy",
        "nats per token",
        "Near 0 the policy explores no more; rising entropy is noise that is rewarded.",
        {"entropy": "entropy"},
        {"bottom": 0},
    ),
    (
        "Clipped tokens",
        "share of tokens",
        "0 with one step of the optimizer per rollout, where the ratio is 1.",
        {"clip_low": "below", "clip_high": "above"},
        {"bottom": 0, "top": 0.01},
    ),
    ("Gradient norm", "before clipping", "Spikes name the updates to look at.", {"grad_norm": "norm"}, {"bottom": 0}),
    ("Loss", "", "Its size says little in GRPO; its noise does.", {"loss": "loss"}, {}),
    ("Learning rate", "", "", {"learning_rate": "learning rate"}, {"bottom": 0}),
    (
        "Sampler against trainer",
        "nats per token",
        "Log-probabilities of the same tokens under the same weights: should be rounding.",
        {"sampler_gap": "mean gap", "sampler_k3": "KL (k3)"},
        {"bottom": 0},
    ),
    (
        "Tokens per second",
        "tokens per second",
        "",
        {
            "tokens_per_second": "completion tokens, whole update",
            "rollout/tokens_per_second": "drawn, while sampling",
            "train_tokens_per_second": "forwarded, while training",
        },
        {"bottom": 0},
    ),
)


def run_charts(series: Mapping[str, Series], picks: Picks, levels: Mapping[str, float]) -> list[Chart]:
    """The charts of a run, what a reward is debugged with first. `levels`: accuracies measured outside the run."""
    fixed = {title: _chart(series, title, unit, hint, names, options) for title, unit, hint, names, options in _FIXED}
    first = [_reward(series), *_accuracy(series, levels), *_shares(picks)]
    return [*first, *fixed.values(), _times(series), _limit(series), _memory(series)]


def other_charts(series: Mapping[str, Series], shown: Iterable[Chart]) -> list[Chart]:
    """One for each metric that is in none of the others."""
    drawn = {id(line.points[1]) for chart in shown for line in chart.lines}
    known = {name for *_, names, _ in _FIXED for name in names}
    prefixes = ("time/", "roofline/", "mfu/", "bandwidth/")
    rest = [
        name
        for name, points in sorted(series.items())
        if id(points[1]) not in drawn
        and name not in known
        and not name.startswith((*prefixes, "rewards/"))
        and name not in ("epoch", "peak_memory_bytes")
    ]
    return [_alone(name, series[name]) for name in rest]


def _alone(name: str, points: Series) -> Chart:
    title, unit, bottom = metric_title(name)
    return Chart(title, unit, [Line(name, points, 0)], bottom=bottom)


def _chart(
    series: Mapping[str, Series],
    title: str,
    unit: str,
    hint: str,
    names: Mapping[str, str],
    options: Mapping[str, float],
) -> Chart:
    lines = [Line(label, series[name], i) for i, (name, label) in enumerate(names.items()) if name in series]
    empty = "there is no reference model" if "kl" in names else ""
    return Chart(title, unit, lines, hint, empty, bottom=options.get("bottom"), top=options.get("top"))


def _reward(series: Mapping[str, Series]) -> Chart:
    lines = [Line("total", series["reward"], 0, is_bold=True)] if "reward" in series else []
    for name in sorted(name for name in series if name.startswith("rewards/")):
        if lines and np.array_equal(series[name][1], lines[0].points[1], equal_nan=True):
            continue  # a single reward function is the total itself
        lines.append(Line(name.removeprefix("rewards/").replace("_", " "), series[name], len(lines)))
    hint = "Mean per completion. Which part moves the total? A part that rises alone is a reward that is played."
    return Chart("Reward", "per completion", lines, hint)


def _accuracy(series: Mapping[str, Series], levels: Mapping[str, float]) -> list[Chart]:
    """Lenient and strict, each with its kinds. `levels` are lenient."""
    charts: list[Chart] = []
    for title, name, hint in _ACCURACIES:
        lines = [Line("all", series[name], 0, is_bold=True, has_markers=True)] if name in series else []
        for kind in sorted(kind for kind in series if kind.startswith(f"{name}/")):
            # of the same colour in both
            lines.append(Line(kind.removeprefix(f"{name}/"), series[kind], len(lines), has_markers=True))
        empty = "run.eval_steps is 0, or not reached yet"
        shown = levels if lines and not charts else {}
        charts.append(Chart(title, "share of questions", lines, hint, empty, levels=shown, bottom=0, top=1))
    return charts


def _shares(picks: Picks) -> list[Chart]:
    """How hard the prompts are for the policy, from the completions themselves."""
    if not len(picks.share_steps):
        return []
    lines = [
        Line(label, (picks.share_steps, picks.shares[:, i]), color)
        for i, (label, color) in enumerate(zip(SHARES, (2, 0, 1), strict=True))
    ]
    hint = "Only the middle teaches what is right. All right: too easy; all wrong: too hard."
    return [Chart("Prompts by outcome", "share of groups", lines, hint, bottom=0, top=1, is_stacked=True)]


def _times(series: Mapping[str, Series]) -> Chart:
    """Phases on top of each other, and what of an update no phase accounts for."""
    names = [name for name in series if name.startswith("time/") and name != _ASIDE]
    steps = series[_ASIDE][0] if _ASIDE in series else np.unique(np.concatenate([[], *(series[n][0] for n in names)]))
    lines: list[Line] = []
    total = np.zeros(len(steps))
    for name in names:
        values = np.zeros(len(steps))
        values[np.isin(steps, series[name][0])] = np.nan_to_num(series[name][1][np.isin(series[name][0], steps)])
        total += values
        label = name.removeprefix("time/").removesuffix("_seconds").replace("_", " ")
        lines.append(Line(label, (steps, values), len(lines)))
    if _ASIDE in series:
        rest = np.maximum(np.nan_to_num(series[_ASIDE][1]) - total, 0)
        lines.append(Line("other", (steps, rest), len(lines)))
    return Chart("Time of an update", "seconds", lines, "By phase, of the slowest process.", bottom=0, is_stacked=True)


def _limit(series: Mapping[str, Series]) -> Chart:
    names = [name for name in sorted(series) if name.startswith(("roofline/", "mfu/", "bandwidth/"))]
    ordered = sorted(names, key=lambda name: name != "roofline/step")
    lines = [Line(_limit_label(name), series[name], i, is_bold=i == 0) for i, name in enumerate(ordered)]
    hint = "Least possible time over time taken; 1 is the limit of the machine."
    return Chart("Fraction of the limit", "share", lines, hint, bottom=0)


def _limit_label(name: str) -> str:
    kind, _, phase = name.partition("/")
    return {"roofline": phase, "mfu": f"MFU, {phase}", "bandwidth": f"bandwidth, {phase}"}[kind]


def _memory(series: Mapping[str, Series]) -> Chart:
    lines: list[Line] = []
    if "peak_memory_bytes" in series:
        steps, values = series["peak_memory_bytes"]
        lines = [Line("peak", (steps, values / 2**30), 0)]
    return Chart("Peak memory", "GiB", lines, "Of the process that needed most.", bottom=0)


def metric_title(name: str) -> tuple[str, str, float | None]:
    """Title, unit and bottom of the axis of a metric that is drawn alone; its own name where none is known."""
    if name in _ALONE:
        return _ALONE[name]
    for title, unit, _, names, options in _FIXED:
        if name in names:
            alone = title if len(names) == 1 else f"{title}: {names[name]}"
            return alone, unit, options.get("bottom")
    if name.startswith("eval/") and ("accuracy" in name or name.endswith("_rate")):
        return f"Held-out {name.removeprefix('eval/').replace('_', ' ')}", "share of questions", 0
    if name == "reward" or name.startswith("rewards/"):
        return name.replace("rewards/", "Reward: ").replace("_", " ").capitalize(), "per completion", None
    if name.startswith("time/"):
        return f"Time: {name.removeprefix('time/').removesuffix('_seconds').replace('_', ' ')}", "seconds", 0
    return name, "", None
