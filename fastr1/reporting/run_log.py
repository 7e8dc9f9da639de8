"""The run folder: metrics.jsonl, rollouts.jsonl, TensorBoard events, trackers, a progress line.

metrics.jsonl holds one object per call of `RunLogger.log`: "step" (updates done) and named numbers. A number that is
not finite is written as null, because JSON has no NaN. Names that `curves.py` draws: reward, rewards/<part>,
completion_length, kl, eval/accuracy.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from fastr1.config import check_value

if TYPE_CHECKING:
    from fastr1.reporting.trackers import Tracker

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
TENSORBOARD_DIR = "tensorboard"


logger = logging.getLogger(__name__)


class RunLogError(ValueError):
    """A run folder cannot be continued or a metric cannot be written. The message names the file and the remedy."""


class RunLogger:
    """Writes what a run reports; on ranks other than the main one every method does nothing.

    Args:
        output_dir: the run folder, created if needed.
        report_to: any of "jsonl", "tensorboard", "wandb" and "trackio".
        total_steps: updates of the whole run, for the progress line.
        is_main: whether this process writes.
        start_step: updates done before this process started. Rows of later steps, left by a run that stopped after its
            last checkpoint, are dropped; 0 starts the files anew.
        num_unlogged: how many of them are to be in the next row of metrics: one that was written for them is dropped.
        settings: what trackers show beside the numbers.
        progress: the stream of the progress bar; where it is not a terminal, a plain line is printed about twenty
            times per run instead.

    Raises: ConfigError for an unknown report; RunLogError when a file to continue holds something else than rows.
    """

    def __init__(
        self,
        output_dir: str | Path,
        report_to: Sequence[str],
        total_steps: int,
        is_main: bool,
        *,
        start_step: int = 0,
        num_unlogged: int = 0,
        settings: Mapping[str, Any] | None = None,
        progress: TextIO | None = None,
    ) -> None:
        check_value("run.report_to", tuple(report_to))
        self._files: dict[str, TextIO] = {}
        self._tensorboard: Any = None
        self._trackers: list[Tracker] = []
        self._last_row = -1  # step of the last row of metrics
        self._progress: _Progress | None = None
        if not is_main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if "jsonl" in report_to:
            last_row = start_step - num_unlogged
            for name, last in ((METRICS_FILE, last_row), (ROLLOUTS_FILE, start_step)):
                found = _drop_rows_after(folder / name, last)
                if name == METRICS_FILE and found < last_row:
                    logger.warning("%s has no rows of updates %d to %d", folder / name, found + 1, last_row)
                self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and optional

            _wait_for_a_later_name(folder / TENSORBOARD_DIR)
            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD_DIR), purge_step=start_step - num_unlogged + 1)
        if {"wandb", "trackio"} & set(report_to):
            from fastr1.reporting.trackers import open_trackers

            is_resumed = start_step > 0
            self._trackers = open_trackers(report_to, folder, is_resumed=is_resumed, settings=settings or {})
        self._progress = _Progress(total_steps, start_step, progress or sys.stderr)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records named numbers of update `step` (the first update is 1) and moves the progress line there."""
        if self._progress is None:
            return
        if "step" in metrics:
            raise RunLogError('a metric is called "step", which is the name of the row number; rename it')
        numbers = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._write(METRICS_FILE, {"step": step, **finite})
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()  # a run that is killed keeps every number
        for tracker in self._trackers:
            tracker.log(step, numbers)
        self._last_row = step
        self._progress.update(step, numbers)

    def log_rollouts(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Records completions with their question, rewards and advantage, one object per completion. Trackers get
        those of updates with a row of metrics, which is logged before; TensorBoard of these the first group."""
        if self._progress is not None:
            for row in rows:
                self._write(ROLLOUTS_FILE, {"step": step, **row})
            if rows and step == self._last_row:
                if self._tensorboard is not None:
                    self._tensorboard.add_text("completions", _first_group(rows), step)
                for tracker in self._trackers:
                    tracker.log_rollouts(step, rows)

    def close(self, *, has_failed: bool = False) -> None:
        """Flushes and closes everything; the logger must not be used afterwards. Trackers show a run that failed."""
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close(has_failed=has_failed)
        if self._progress is not None:
            self._progress.close()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._files[name].flush()  # a run that is killed keeps every row


def read_rows(path: str | Path, *, key: str = "step", kind: type = int) -> list[dict[str, Any]]:
    """The rows of a metrics or rollouts file; a last line cut short by a killed process is left out.

    Raises: RunLogError when the file is missing or any other line is not an object whose `key` is of that kind.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise RunLogError(f"cannot read {source}: {error.strerror}; is this the folder of a run?") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines)  # without a newline behind it: empty, or cut short
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if is_last:
                break
            raise RunLogError(f"{source}:{number} is not JSON ({error}); repair or remove the line") from error
        if not isinstance(row, dict) or type(row.get(key)) is not kind:
            raise RunLogError(f'{source}:{number} is not an object with "{key}", {kind.__name__}; repair or remove it')
        rows.append(row)
    return rows


def _first_group(rows: Sequence[Mapping[str, Any]]) -> str:
    """The completions of one prompt as Markdown, which shows every text as it is: in lines that are indented."""
    first = rows[0]
    parts = [("Question", first["question"]), ("Solution", first["solution"])]
    for row in takewhile(lambda row: row["sample_id"] == first["sample_id"], rows):
        parts.append((f"Reward {row['reward']:g}, advantage {row['advantage']:+.3g}", row["completion"]))
    return "\n\n".join(f"{title}\n\n{indent(text, '    ', lambda line: True)}" for title, text in parts)


def _drop_rows_after(path: Path, step: int) -> int:
    """Keeps the rows up to `step`, replacing the file in one move so that a crash loses nothing. Returns the step of
    the last one, 0 where there is none."""
    if not path.exists():
        return 0
    rows = [row for row in read_rows(path) if row["step"] <= step] if step > 0 else []
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
    return int(rows[-1]["step"]) if rows else 0


def _wait_for_a_later_name(folder: Path) -> None:
    """Files of events are read in the order of their names, which begin with the second in which they were made. A run
    that is started twice within one second would purge its own steps instead of the earlier ones."""
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)


class _Progress:
    """A bar with the remaining time on a terminal, else a plain line about twenty times per run."""

    def __init__(self, total_steps: int, start_step: int, stream: TextIO) -> None:
        self._total = total_steps
        self._stream = stream
        self._first_step = self._step = start_step
        self._start = time.perf_counter()
        self._line_every = max(1, total_steps // 20)
        self._next_line = start_step + 1
        self._bar = (
            tqdm(total=total_steps, initial=start_step, file=stream, unit="update", dynamic_ncols=True)
            if stream.isatty()
            else None
        )

    def update(self, step: int, numbers: dict[str, float]) -> None:
        shown = {name: numbers[name] for name in ("reward", "loss", "eval/accuracy") if name in numbers}
        num_new, self._step = max(step - self._step, 0), max(step, self._step)
        if self._bar is not None:
            if shown:
                self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
            self._bar.update(num_new)
            return
        texts = [f"{name} {value:.3f}" for name, value in shown.items()]
        if num_new:
            if step < self._next_line and step != self._total:
                return
            self._next_line = step + self._line_every
            seconds = (time.perf_counter() - self._start) / (step - self._first_step)
            texts.append(f"{seconds:.2f} s per update, {_duration(seconds * max(self._total - step, 0))} left")
        if texts:
            with suppress(OSError):  # a pipe that nobody reads any more, a full disk: no reason to end a run
                print(f"step {step}/{self._total}  {'  '.join(texts)}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
