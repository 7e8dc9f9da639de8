"""`fastr1 check-data`: every row and every video of a configuration, before a run needs them.

Rows are read and their texts measured as training and evaluation do; each video is decoded once, with the frames that
training would take, in one process per core. A decoder that crashes or hangs costs its process, not the check. Videos
found good are remembered with their size and time, so an interrupted check goes on where it was, and a repeated one
looks only at what is new, changed or was bad.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastr1.config import DataConfig, TrainConfig
from fastr1.data.bad_samples import BadSampleFile
from fastr1.data.conversations import load_conversations
from fastr1.data.ledger import BadRow, BadSampleLedger, LoadedSamples, tokenize_samples
from fastr1.data.questions import load_questions
from fastr1.models import load_processor
from fastr1.models.texts import conversation_ids, prompt_ids
from fastr1.schema import BadSample, DataError
from fastr1.video import describe_backend
from fastr1.workers import Outcome, WorkerPool

CHECKED_FILE = "checked_videos.jsonl"
ALL_BAD_ALLOWED: dict[str, Any] = {"policy": "skip", "max_bad_fraction": 1.0}


@dataclass
class _Annotations:
    """One annotation file of the configuration."""

    key: str  # "data.train_file"
    loaded: LoadedSamples[Any]
    clean: Path  # where it is written without its bad rows

    @property
    def file(self) -> Path:
        return self.loaded.file


def check_data(
    config: TrainConfig,
    *,
    output_dir: str | Path | None = None,
    num_workers: int | None = None,
    timeout_seconds: float = 300.0,
) -> int:
    """Check the training and the evaluation file of a configuration, print what is bad and write files without it.

    Args:
        output_dir: where the clean files, bad_samples.jsonl and the list of videos known to be good are written;
            None: beside the annotation files.
        num_workers: processes that decode; None: one per core.
        timeout_seconds: a video that takes longer is bad.
    Returns: the exit code: 0 nothing bad, 1 something bad, 130 interrupted.
    Raises: DataError where a file cannot be read at all or the folder not be written to.
    """
    folder = Path(config.data.train_file).parent if output_dir is None else Path(output_dir)
    known = _KnownVideos(folder / CHECKED_FILE, config.data)
    annotations = _read(config, None if output_dir is None else folder)
    videos = sorted({sample.video_path for part in annotations for sample in part.loaded.samples})
    todo = [path for path in videos if not known.is_good(path)]
    decoder = describe_backend(config.data.backend)
    print(f"{len(videos)} videos, {len(videos) - len(todo)} of them known to be good; {decoder}")
    num_workers = min(num_workers or _num_cores(), max(len(todo), 1))
    problems: dict[Path, str] = {}
    try:
        with (
            closing(WorkerPool("fastr1.video.checking:find_problem", num_workers)) as pool,
            _progress_bar(len(videos), len(videos) - len(todo)) as bar,
        ):
            settings = (config.data.num_frames, config.data.max_frames, config.data.backend)
            tasks = [(str(path), *settings) for path in todo]
            for outcome in pool.run(tasks, timeout_seconds=timeout_seconds):
                path = todo[outcome.index]
                problem = _problem(path, outcome, timeout_seconds)
                if problem is None:
                    known.add(path)
                else:
                    problems[path] = problem
                    bar.set_postfix_str(f"{len(problems)} bad", refresh=False)
                bar.update()
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return _report(annotations, problems, folder)


def _read(config: TrainConfig, folder: Path | None) -> list[_Annotations]:
    """Both files with the rows that cannot be used; texts are measured where the model folder is there."""
    data, processor = config.data, None
    if (Path(config.model.path) / "config.json").is_file():
        processor = load_processor(config.model.path)
    else:
        print(f"lengths of texts are not checked: model.path {config.model.path} is not there")
    load: Any = load_conversations if config.task == "sft" else load_questions
    tokenize: Any = conversation_ids if config.task == "sft" else prompt_ids
    files = [("data.train_file", data.train_file, data.video_root, load, tokenize)]
    if data.eval_file is not None:
        root = data.eval_video_root or data.video_root
        files.append(("data.eval_file", data.eval_file, root, load_questions, prompt_ids))
    found: list[_Annotations] = []
    for key, file, root, load, tokenize in files:
        loaded = load(file, root, **ALL_BAD_ALLOWED)
        if processor is not None:
            measure = functools.partial(tokenize, processor, data)
            loaded, _ = tokenize_samples(loaded, measure, **ALL_BAD_ALLOWED)
        found.append(_Annotations(key, loaded, _clean_path(Path(file), folder, found)))
    return found


def _clean_path(file: Path, folder: Path | None, before: Sequence[_Annotations]) -> Path:
    """Beside the file or in `folder`, which must be writable now rather than after hours of decoding."""
    clean = (folder or file.parent) / f"{file.stem}.clean{file.suffix}"
    if any(part.clean == clean and part.file != file for part in before):
        clean = clean.with_name(f"eval.{clean.name}")
    if not os.access(clean.parent, os.W_OK):
        raise DataError(f"{clean} cannot be written: no permission in its folder; choose another --output-dir")
    return clean


class _KnownVideos:
    """The videos found good so far, one line each. A line counts as long as size, time and settings are the same."""

    def __init__(self, path: Path, data: DataConfig) -> None:
        self._path = path
        self._settings = {"num_frames": data.num_frames, "max_frames": data.max_frames, "backend": data.backend}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            # a last line cut short by a killed check is dropped, so that the next one does not continue it
            whole = [line for line in lines if line.endswith("\n")]
            path.write_text("".join(whole), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror}); choose another --output-dir") from error
        self._good = set(whole)

    def is_good(self, path: Path) -> bool:
        return self._line(path) in self._good

    def add(self, path: Path) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(self._line(path))

    def _line(self, path: Path) -> str:
        try:
            status = path.stat()
        except OSError:
            return ""
        row = {"video": str(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns, **self._settings}
        return json.dumps(row, ensure_ascii=False) + "\n"


def _problem(path: Path, outcome: Outcome, timeout_seconds: float) -> str | None:
    if outcome.kind == "returned":
        return outcome.value
    reasons = {
        "raised": f"decoding raised {outcome.error}",
        "died": f"the decoder crashed ({outcome.error})",
        "timed out": f"not decoded within {timeout_seconds:g} seconds",
    }
    return f"{path}: {reasons[outcome.kind]}"


def _progress_bar(total: int, initial: int) -> Any:
    """With the time left; in a log file it is written every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=initial, unit="video", desc="decoding", mininterval=interval, dynamic_ncols=True)


