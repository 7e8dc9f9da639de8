#!/usr/bin/env python3
"""Generate what README.md says in measured numbers from the committed rows of bench/results.

    python scripts/render_readme.py            # rewrite the sections and the chart
    python scripts/render_readme.py --check    # exit 1, with the difference, where README.md and rows part

A section lies between `<!-- NAME -->` and `<!-- /NAME -->`. Another table is another function in `SECTIONS`. The chart
carries the digest of the rows it was drawn from: its pixels depend on the version of matplotlib.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastr1.reporting.curves import Series, draw_report, merge_runs

ROOT = Path(__file__).resolve().parents[1]
CHART = Path("docs/demo_curves.png")
IDENTITY = ("commit", "seed", "date")  # of a run, in all its rows
CONDITIONS = ("commit", "device", "cores", "threads", "torch", "num_questions", "updates")
LOADING_TOLERANCE = 0.1  # as in bench/clips.py
DIGEST = "Source"  # text chunk of the chart
STEP_OPS = {
    "train": "train",
    "reference": "reference pass",
    "update": "whole update",
    "rollout": "rollout",
}
CONTROLS = {
    "shuffled_frames": "frames in random order",
    "repeated_frame": "one frame repeated",
    "blank_video": "blank video",
}

Row = dict[str, Any]


def shown_runs(root: Path) -> list[Row]:
    """The runs of the demo made under the same conditions as the one recorded last; of each seed the last, by seed."""
    runs = _read(root, "demo")
    alike = {run["seed"]: run for run in runs if all(run[key] == runs[-1][key] for key in CONDITIONS)}
    return [alike[seed] for seed in sorted(alike)]


def _read(root: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (root / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()]


def demo_table(root: Path) -> str:
    """Accuracy of the demo before and after GRPO, and with something else shown than the clips."""
    runs = shown_runs(root)
    lines = [_caption(runs), "", "| held-out questions | cold start | after GRPO |", "|---|---|---|"]
    before, after = ([run[when] for run in runs] for when in ("before", "after"))

    def line(name: str, pick: Callable[[Row], float], *, bold: bool = False) -> str:
        last = _spread([pick(rates) for rates in after], bold=bold)
        return f"| {name} | {_spread([pick(rates) for rates in before])} | {last} |"

    lines.append(line("all", lambda rates: rates["accuracy"], bold=True))
    for kind in sorted(after[0]["kinds"]):
        lines.append(line(kind, lambda rates, kind=kind: rates["kinds"][kind]))
    lines.append(line("well formed", lambda rates: rates["format_rate"]))
    for control, name in CONTROLS.items():
        lines.append(f"| all, {name} | | {_spread([run['controls'][control]['accuracy'] for run in runs])} |")
    return "\n".join([*lines, f"| chance | | {100 * runs[0]['chance']:.0f} % |"])


def demo_headline(root: Path) -> str:
    """The one number of the page with its conditions."""
    runs = shown_runs(root)
    before, after = (_spread([run[when]["accuracy"] for run in runs]) for when in ("before", "after"))
    shuffled = _spread([run["controls"]["shuffled_frames"]["accuracy"] for run in runs])
    text = (
        f"**{before} → {after}** of the questions about held-out video clips are answered correctly before and after "
        f"GRPO; {shuffled} with the frames of the clips in random order. `make demo` on a CPU, mean of {len(runs)} "
        f"seeds (range), {runs[0]['num_questions']} five-way questions, {runs[0]['updates']} updates of a tiny model."
    )
    return textwrap.fill(text, 120)


def _caption(runs: Sequence[Row]) -> str:
    """What was measured and how."""
    last = runs[-1]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    minutes = sorted(f"{sum(run['seconds'].values()) / 60:.1f}" for run in runs)
    machine = last["device"].replace("cpu", "CPU")
    threads = (
        f"{last['threads']} thread{'s' * (last['threads'] > 1)} on {last['cores']} core{'s' * (last['cores'] > 1)}"
    )
    changed = " with local changes" * any(run["dirty"] for run in runs)
    text = (
        f"`make demo SEED=…`: correct answers, mean of {len(runs)} seeds ({seeds}) and their range; "
        f"{last['num_questions']} held-out clips, {last['updates']} updates; {minutes[0]} to {minutes[-1]} "
        f"minutes per seed ({machine}, {threads}, torch {last['torch']}); commit {last['commit'][:7]}{changed}, "
        f"{max(run['date'] for run in runs)[:10]}."
    )
    return textwrap.fill(text, 120)


def _spread(rates: Sequence[float], *, bold: bool = False) -> str:
    """Mean and range in per cent."""
    low, mean, high = (f"{100 * rate:.1f}" for rate in (min(rates), sum(rates) / len(rates), max(rates)))
    shown = f"**{mean} %**" if bold else f"{mean} %"
    return shown if low == high else f"{shown} ({low}–{high})"


def draw_demo_chart(root: Path) -> None:
    """The course of the runs, their mean over the single seeds."""
    source = _chart_source(root)
    runs: dict[int, list[Row]] = {}
    for row in source["curves"]:
        runs.setdefault(row["seed"], []).append(row)
    series = merge_runs([_series(rows) for rows in runs.values()])
    title = f"GRPO on the demo clips: mean of {len(runs)} seeds, single seeds faint"
    metadata = {DIGEST: _digest(source)}
    draw_report(series, root / CHART, title=title, accuracy=source["accuracy"], metadata=metadata)


def _chart_source(root: Path) -> Row:
    runs = shown_runs(root)
    blank = [run["controls"]["blank_video"]["accuracy"] for run in runs]
    accuracy = {"cold start": [run["before"]["accuracy"] for run in runs], "blank video": blank}
    means = {label: sum(rates) / len(rates) for label, rates in accuracy.items()}
    shown = [_identity(run) for run in runs]
    curves = [row for row in _read(root, "demo_curves") if _identity(row) in shown]
    return {"curves": sorted(curves, key=lambda row: (row["seed"], row["step"])), "accuracy": means}


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in IDENTITY)


def _series(rows: Sequence[Row]) -> dict[str, Series]:
    names = {name for row in rows for name in row} - {*IDENTITY, "step"}
    return {
        name: (
            np.array([row["step"] for row in rows if name in row]),
            np.array([float(row[name]) for row in rows if name in row]),
        )
        for name in sorted(names)
    }


def _digest(source: Row) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()


def loading_table(root: Path) -> str:
    """Milliseconds from a file to the tower's input, per size of clip; of each the last run on one device."""
    rows = _read(root, "loading")
    last = {row["shape"]["height"]: row["time"] for row in rows if row["device"] == rows[-1]["device"]}
    cells = {
        (row["provider"], row["shape"]["height"]): row
        for row in rows
        if row["time"] == last.get(row["shape"]["height"]) and row["device"] == rows[-1]["device"]
    }
    heights, row = sorted(last), rows[-1]
    spreads = ", ".join(f"{cells['ours', height]['spread']:.0%}" for height in heights)
    shape = row["shape"]
    what = f"{shape['num_frames']} frames of a clip of {shape['seconds']} s to {shape['side']} × {shape['side']}"
    caption = (
        f"{what}, milliseconds in one thread ({row['device']}), medians; two measurements "
        f"of ours differ by {spreads}; commit {row['commit'][:10]}. In brackets: its pixels differ by more than "
        f"{LOADING_TOLERANCE:.0%}."
    )
    lines = ["| |" + "".join(f" {height}p |" for height in heights), "|---|" + "---|" * len(heights)]
    for provider in dict.fromkeys(name for name, _ in cells):
        parts = [_loading_cell(cells.get((provider, height))) for height in heights]
        lines.append(f"| {provider} |" + "".join(f" {part} |" for part in parts))
    return "\n".join([textwrap.fill(caption, 120), "", *lines])


