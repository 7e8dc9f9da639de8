#!/usr/bin/env python3
"""Append finished runs of the demo to the committed rows that README.md is generated from.

    python scripts/record_demo.py runs/demo-0 runs/demo-1 runs/demo-2 && make readme

One object per run goes to bench/results/demo.jsonl, one per run and update to bench/results/demo_curves.jsonl. Rows are
never edited: a run that is there already is refused, and so is one whose commit is not known.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
ROWS, CURVES = "demo.jsonl", "demo_curves.jsonl"
DRAWN = re.compile(r"reward|rewards/\w+|completion_length|kl|eval/accuracy(/\w+)?")  # what the chart shows


def record(run: Path, results: Path) -> None:
    """Append the rows of one run. Raises: SystemExit with the reason where it is refused."""
    summary = json.loads((run / "summary.json").read_text())
    conditions = summary["conditions"]
    identity = {"commit": conditions["commit"], "seed": summary["seed"], "date": conditions["date"]}
    if identity["commit"] is None:
        raise SystemExit(f"{run}: made outside a git checkout, so nobody could tell what was run")
    path = results / ROWS
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(identity.items() <= row.items() for row in known):
        raise SystemExit(f"{run} is in {path} already")
    row = {
        **identity,
        **{key: conditions[key] for key in ("dirty", "device", "cores", "threads", "torch")},
        **{key: summary[key] for key in ("num_questions", "chance", "updates")},
        **{when: _rates(summary[when]) for when in ("before", "after")},
        "controls": {control: _rates(rates) for control, rates in summary["controls"].items()},
        "seconds": summary["seconds"],
    }
    _append(path, [row])
    updates = [json.loads(line) for line in (run / "grpo" / "metrics.jsonl").read_text().splitlines()]
    _append(results / CURVES, [identity | _drawn(update) for update in updates])


def _rates(rates: Mapping[str, float]) -> dict[str, Any]:
    """Accuracy, that of every kind of question, and how often the format was right."""
    prefix = "accuracy/"
    kinds = {name.removeprefix(prefix): round(rate, 4) for name, rate in rates.items() if name.startswith(prefix)}
    return {"accuracy": round(rates["accuracy"], 4), "format_rate": round(rates["format_rate"], 4), "kinds": kinds}


def _drawn(update: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: value for name, value in update.items() if DRAWN.fullmatch(name) and value is not None}
    return {"step": update["step"], **{name: round(value, 4) for name, value in numbers.items()}}


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Append finished runs of the demo to bench/results.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that `fastr1 demo` wrote")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    args = parser.parse_args(argv)
    for run in args.runs:
        record(run, args.results)
        print(f"recorded {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
