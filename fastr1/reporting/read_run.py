"""Reads a run folder for its page, whatever state it is in, in bounded memory.

Rollouts go by one at a time and only what a page shows is kept. A file that is missing, a line that cannot be read and
a last line that was cut short are no errors here: `Run.notes` says so, and the page shows the notes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastr1.reporting.curves import SUMMARY_FILE, Series, to_series
from fastr1.reporting.hardware import HARDWARE_FILE
from fastr1.reporting.rollout_picks import Picks, pick_groups
from fastr1.reporting.run_log import METRICS_FILE, ROLLOUTS_FILE, RunLogError

CONFIG_FILE = "config.json"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
EVALUATION_DIR = "evaluation"  # files of `fastr1 eval --output`; before.json and after.json are set side by side
FRAMES_DIR = "frames"
NUM_UPDATES_SHOWN = 12
NUM_BAD_SHOWN = 200
MAX_CHARS = 20_000  # of one text
_RENAMED = {"rollout_tokens_per_second": "rollout/tokens_per_second"}  # metrics of earlier versions

Row = dict[str, Any]


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: the frames of a clip, line by line without gaps."""

    file: Path
    columns: int
    num_lines: int
    frame_px: tuple[int, int]
    timestamps_seconds: tuple[float, ...]


@dataclass
class Run:
    """What a page can show of a run."""

    folder: Path
    notes: list[str] = field(default_factory=list)
    config: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    hardware: Row = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    picks: Picks = field(default_factory=Picks)
    evaluations: dict[str, Row] = field(default_factory=dict)  # "before", "after", "blank_video" → {summary, answers}
    bad_samples: list[Row] = field(default_factory=list)
    num_bad: int = 0
    sheets: dict[str, Sheet] = field(default_factory=dict)  # by the path of the video, as written and as trained on
    sheets_by_id: dict[str, Sheet] = field(default_factory=dict)  # of held-out clips, by sample
    last_step: int = 0
    total_steps: int | None = None  # None: not known
    is_finished: bool = False
    written: datetime | None = None  # of the last row

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def sheet_of(self, video: str, sample_id: str | None = None) -> Sheet | None:
        """The sheet of a clip by its video; by the held-out sample where no video is known."""
        found = self.sheets.get(video)
        return self.sheets_by_id.get(sample_id) if found is None and not video and sample_id is not None else found


def read_run(folder: str | Path, *, with_rollouts: bool = True) -> Run:
    """Everything a page shows of the run in `folder`.

    Raises: RunLogError when it is not the folder of a run: it holds none of its files.
    """
    run = Run(Path(folder))
    files = (CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE)
    if not any((run.folder / name).is_file() for name in files):
        raise RunLogError(f"{folder} holds none of {', '.join(files)}; is this the folder of a run?")
    run.config = _read_object(run, CONFIG_FILE, "settings are not shown")
    run.summary = _read_object(run, SUMMARY_FILE, None)
    run.hardware = _read_object(run, HARDWARE_FILE, None)
    run.series = _renamed(to_series(_read_rows(run, METRICS_FILE, _is_step, "there are no curves")))
    run.last_step = max((int(steps[-1]) for steps, _ in run.series.values() if len(steps)), default=0)
    run.is_finished = (run.folder / "final").is_dir()
    run.total_steps = _total_steps(run)
    if run.config.get("task", "grpo") == "grpo":
        path = run.folder / ROLLOUTS_FILE
        run.last_step = max(run.last_step, _last_step(path))
        if with_rollouts:
            rows = map(_shorten, _read_rows(run, ROLLOUTS_FILE, _is_rollout, "there are no completions to look at"))
            group_size = _section(run.config, "grpo").get("num_generations")
            run.picks = pick_groups(rows, _spread(run.last_step), group_size if type(group_size) is int else None)
    for row in _read_rows(run, BAD_SAMPLES_FILE, lambda row: "reason" in row, None):
        run.num_bad += 1
        if len(run.bad_samples) < NUM_BAD_SHOWN:
            run.bad_samples.append(row)
    _read_sheets(run)
    _read_evaluations(run)
    changed = [path.stat().st_mtime for name in files if (path := run.folder / name).is_file()]
    run.written = datetime.fromtimestamp(max(changed), timezone.utc)
    return run


def _renamed(series: dict[str, Series]) -> dict[str, Series]:
    """Metrics by their names of today, whatever an earlier version called them; of both the one of today."""
    earlier = {_RENAMED[name]: points for name, points in series.items() if name in _RENAMED}
    return earlier | {name: points for name, points in series.items() if name not in _RENAMED}


def stream_rows(path: Path, is_whole: Callable[[Row], bool], notes: list[str]) -> Iterator[Row]:
    """The rows of a file of JSON lines that `is_whole`, one at a time; what is left out is told in `notes` at the end.

    Raises: OSError where the file cannot be opened.
    """
    num_broken, first_broken = 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line.decode("utf-8"))
                if isinstance(row, dict) and is_whole(row):
                    yield row
                    continue
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    notes.append(f"{path.name} ends in a line cut short: the run is writing it, or was killed there.")
                    continue
            num_broken += 1
            first_broken = first_broken or number
    if num_broken:
        lines = (
            f"line {first_broken} is" if num_broken == 1 else f"{num_broken} lines, the first is {first_broken}, are"
        )
        notes.append(f"{path.name}: {lines} not a row that can be read, and left out.")