def _loading_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] == "mismatch":
        return f"({row['errors']['pixels']:.0%})"
    if "median_ms" not in row:
        return str(row.get("reason", row["status"]))
    return f"{row['median_ms']:,.0f}"


def step_table(root: Path) -> str:
    """Every way to take an update, over ours; the cases of the last run on one device."""
    rows = _read(root, "step")
    shown = [
        row for row in rows if all(row[key] == rows[-1][key] for key in ("device", "commit")) and "median_ms" in row
    ]
    cases: dict[str, dict[str, Row]] = {}
    for row in shown:
        cases.setdefault(_step_case(row), {})[row["provider"]] = row
    spreads = sorted(providers["ours"]["spread"] for providers in cases.values())
    row = rows[-1]
    caption = (
        f"Times over ours and peak memory ({row['device']}, {row['threads']} threads, {row['dtype']}); loss and all "
        f"gradients agree; two measurements of ours differ by {spreads[0]:.0%} to {spreads[-1]:.0%}; commit "
        f"{row['commit'][:10]}."
    )
    lines = [textwrap.fill(caption, 120), "", "| | time | over ours | peak memory |", "|---|---|---|---|"]
    for name, providers in cases.items():
        lines.append(f"| **{name}** | | | |")
        lines += [_step_line(provider, row) for provider, row in providers.items()]
    return "\n".join(lines)


def _step_case(row: Row) -> str:
    shape, what = row["shape"], STEP_OPS[row["op"]]
    lengths = f"{shape['mean_length']} tokens" + f" (longest {shape['max_length']})" * (
        shape["max_length"] > shape["mean_length"]
    )
    prompts = f"{shape['num_prompts']} prompt{'s' * (shape['num_prompts'] > 1)} of {shape['prompt_length']}"
    video = "" if shape["num_frames"] else ", no video"
    return f"{what}: {prompts} × {shape['num_generations']} completions of {lengths}{video}"


def _step_line(provider: str, row: Row) -> str:
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
    return f"| {provider} | {row['median_ms']:,.0f} ms | {row['time_over_ours']:.2f} × | {memory} |"


