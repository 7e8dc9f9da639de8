"""Question files (the NextQA JSONL of the paper) → samples with their options and the right letter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastr1.config import DataConfig
from fastr1.data.ledger import LoadedSamples, collect
from fastr1.data.rows import (
    RowError,
    VideoFiles,
    checked_paths,
    decode_json,
    describe,
    identifier,
    json_object,
    quote,
    text_field,
    without_placeholder,
)
from fastr1.schema import Sample

_SOLUTION = re.compile(r"<answer>\s*([A-Z])\s*</answer>")
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):](?:\s|$)", re.MULTILINE)
_OPTIONS_HEADER = re.compile(r"^\s*Options:\s*$", re.MULTILINE)


def load_questions(
    path: str | Path,
    video_root: str | Path,
    *,
    policy: str = DataConfig.policy,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
    check_files: bool = True,
    limit: int | None = None,
) -> LoadedSamples[Sample]:
    """Read a NextQA-style JSONL: one object per line with problem_id, problem, solution and video_filename.

    Optional fields: problem_type (string or list of strings) and data_type (must be "video"). Other fields are ignored,
    blank lines skipped. `video_filename` ("./NextQA/…/1.mp4") is taken below `video_root`. A placeholder `<image>` at
    either end of the problem is removed, because the prompt template writes its own.

    Args:
        policy: "error" raises on the first bad row; "skip" drops bad rows and reports them.
        max_bad_fraction: with "skip", raise when more than this share of the rows is bad.
        check_files: also require every video to be an existing file of at least one byte.
        limit: read the first `limit` rows only; a bad one among them is not made up for by the row after them.

    Raises:
        DataError: naming file, line, reason and remedy; also for a file without rows.
    """
    path, root = checked_paths(path, video_root, check_files)
    videos = VideoFiles(root, check_files)

    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if line.strip():
                yield f":{number}", line

    def parse(origin: str, line: bytes) -> Sample:
        if line.lstrip().startswith(b"["):
            remedy = "write one JSON object per line; a list of conversations belongs to the task sft"
            raise RowError("the row is list, or where one begins", remedy)
        return _parse_row(decode_json(line), origin, videos)

    return collect(path, islice(rows(), limit), parse, policy, max_bad_fraction)


def option_letters(problem: str) -> str:
    """Letters of the options, in order of appearance: "ABCDE" for five lines `A. …` to `E. …`.

    Lines `A. text`, `A) text`, `(A) text` and `A: text` count. Where a line `Options:` exists, only what follows it is
    read, so a question that itself starts with "A. " is not mistaken for an option.

    Returns:
        The letters, "" where there are none. Repeated or missing letters are returned as found.
    """
    header = _OPTIONS_HEADER.search(problem)
    return "".join(_OPTION_LINE.findall(problem, header.end() if header else 0))


def _parse_row(row: Any, origin: str, videos: VideoFiles) -> Sample:
    row = json_object(row)
    sample_id = identifier(row, "problem_id")
    problem = without_placeholder(text_field(row, "problem"), "problem")
    letters = option_letters(problem)
    if len(letters) < 2:
        raise RowError(
            f"the problem offers {len(letters)} options: {quote(problem)}",
            "list at least two lines 'A. …', 'B. …' below a line 'Options:'",
        )
    if letters != "".join(chr(ord("A") + i) for i in range(len(letters))):
        raise RowError(f"the options are lettered {letters!r}", "letter them A, B, C, … in order, each once")
    solution = text_field(row, "solution")
    match = _SOLUTION.fullmatch(solution.strip())
    if match is None or match[1] not in letters:
        raise RowError(
            f"solution {quote(solution)} is not one of the options {letters}", "write it as '<answer>A</answer>'"
        )
    data_type = row.get("data_type", "video")
    if data_type != "video":
        raise RowError(f"data_type is {data_type!r}", "only 'video' rows can be used; remove the row")
    return Sample(
        sample_id=sample_id,
        problem=problem,
        options=letters,
        letter=match[1],
        video_path=videos.resolve(text_field(row, "video_filename")),
        origin=origin,
        problem_type=_problem_type(row),
    )


def _problem_type(row: dict[str, Any]) -> str:
    value = row.get("problem_type", "")
    kinds = [value] if isinstance(value, str) else value
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise RowError(f"field 'problem_type' is {describe(value)}", "make it a string or a list of strings")
    return ",".join(kinds)
