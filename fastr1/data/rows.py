"""One row of an annotation file → one sample, or the reason why not. Used by `records` only."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from fastr1.data.questions import PLACEHOLDER, option_letters
from fastr1.schema import Sample, SftSample

_SOLUTION = re.compile(r"<answer>\s*([A-Z])\s*</answer>")


class RowError(ValueError):
    """Why one row cannot be used, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


class VideoFiles:
    """Turns a file's video names into paths below the root, looking at each distinct file once."""

    def __init__(self, root: Path, check_files: bool) -> None:
        self._root = root
        self._check_files = check_files
        self._problems: dict[Path, tuple[str, str] | None] = {}

    def resolve(self, name: str) -> Path:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise RowError(
                f"video {name!r} does not lie below the video root", "write the path relative to data.video_root"
            )
        path = self._root / relative
        if self._check_files:
            if path not in self._problems:
                self._problems[path] = self._inspect(path)
            problem = self._problems[path]
            if problem is not None:
                raise RowError(*problem)
        return path

    @staticmethod
    def _inspect(path: Path) -> tuple[str, str] | None:
        try:
            if not path.is_file():
                return (f"video file {path} does not exist", "download it or correct data.video_root")
            size = path.stat().st_size
        except OSError as error:
            return (f"video file {path} cannot be looked at ({error.strerror})", "correct the name")
        if size == 0:
            return (f"video file {path} is empty (0 bytes)", "download it again")
        return None


def parse_grpo_row(row: Any, origin: str, videos: VideoFiles) -> Sample:
    row = _object(row)
    sample_id = _identifier(row, "problem_id")
    problem = _without_placeholder(_text(row, "problem"), "problem")
    letters = option_letters(problem)
    if len(letters) < 2:
        raise RowError(
            f"the problem offers {len(letters)} options: {_quote(problem)}",
            "list at least two lines 'A. …', 'B. …' below a line 'Options:'",
        )
    if letters != "".join(chr(ord("A") + i) for i in range(len(letters))):
        raise RowError(f"the options are lettered {letters!r}", "letter them A, B, C, … in order, each once")
    solution = _text(row, "solution")
    match = _SOLUTION.fullmatch(solution.strip())
    if match is None or match[1] not in letters:
        raise RowError(
            f"solution {_quote(solution)} is not one of the options {letters}", "write it as '<answer>A</answer>'"
        )
    data_type = row.get("data_type", "video")
    if data_type != "video":
        raise RowError(f"data_type is {data_type!r}", "only 'video' rows can be used; remove the row")
    return Sample(
        sample_id=sample_id,
        problem=problem,
        solution=f"<answer>{match[1]}</answer>",  # without the line breaks that the reward functions would trip over
        video_path=videos.resolve(_text(row, "video_filename")),
        origin=origin,
        problem_type=_problem_type(row),
    )


def parse_sft_row(row: Any, origin: str, videos: VideoFiles) -> SftSample:
    row = _object(row)
    sample_id = _identifier(row, "id")
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise RowError(f"field 'conversations' is {_describe(turns)}", "give a list of a human and a gpt turn")
    speakers = [turn.get("from") if isinstance(turn, dict) else turn for turn in turns]
    if speakers != ["human", "gpt"]:
        raise RowError(
            f"the turns are from {_quote(speakers)}", "give exactly one 'human' turn followed by one 'gpt' turn"
        )
    question = _without_placeholder(_text(turns[0], "value"), "human turn").strip()
    return SftSample(
        sample_id=sample_id,
        question=question,
        answer=_text(turns[1], "value"),
        video_path=videos.resolve(_text(row, "video")),
        origin=origin,
    )


def decode_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # malformed JSON or not UTF-8
        raise RowError(f"not valid JSON ({error})", "write one JSON object per line") from error


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError(f"the row is {_describe(row)}", "write one JSON object per sample")
    return row


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise RowError(f"field {name!r} is missing", "add it")
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"field {name!r} is {_describe(value)}", "make it a string")
    if not value.strip():
        raise RowError(f"field {name!r} is empty", "fill it in")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"field {name!r} holds half of a surrogate pair", "repair the cut-off character")
    return value


def _identifier(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, name)


def _problem_type(row: dict[str, Any]) -> str:
    value = row.get("problem_type", "")
    kinds = [value] if isinstance(value, str) else value
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise RowError(f"field 'problem_type' is {_describe(value)}", "make it a string or a list of strings")
    return ",".join(kinds)


def _without_placeholder(text: str, what: str) -> str:
    """`text` without one `<image>` at either end; the rest, whitespace included, is left as it is."""
    bare = text.strip()
    if PLACEHOLDER not in bare:
        return text
    at_an_end = bare.startswith(PLACEHOLDER) or bare.endswith(PLACEHOLDER)
    if not at_an_end or bare.count(PLACEHOLDER) > 1:
        raise RowError(
            f"the {what} holds {PLACEHOLDER} inside its text: {_quote(text)}",
            f"remove it: there is one video per sample and the prompt template writes {PLACEHOLDER} itself",
        )
    if bare == PLACEHOLDER:
        raise RowError(f"the {what} is empty apart from {PLACEHOLDER}", "fill it in")
    return text.replace(PLACEHOLDER, "")


def _describe(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {_quote(value)}"


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