def rollout_table(root: Path) -> str:
    """Every way to draw the completions of an update, over ours; the cases of the last run on one device."""
    if not (root / "bench" / "results" / "rollout.jsonl").exists():
        return "No results yet."
    rows = _read(root, "rollout")
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if all(row[key] == rows[-1][key] for key in ("device", "commit", "time")):
            cases.setdefault(_rollout_case(row), []).append(row)
    spreads = sorted(row["spread"] for providers in cases.values() for row in providers[:1])
    row = rows[-1]
    caption = (
        f"{row['device']}, {row['threads']} threads; medians; two measurements of ours differ by {spreads[0]:.0%} to "
        f"{spreads[-1]:.0%}; commit {row['commit'][:10]}. A step: the time over the tokens of the longest completion; "
        "tokens per second are those of the completions, padding left out; the floor is that of the weights, keys and "
        "products at the measured rates of the machine."
    )
    head = "| | time | over ours | a step | tokens/s | of the floor | matches |"
    lines = [textwrap.fill(caption, 120), "", head, "|---" * 7 + "|"]
    for name, providers in cases.items():
        lines.append(f"| **{name}** | | | | | | |")
        lines += [_rollout_line(row) for row in providers]
    return "\n".join(lines)


def _rollout_case(row: Row) -> str:
    shape = row["shape"]
    model = "" if shape["model"] == "demo" else f"{shape['model']}, "
    return model + _step_case(row).removeprefix("rollout: ") + f", {row['dtype']}"


def _rollout_line(row: Row) -> str:
    if "median_ms" not in row:
        return f"| {row['provider']} | | | | | | {row.get('reason', row['status'])} |"
    return (
        f"| {row['provider']} | {row['median_ms']:,.0f} ms | {row['time_over_ours']:.2f} × | {row['step_ms']:.2f} ms | "
        f"{row['tokens_per_second']:,.0f} | {row['floor_fraction']:.0%} | {row['checked']} |"
    )


def speculation_table(root: Path) -> str:
    """What guesses from an epoch bring in the next: the cases of the last run."""
    if not (root / "bench" / "results" / "speculation.jsonl").exists():
        return "No results yet."
    rows = _read(root, "speculation")
    last = rows[-1]
    cases = [row for row in rows if all(row[key] == last[key] for key in ("device", "commit", "time"))]
    alike = sum(row["same_completions"] * row["updates"] for row in cases)
    drawn = sum(row["completions"] * row["updates"] for row in cases)
    caption = (
        f"Up to {last['num_speculative_tokens']} tokens guessed ahead; {last['device']}, {last['threads']} threads; "
        f"means of {last['updates']} updates of the second epoch; {alike:,.0f} of {drawn:,.0f} completions are those "
        f"without speculation, token for token; commit {last['commit'][:10]}."
    )
    head = "| history → policy | completions | tokens a step | right guesses | steps | time |"
    lines = [textwrap.fill(caption, 120), "", head, "|---" * 6 + "|"]
    return "\n".join([*lines, *map(_speculation_line, cases)])


def _speculation_line(row: Row) -> str:
    return (
        f"| {row['history']} → {row['policy']} | {row['num_prompts']} × {row['num_generations']} | "
        f"{row['mean_acceptance_length']:.1f} | {row['draft_acceptance_rate']:.0%} | {row['plain_steps']:.0f} → "
        f"{row['speculative_steps']:.0f} | {row['plain_ms']:,.0f} → {row['speculative_ms']:,.0f} ms |"
    )


SECTIONS: Mapping[str, Callable[[Path], str]] = {
    "demo:headline": demo_headline,
    "demo:table": demo_table,
    "loading:table": loading_table,
    "rollout:table": rollout_table,
    "rollout:speculation": speculation_table,
    "step:table": step_table,
}


def render(text: str, root: Path) -> str:
    """README.md with every section generated anew."""
    for name, section in SECTIONS.items():
        opening, closing = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, *middle = text.split(opening)
        if len(middle) != 1 or closing not in middle[0]:
            raise SystemExit(f"README.md must have one <!-- {name} --> … <!-- /{name} -->")
        text = before + opening + section(root) + closing + middle[0].partition(closing)[2]
    return text


def check(root: Path) -> list[str]:
    """What differs from the rows, as lines to print; empty where nothing does."""
    text = (root / "README.md").read_text()
    lines = (text.splitlines(), render(text, root).splitlines())
    difference = list(difflib.unified_diff(*lines, "README.md", "rows", lineterm="", n=0))
    chart = root / CHART
    if not chart.exists() or Image.open(chart).info.get(DIGEST) != _digest(_chart_source(root)):
        difference.append(f"{CHART} was not drawn from the rows")
    return difference


def main(argv: list[str] | None = None) -> int:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Generate the measured numbers of README.md from bench/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README.md and rows part")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the repository (default: this one)")
    args = parser.parse_args(argv)
    if args.check:
        if difference := check(args.root):
            print(*difference, "run `make readme`", sep="\n", file=sys.stderr)
        return int(bool(difference))
    readme = args.root / "README.md"
    readme.write_text(render(readme.read_text(), args.root))
    draw_demo_chart(args.root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
