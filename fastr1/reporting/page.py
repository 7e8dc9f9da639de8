"""The page of a run: one file without anything from outside, whatever the length of the run.

`build_page` turns what `read_run` found into text through the templates, which escape it. What does not fit
into `MAX_BYTES` is left out, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastr1.reporting.browser import GROUP_BYTES, PAIR_BYTES, Budget, Context, Sheets, group_views, pair_views
from fastr1.reporting.charts import format_number, layout
from fastr1.reporting.held_out import AFTER, BEFORE, OUTCOMES, Pair, pair_answers, rate_table, sign_test
from fastr1.reporting.read_run import NUM_BAD_SHOWN, Run, read_run
from fastr1.reporting.rollout_picks import GROUPS_PER_UPDATE, RANKINGS
from fastr1.reporting.run_charts import other_charts, run_charts
from fastr1.reporting.run_log import RunLogError
from fastr1.reporting.settings import beside_defaults, flatten

PAGE_FILE = "report.html"
MAX_BYTES = 15 * 10**6
MAX_NOTES = 40
MAX_OTHER_CHARTS = 40
_SHARES = (1.0, 0.5, 0.2, 0.0)


def write_page(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run, `report.html` in its folder by default, and returns its path.

    Raises: RunLogError when it is not the folder of a run.
    """
    return save_page(read_run(run_dir), Path(run_dir) / PAGE_FILE if output is None else Path(output))


def save_page(run: Run, target: Path) -> Path:
    """Writes the page of a run that was read, and returns its path. Raises: RunLogError where that cannot be done."""
    is_beside = target.parent.resolve() == run.folder.resolve()
    return write_text(target, build_page(run, is_beside=is_beside), "--output")


