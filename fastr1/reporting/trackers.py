"""Weights & Biases and Trackio: the numbers of a run, and at every row of metrics the completions with their frames.

A package is imported only where `run.report_to` names it. A resumed run goes on in the same run of the tracker, whose
id is kept in `trackers.json` of the run folder; updates after its checkpoint appear twice there, with equal values.
Each tracker sends in threads or a process of its own and reads its own environment variables (`WANDB_MODE`,
`TRACKIO_DIR`, …).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastr1.config import ConfigError
from fastr1.reporting.frames import SheetIndex

IDS_FILE = "trackers.json"
PROJECT = "fastr1"
ROLLOUTS = "rollouts"  # the name of the table

Rows = Sequence[Mapping[str, Any]]


class Tracker(Protocol):
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The metrics of an update."""

    def log_rollouts(self, step: int, rows: Rows) -> None:
        """Its completions, as a table."""

    def close(self, *, has_failed: bool) -> None:
        """Send what is left, and end the run there."""


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuses what is not installed, and Weights & Biases without a key. Raises: ConfigError."""
    for name in report_to:
        remedy = f"pip install {name}, or leave it out of run.report_to"
        if name == "tensorboard" and importlib.util.find_spec(name) is None:  # seconds to import
            raise ConfigError(f"run.report_to names {name!r}, which is not installed: {remedy}")
        if name not in TRACKERS:
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"run.report_to names {name!r}, which cannot be imported ({error}): {remedy}") from error
        if not hasattr(module, "init"):  # a folder of that name, which Weights & Biases makes where it is run
            raise ConfigError(f"run.report_to names {name!r}, which is not installed: {remedy}")
        if name == "wandb" and os.environ.get("RANK", "0") == "0":
            _check_key(module)


def _check_key(wandb: Any) -> None:
    if wandb.setup().settings.mode != "online":
        return
    try:
        problem = "" if wandb.login(prompt=False) else "which has no key here"
    except wandb.Error as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"run.report_to names 'wandb', {problem}: wandb login, or set WANDB_MODE=offline")


def open_trackers(
    report_to: Sequence[str], run_dir: Path, *, is_resumed: bool, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Those that are named. `settings` is shown beside the numbers."""
    names = [name for name in report_to if name in TRACKERS]
    file = run_dir / IDS_FILE
    ids: dict[str, str] = {}
    if is_resumed and file.exists():
        ids = json.loads(file.read_text(encoding="utf-8"))
    for name in names:
        ids.setdefault(name, uuid.uuid4().hex[:12])
    if names:
        file.write_text(json.dumps(ids) + "\n", encoding="utf-8")
    return [TRACKERS[name](run_dir, ids[name], settings) for name in names]


class WandbTracker:
    """A run of Weights & Biases, its files in `RUN/wandb`. Charts are over the updates, not over calls."""

    def __init__(self, run_dir: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb, self._sheets = wandb, SheetIndex(run_dir)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.resolve().name),
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=dict(settings),
            allow_val_change=True,
        )
        # Steps of its own may not go back, as those of a resumed run do.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "update": step})

    def log_rollouts(self, step: int, rows: Rows) -> None:
        columns, data = _table(rows, self._sheets, self._wandb.Image)
        self._run.log({ROLLOUTS: self._wandb.Table(columns=columns, data=data), "update": step})

    def close(self, *, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


class TrackioTracker:
    """A run of Trackio, in its own folder or where its environment variables say."""

    def __init__(self, run_dir: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio, self._sheets = trackio, SheetIndex(run_dir)
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run_dir.resolve().name}-{run_id}"
        self._run = trackio.init(project=project, name=name, resume="allow", config=dict(settings), embed=False)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def log_rollouts(self, step: int, rows: Rows) -> None:
        columns, data = _table(rows, self._sheets, self._trackio.Image)
        self._run.log({ROLLOUTS: self._trackio.Table(columns=columns, data=data)}, step=step)

    def close(self, *, has_failed: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Any] = {"wandb": WandbTracker, "trackio": TrackioTracker}


def _table(rows: Rows, sheets: SheetIndex, image: Any) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of rows of rollouts.jsonl; one picture per clip, None where it has no sheet."""
    paths = {row["video"]: sheets.find(row["video"]) for row in rows}
    pictures = {video: None if path is None else image(str(path)) for video, path in paths.items()}
    parts = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    names = ("sample_id", "question", "completion", "solution", "reward", "advantage")
    data = [
        [*(row[name] for name in names), *(row["rewards"].get(name) for name in parts), pictures[row["video"]]]
        for row in rows
    ]
    return [*names, *(f"rewards/{name}" for name in parts), "frames"], data