def _read_rows(run: Run, name: str, is_whole: Callable[[Row], bool], consequence: str | None) -> Iterator[Row]:
    """With a `consequence` a missing file is worth a note."""
    try:
        yield from stream_rows(run.folder / name, is_whole, run.notes)
    except FileNotFoundError:
        if consequence is not None:
            run.notes.append(f"{name} is missing: {consequence}.")
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror}).")


def _read_object(run: Run, name: str, consequence: str | None) -> Row:
    try:
        content = json.loads((run.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if consequence is not None:
            run.notes.append(f"{name} is missing: {consequence}.")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{name} cannot be read ({error}).")
        return {}
    if not isinstance(content, dict):
        run.notes.append(f"{name} is not a JSON object.")
        return {}
    return content


def _is_step(row: Row) -> bool:
    return type(row.get("step")) is int and 0 <= row["step"] < 2**53


def _is_rollout(row: Row) -> bool:
    texts = ("sample_id", "video", "question", "solution", "completion")
    return (
        _is_step(row)
        and all(isinstance(row.get(name), str) for name in texts)
        and all(isinstance(row.get(name), (int, float)) for name in ("reward", "advantage"))
        and isinstance(row.get("rewards"), dict)
        and all(value is None or isinstance(value, (int, float)) for value in row["rewards"].values())
    )


def _shorten(row: Row) -> Row:
    """Texts as long as a page shows them, so that what is kept of a run is bounded."""
    text, num_cut = cut(row["completion"])
    return {**row, "completion": text, "num_cut": num_cut, "question": cut(row["question"])[0]}


def cut(text: str) -> tuple[str, int]:
    """The first `MAX_CHARS`, and how many characters that leaves out."""
    return text[:MAX_CHARS], max(0, len(text) - MAX_CHARS)


def _section(config: Row, name: str) -> Row:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _total_steps(run: Run) -> int | None:
    """From the settings; where they give epochs, from how much of one the last update had reached."""
    optim = _section(run.config, "optim")
    limit, epochs = optim.get("max_steps"), optim.get("num_train_epochs")
    if type(limit) is int and limit > 0:
        return limit
    if run.is_finished and run.last_step:
        return run.last_step
    if "epoch" in run.series and isinstance(epochs, (int, float)) and math.isfinite(epochs):
        steps, reached = run.series["epoch"]
        if reached[-1] > 0 and math.isfinite(reached[-1]):
            return max(int(steps[-1]), round(epochs * steps[-1] / reached[-1]))
    return None


def _last_step(path: Path, tail_bytes: int = 2**20) -> int:
    """Of the last whole row near the end of a file of rows; 0 where there is none."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - tail_bytes))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _is_step(row):
            return int(row["step"])
    return 0


def _spread(last_step: int) -> list[int]:
    """The updates whose completions are shown: the first, the last, and some between at equal distances."""
    number = min(NUM_UPDATES_SHOWN, last_step)
    if number < 2:
        return [last_step] if last_step else []
    return sorted({1 + round(i * (last_step - 1) / (number - 1)) for i in range(number)})


def _read_sheets(run: Run) -> None:
    places = [Path(str(_section(run.config, "data").get(name) or "")) for name in ("video_root", "eval_video_root")]
    for index in sorted((run.folder / FRAMES_DIR).glob("index*.jsonl")):
        try:
            for row in stream_rows(index, _is_sheet, run.notes):
                file = run.folder / row["sheet"]
                if not file.resolve().is_relative_to(run.folder.resolve()):
                    run.notes.append(f"{index.name} names {row['sheet']!r}, which is outside the run folder.")
                    continue
                number, columns = len(row["timestamps_seconds"]), row["columns"]
                width, height = row["frame_px"]
                size, times = (width, height), tuple(map(float, row["timestamps_seconds"]))
                sheet = Sheet(file, columns, math.ceil(number / columns), size, times)
                video = str(row["video"])
                for name in (str(row.get("path", video)), video, *(str(place / video) for place in places)):
                    run.sheets.setdefault(name, sheet)
                if row.get("when", "evaluation") == "evaluation":
                    run.sheets_by_id.setdefault(str(row.get("sample_id")), sheet)
        except OSError as error:
            run.notes.append(f"{index.name} cannot be read ({error.strerror}).")


def _is_sheet(row: Row) -> bool:
    times, size, columns = row.get("timestamps_seconds"), row.get("frame_px"), row.get("columns")
    return (
        isinstance(row.get("sheet"), str)
        and "\0" not in row["sheet"]
        and isinstance(row.get("video"), str)
        and isinstance(times, list)
        and len(times) > 0
        and all(isinstance(time, (int, float)) for time in times)
        and isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and side > 0 for side in size)
        and type(columns) is int
        and columns > 0
    )


def _read_evaluations(run: Run) -> None:
    for file in sorted((run.folder / EVALUATION_DIR).glob("*.json")):
        content = _read_object(run, f"{EVALUATION_DIR}/{file.name}", None)
        answers, rates = content.get("answers"), content.get("summary")
        if not isinstance(rates, dict) or not isinstance(answers, list) or not all(map(_is_answer, answers)):
            if content:
                run.notes.append(f"{EVALUATION_DIR}/{file.name} is not what `fastr1 eval --output` writes.")
            continue
        run.evaluations[file.stem] = content


def _is_answer(answer: Any) -> bool:
    texts = ("sample_id", "question", "completion", "solution")
    return (
        isinstance(answer, dict)
        and all(isinstance(answer.get(name), str) for name in texts)
        and "is_correct" in answer
        and "is_well_formed" in answer
    )