def _report(annotations: Sequence[_Annotations], problems: dict[Path, str], folder: Path) -> int:
    everything: list[BadSample] = []
    for part in annotations:
        ledger = BadSampleLedger(part.loaded, **ALL_BAD_ALLOWED)
        failures = [
            BadRow(sample.origin, problems[sample.video_path])
            for sample in part.loaded.samples
            if sample.video_path in problems
        ]
        ledger.record(failures, step=0, when="checking")
        bad = sorted(ledger.rows, key=lambda row: row.line)
        everything += bad
        for row in bad:
            print(f"{row.file}:{row.line}: {row.reason}")
        print(f"{part.file}: {len(bad)} of {part.loaded.num_rows} rows cannot be used")
        if bad:
            print(_write_clean(part, {row.line for row in bad}))
    file = BadSampleFile(folder)
    file.rewrite(everything)
    if everything:
        print(f"the bad rows and their reasons: {file.path}")
    return 1 if everything else 0


def _write_clean(part: _Annotations, bad: set[int]) -> str:
    """The file without its bad rows, the others as they were written; says where."""
    if len(bad) == part.loaded.num_rows:
        return "nothing is left to train on, so no file is written without them"
    content = part.file.read_bytes()
    if part.loaded.samples[0].origin.endswith("]"):
        entries = [entry for index, entry in enumerate(json.loads(content)) if index not in bad]
        text = (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()
    else:
        lines = enumerate(content.splitlines(), start=1)
        text = b"".join(line + b"\n" for number, line in lines if number not in bad and line.strip())
    temporary = part.clean.with_name(f"{part.clean.name}.tmp")
    temporary.write_bytes(text)
    os.replace(temporary, part.clean)
    return f"written without them: {part.clean} (use it with --set {part.key}={part.clean})"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
