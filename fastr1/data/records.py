"""Annotation files → samples: the NextQA JSONL (GRPO) and the LLaVA-style JSON list (supervised fine-tuning).

Rows are checked here, videos are not opened: only their existence and size are looked at. A bad row stops the load
(`policy="error"`) or is dropped, counted and reported (`policy="skip"`); it is never replaced by another row.
Videos that turn out to be undecodable later are counted by `BadSampleLedger` against the same bound.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastr1.data.rows import RowError, VideoFiles, decode_json, parse_grpo_row, parse_sft_row
from fastr1.schema import DataError, Sample, SftSample

POLICIES = ("error", "skip")
_NUM_LISTED = 3  # bad rows quoted in an error message

T = TypeVar("T")


@dataclass(frozen=True)
class BadRow:
    """A row that was dropped."""

    origin: str  # "nextqa.jsonl:12" (line) or "coldstart.json[3]" (entry, from 0)
    reason: str


@dataclass(frozen=True)
class LoadedSamples(Generic[T]):
    """What a file held: the usable samples in file order and the rows that were dropped."""

    samples: list[T]
    bad_rows: list[BadRow]

    @property
    def num_rows(self) -> int:
        """Rows in the file, good and bad, without blank lines."""
        return len(self.samples) + len(self.bad_rows)


def load_grpo_samples(
    path: str | Path,
    video_root: str | Path,
    *,
    policy: str = "error",
    max_bad_fraction: float = 0.05,
    check_files: bool = True,
) -> LoadedSamples[Sample]:
    """Read a NextQA-style JSONL: one object per line with problem_id, problem, solution and video_filename.

    Optional fields: problem_type (string or list of strings) and data_type (must be "video"). Other fields are ignored,
    blank lines skipped. `video_filename` ("./NextQA/…/1.mp4") is taken below `video_root`. A placeholder `<image>` at
    either end of the problem is removed, because the prompt template writes its own.

    Args:
        policy: "error" raises on the first bad row; "skip" drops bad rows and reports them.
        max_bad_fraction: with "skip", raise when more than this share of the rows is bad.
        check_files: also require every video to be an existing file of at least one byte.

    Raises:
        DataError: naming file, line, reason and remedy; also for a file without rows.
    """
    path, root = _checked_paths(path, video_root, check_files)
    videos = VideoFiles(root, check_files)

    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if line.strip():
                yield f":{number}", line

    def parse(origin: str, line: bytes) -> Sample:
        return parse_grpo_row(decode_json(line), origin, videos)

    return _collect(path, rows(), parse, policy, max_bad_fraction)


def load_sft_samples(
    path: str | Path,
    video_root: str | Path,
    *,
    policy: str = "error",
    max_bad_fraction: float = 0.05,
    check_files: bool = True,
) -> LoadedSamples[SftSample]:
    """Read a LLaVA-style JSON list: objects with id, video and conversations = [human turn, gpt turn].

    The human turn may carry `<image>` at either end; it is removed and the question stripped. The answer is kept as it
    is. Arguments and errors as in `load_grpo_samples`; a bad entry is named by its place in the list, from 0. A file
    that is not one JSON list raises under either policy, because no entry of it can be told good from bad.
    """
    path, root = _checked_paths(path, video_root, check_files)
    videos = VideoFiles(root, check_files)
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:  # malformed JSON or not UTF-8
        raise DataError(f"{path}: not valid JSON ({error}); expected one JSON list of conversations") from error
    if not isinstance(entries, list):
        raise DataError(
            f"{path}: the top level is {type(entries).__name__}, expected a JSON list of objects with id, "
            "conversations and video; a JSONL file of questions belongs to the GRPO task"
        )
    rows = ((f"[{index}]", entry) for index, entry in enumerate(entries))
    return _collect(path, rows, lambda origin, entry: parse_sft_row(entry, origin, videos), policy, max_bad_fraction)


class BadSampleLedger:
    """Counts samples whose video could not be decoded, against the same bound as bad rows. Thread-safe.

    A sample that fails again in a later epoch counts once towards the bound. Each process keeps its own ledger.
    """

    def __init__(self, num_rows: int, *, policy: str = "error", max_bad_fraction: float = 0.05, num_bad_rows: int = 0):
        """`num_rows` and `num_bad_rows`: rows of the file and those already dropped while reading it."""
        _check_policy(policy, max_bad_fraction)
        self._num_rows = num_rows
        self._policy = policy
        self._max_bad_fraction = max_bad_fraction
        self._num_bad_rows = num_bad_rows
        self._reasons: dict[str, str] = {}
        self._num_failures = 0
        self._lock = threading.Lock()

    def record(self, sample_origin: str, reason: str) -> None:
        """Note one failure.

        Raises:
            DataError: always under policy "error"; under "skip" once the bound is exceeded.
        """
        with self._lock:
            self._num_failures += 1
            self._reasons.setdefault(sample_origin, reason)
            listed = [BadRow(origin, why) for origin, why in self._reasons.items()]
        if self._policy == "error":
            raise DataError(f'{sample_origin}: {reason}; repair or remove the video, or set data.policy to "skip"')
        num_bad = self._num_bad_rows + len(listed)
        if num_bad > self._max_bad_fraction * self._num_rows:
            raise DataError(_too_many(num_bad, self._num_rows, self._max_bad_fraction, listed))

    @property
    def num_bad_samples(self) -> int:
        """Distinct samples that failed to decode."""
        with self._lock:
            return len(self._reasons)

    @property
    def num_failures(self) -> int:
        """All failures, repeats included."""
        with self._lock:
            return self._num_failures

    def bad_samples(self) -> list[BadRow]:
        """The failed samples in order of first failure, with their first reason."""
        with self._lock:
            return [BadRow(origin, why) for origin, why in self._reasons.items()]


def _collect(
    path: Path,
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[str, Any], T],
    policy: str,
    max_bad_fraction: float,
) -> LoadedSamples[T]:
    """Parse every (place, raw row) of `path` under the policy for bad rows."""
    _check_policy(policy, max_bad_fraction)
    samples: list[T] = []
    bad_rows: list[BadRow] = []
    for place, raw in rows:
        origin = f"{path.name}{place}"
        try:
            samples.append(parse(origin, raw))
        except RowError as problem:
            if policy == "error":
                raise DataError(
                    f'{path}{place}: {problem.reason}; {problem.remedy}, or set data.policy to "skip"'
                ) from None
            bad_rows.append(BadRow(origin, problem.reason))
    num_rows = len(samples) + len(bad_rows)
    if num_rows == 0:
        raise DataError(f"{path}: the file holds no rows; check that the download finished")
    if not samples or len(bad_rows) > max_bad_fraction * num_rows:
        raise DataError(f"{path}: {_too_many(len(bad_rows), num_rows, max_bad_fraction, bad_rows)}")
    return LoadedSamples(samples, bad_rows)


def _checked_paths(path: str | Path, video_root: str | Path, check_files: bool) -> tuple[Path, Path]:
    path, root = Path(path), Path(video_root)
    if not path.is_file():
        raise DataError(f"annotation file {path} does not exist; correct data.train_file or data.eval_file")
    if check_files and not root.is_dir():
        raise DataError(f"video root {root} is not a folder; correct data.video_root")
    return path, root


def _check_policy(policy: str, max_bad_fraction: float) -> None:
    if policy not in POLICIES:
        raise DataError(f"data.policy is {policy!r}; choose one of {', '.join(POLICIES)}")
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise DataError(f"data.max_bad_fraction is {max_bad_fraction}; choose a share between 0 and 1")


def _too_many(num_bad: int, num_rows: int, max_bad_fraction: float, bad_rows: list[BadRow]) -> str:
    listed = "; ".join(f"{row.origin}: {row.reason}" for row in bad_rows[:_NUM_LISTED])
    more = f"; and {len(bad_rows) - _NUM_LISTED} more" if len(bad_rows) > _NUM_LISTED else ""
    return (
        f"{num_bad} of {num_rows} rows cannot be used, data.max_bad_fraction allows {max_bad_fraction:g} "
        f"({listed}{more}); repair the rows or raise data.max_bad_fraction"
    )