def write_text(target: Path, text: str, option: str) -> Path:
    """Writes a page and returns its path. Raises: RunLogError naming the option that chooses another place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunLogError(
            f"{target} cannot be written ({error.strerror}); choose another place with {option}"
        ) from error
    return target


def build_page(run: Run, *, version: str | None = None, is_beside: bool = True) -> str:
    """The page as text, at most `MAX_BYTES` of UTF-8. With a `version` it asks its server for a newer one; it links to
    the files of the run that it is beside."""
    names = ("report.png", "metrics.jsonl", "rollouts.jsonl") if is_beside else ()
    files = [name for name in names if (run.folder / name).is_file()]
    for share in _SHARES:
        page = _build(run, version, files, share)
        if len(page.encode("utf-8")) <= MAX_BYTES:
            break
    return page


def _build(run: Run, version: str | None, files: Sequence[str], share: float) -> str:
    """With a share of the room for groups, held-out questions and contact sheets, whose sizes are estimates."""
    sheets, budget = Sheets(run, share), Budget(share * GROUP_BYTES)
    views = group_views(run, sheets, budget)
    pairs = pair_answers(run.evaluations)
    shown_pairs = pair_views(run, pairs, sheets, Budget(share * PAIR_BYTES))
    charts = run_charts(run.series, run.picks, _levels(run))
    others = other_charts(run.series, charts)
    names, rates = rate_table(run.evaluations)
    changed, same = beside_defaults(run.config)
    drawn = [layout(chart, f"chart-{i}", (1, run.last_step)) for i, chart in enumerate(charts)]
    drawn_others = [
        layout(chart, f"other-{i}", (1, run.last_step)) for i, chart in enumerate(others[:MAX_OTHER_CHARTS])
    ]
    counts = {outcome: sum(pair.outcome == outcome for pair in pairs) for outcome in OUTCOMES}
    return render(
        "report.html",
        title=str(run.summary.get("title", f"Run {run.name}"))[:500],
        version=version,
        headline=headline(run),
        facts=facts(run),
        state=_state(run),
        notes=first_notes([*sheets.notes(), *_other_notes(run, budget, pairs, shown_pairs), *run.notes]),
        charts=drawn,
        other_charts=drawn_others,
        left_out=[chart.title for chart in others[MAX_OTHER_CHARTS:]],
        chart_data={chart["id"]: chart["data"] for chart in (*drawn, *drawn_others)},
        task=run.config.get("task", "grpo"),
        has_rollouts=run.picks.num_groups > 0,
        num_groups=run.picks.num_groups,
        num_rows=run.picks.num_rows,
        groups=views,
        steps=sorted(run.picks.by_step),
        sizes=run.picks.sizes,
        groups_per_update=GROUPS_PER_UPDATE,
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
        bad_samples=[{name: str(value)[:500] for name, value in row.items()} for row in run.bad_samples],
        num_bad=run.num_bad,
        num_bad_shown=NUM_BAD_SHOWN,
        sheets=sheets.content,
        files=files,
    )


def first_notes(notes: Sequence[str]) -> list[str]:
    """As many as one reads."""
    more = [f"… and {len(notes) - MAX_NOTES} further notes."] if len(notes) > MAX_NOTES else []
    return [*(note[:500] for note in notes[:MAX_NOTES]), *more]


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
    """A page from one of the templates; every text in the context is escaped, and what is no character is a "?"."""
    page = _environment().get_template(template).render(**context)
    return page.encode("utf-8", "replace").decode("utf-8")  # of a pair of surrogates JSON and file names can hold one


def headline(run: Run) -> Context | None:
    """Accuracy before and after, from the best source there is; None where nothing was measured."""
    before, after = (run.evaluations.get(name, {}).get("summary") for name in (BEFORE, AFTER))
    before, after = before or run.summary.get(BEFORE), after or run.summary.get(AFTER)
    rates = _number_of(before, "accuracy"), _number_of(after, "accuracy")
    if None not in rates:
        number = _number_of(after, "num_questions")
        of = "held-out questions" if number is None else f"{number:.0f} held-out questions"
        return {"before": rates[0], "after": rates[1], "of": of, "when": "before and after"}
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


def _number_of(rates: Any, name: str) -> float | None:
    value = rates.get(name) if isinstance(rates, dict) else None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def facts(run: Run) -> list[tuple[str, str]]:
    """What the headline's number depends on: seed, updates, time, hardware."""
    flat, conditions = flatten(run.config), run.summary.get("conditions")
    machine = {**run.hardware, **(conditions if isinstance(conditions, dict) else {})}
    found = [("seed", str(flat.get("run.seed", run.summary.get("seed", "not recorded"))))]
    total = "" if run.total_steps is None else f" of {run.total_steps}"
    found.append(("updates", f"{run.last_step}{total}"))
    seconds = training_seconds(run)
    found.append(("training time", "not recorded" if seconds is None else _duration(seconds)))
    found.append(("hardware", _device(machine)))
    found += [(name, str(machine[name])) for name in ("torch", "date", "commit") if machine.get(name)]
    return [*found, ("model", str(flat["model.path"]))] if "model.path" in flat else found


def _device(machine: Context) -> str:
    device = str(machine.get("device") or "not recorded")
    if device == "cpu":
        return f"CPU, {machine['cores']} cores" if "cores" in machine else "CPU"
    number = machine.get("processes")
    return f"{number} × {device}" if isinstance(number, int) and number > 1 else device


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
    named = {**(accuracy if isinstance(accuracy, dict) else {}), "chance": run.summary.get("chance")}
    return {name: number for name in named if (number := _number_of(named, name)) is not None}


def _other_notes(run: Run, budget: Budget, pairs: Sequence[Pair], shown: Sequence[Context]) -> Iterable[str]:
    if not run.series:
        yield "There are no numbers yet: wait for the first update."
    if budget.num_refused:
        yield f"{budget.num_refused} groups are left out to keep the page small; rollouts.jsonl has them."
    if len(shown) < len(pairs):
        yield f"{len(pairs) - len(shown)} held-out questions are left out to keep the page small."
