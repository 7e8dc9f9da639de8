"""The page of a run: one file without anything from outside, whatever the length of the run.

`build_page` turns what `read_run` found into text through the templates, which escape it. What does not fit
into `MAX_BYTES` is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastr1.reporting.browser import GROUP_BYTES, Budget, Context, Sheets, cut, group_views, pair_views
from fastr1.reporting.charts import format_number, layout
from fastr1.reporting.held_out import AFTER, BEFORE, OUTCOMES, Pair, pair_answers, rate_table, sign_test
from fastr1.reporting.read_run import NUM_BAD_SHOWN, Run, read_run
from fastr1.reporting.rollout_picks import RANKINGS
from fastr1.reporting.run_charts import other_charts, run_charts
from fastr1.reporting.settings import beside_defaults, flatten

PAGE_FILE = "report.html"
MAX_BYTES = 15 * 10**6


def write_page(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run, `report.html` in its folder by default, and returns its path.

    Raises: RunLogError when it is not the folder of a run.
    """
    return save_page(read_run(run_dir), Path(run_dir) / PAGE_FILE if output is None else Path(output))


def save_page(run: Run, target: Path) -> Path:
    """Writes the page of a run that was read, and returns its path."""
    page = build_page(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def build_page(run: Run, *, version: str | None = None) -> str:
    """The page as text, at most `MAX_BYTES` of UTF-8. With a `version` it asks its server for a newer one."""
    sheets, budget = Sheets(run), Budget(GROUP_BYTES)
    views = group_views(run, sheets, budget)
    pairs = pair_answers(run.evaluations)
    shown_pairs = pair_views(run, pairs, sheets)
    charts = run_charts(run.series, run.picks, _levels(run))
    others = other_charts(run.series, charts)
    names, rates = rate_table(run.evaluations)
    changed, same = beside_defaults(run.config)
    drawn = [layout(chart, f"chart-{i}", (1, run.last_step)) for i, chart in enumerate(charts)]
    drawn_others = [layout(chart, f"other-{i}", (1, run.last_step)) for i, chart in enumerate(others)]
    counts = {outcome: sum(pair.outcome == outcome for pair in pairs) for outcome in OUTCOMES}
    return render(
        "report.html",
        title=str(run.summary.get("title", f"Run {run.name}")),
        version=version,
        headline=headline(run),
        facts=facts(run),
        state=_state(run),
        notes=[*run.notes, *sheets.notes(), *_other_notes(run, budget, pairs, shown_pairs)],
        charts=drawn,
        other_charts=drawn_others,
        chart_data={chart["id"]: chart["data"] for chart in (*drawn, *drawn_others)},
        task=run.config.get("task", "grpo"),
        has_rollouts=run.picks.num_groups > 0,
        num_groups=run.picks.num_groups,
        num_rows=run.picks.num_rows,
        groups=views,
        steps=sorted(run.picks.by_step),
        sizes=run.picks.sizes,
        rankings=list(RANKINGS),
        pairs=shown_pairs,
        num_pairs=len(pairs),
        outcomes=OUTCOMES,
        outcome_counts=counts,
        kinds=sorted({pair.kind for pair in pairs} - {""}),
        chance=sign_test(counts["fixed"], counts["broken"]) if counts["fixed"] + counts["broken"] else None,
        rate_names=names,
        rates=rates,
        changed=changed,
        same=same,
        bad_samples=[{**row, "reason": cut(str(row["reason"]))[0][:500]} for row in run.bad_samples],
        num_bad=run.num_bad,
        num_bad_shown=NUM_BAD_SHOWN,
        sheets=sheets.content,
        files=[name for name in ("report.png", "metrics.jsonl", "rollouts.jsonl") if (run.folder / name).is_file()],
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "percent": lambda share: f"{100 * share:.1f} %"}
    return environment


def render(template: str, **context: Any) -> str:
    """A page from one of the templates; every text in the context is escaped."""
    return _environment().get_template(template).render(**context)


def headline(run: Run) -> Context | None:
    """Accuracy before and after, from the best source there is; None where nothing was measured."""
    before, after = (run.evaluations.get(name, {}).get("summary") for name in (BEFORE, AFTER))
    before, after = before or run.summary.get(BEFORE), after or run.summary.get(AFTER)
    if isinstance(before, dict) and isinstance(after, dict) and "accuracy" in before and "accuracy" in after:
        number = (
            f"{after['num_questions']:.0f} held-out questions" if "num_questions" in after else "held-out questions"
        )
        return {"before": before["accuracy"], "after": after["accuracy"], "of": number, "when": "before and after"}
    steps, values = run.series.get("eval/accuracy", (np.empty(0), np.empty(0)))
    is_there = np.isfinite(values)
    if not is_there.any():
        return None
    steps, values = steps[is_there], values[is_there]
    questions = run.series.get("eval/num_questions")
    of = "held-out questions" if questions is None else f"{questions[1][-1]:.0f} held-out questions"
    when = f"update {steps[0]} and {steps[-1]}, during training" if len(steps) > 1 else f"update {steps[0]}"
    first = float(values[0]) if len(values) > 1 else None
    return {"before": first, "after": float(values[-1]), "of": of, "when": when}


def facts(run: Run) -> list[tuple[str, str]]:
    """What the headline's number depends on: seed, updates, time, hardware."""
    flat, conditions = flatten(run.config), run.summary.get("conditions")
    found = [("seed", str(flat.get("run.seed", run.summary.get("seed", "not recorded"))))]
    total = "" if run.total_steps is None else f" of {run.total_steps}"
    found.append(("updates", f"{run.last_step}{total}"))
    seconds = training_seconds(run)
    found.append(("training time", "not recorded" if seconds is None else _duration(seconds)))
    if isinstance(conditions, dict):
        device = str(conditions.get("device"))
        cores = f", {conditions['cores']} cores" if device == "cpu" and "cores" in conditions else ""
        found.append(("hardware", f"{device.upper() if device == 'cpu' else device}{cores}"))
        found += [(name, str(conditions[name])) for name in ("torch", "date", "commit") if conditions.get(name)]
    else:
        found.append(("hardware", "not recorded"))
    return [*found, ("model", str(flat["model.path"]))] if "model.path" in flat else found


def training_seconds(run: Run) -> float | None:
    """Of all updates; a row of metrics holds the mean over those since the row before."""
    if "time/step_seconds" not in run.series:
        return None
    steps, values = run.series["time/step_seconds"]
    return float(np.nansum(values * np.diff(steps, prepend=0)))


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"


def _state(run: Run) -> Context:
    written = "" if run.written is None else f"{run.written:%Y-%m-%d %H:%M:%S} UTC"
    of = "" if run.total_steps is None else f" of {run.total_steps}"
    text = f"in progress or stopped: update {run.last_step}{of}; last row written {written}"
    return {"is_finished": run.is_finished, "text": f"finished, {written}" if run.is_finished else text}


def _levels(run: Run) -> dict[str, float]:
    accuracy = run.summary.get("accuracy")
    found = (
        {str(k): float(v) for k, v in accuracy.items() if isinstance(v, (int, float))}
        if isinstance(accuracy, dict)
        else {}
    )
    chance = run.summary.get("chance")
    return {**found, **({"chance": float(chance)} if isinstance(chance, (int, float)) else {})}


def _other_notes(run: Run, budget: Budget, pairs: Sequence[Pair], shown: Sequence[Context]) -> Iterable[str]:
    if not run.series:
        yield "There are no numbers yet: wait for the first update."
    if budget.num_refused:
        yield f"{budget.num_refused} groups are left out to keep the page small; rollouts.jsonl has them."
    if len(shown) < len(pairs):
        yield f"{len(pairs) - len(shown)} held-out questions are left out to keep the page small."
