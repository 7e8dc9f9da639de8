"""The fields of one row of an annotation file, or the reason why it cannot be used. For the readers beside it."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from fastr1.schema import DataError

PLACEHOLDER = "<image>"  # literal that marks the place of the visual tokens in a text
ROOTS = "data.video_root or data.eval_video_root"


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
            raise RowError(f"video {name!r} does not lie below the video root", f"write the path relative to {ROOTS}")
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
                return (f"video file {path} does not exist", f"download it or correct {ROOTS}")
            size = path.stat().st_size
        except OSError as error:
            return (f"video file {path} cannot be looked at ({error.strerror})", "correct the name")
        if size == 0:
            return (f"video file {path} is empty (0 bytes)", "download it again")
        return None


def checked_paths(path: str | Path, video_root: str | Path, check_files: bool) -> tuple[Path, Path]:
    """Both as paths, after a look whether they are there."""
    path, root = Path(path), Path(video_root)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"annotation file {path} {problem}; correct data.train_file or data.eval_file")
    if check_files and not root.is_dir():
        raise DataError(f"video root {root} is not a folder; correct {ROOTS}")
    return path, root


def decode_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # malformed JSON or not UTF-8
        raise RowError(f"not valid JSON ({error})", "write one JSON object per line") from error


def json_object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError(f"the row is {describe(row)}", "write one JSON object per sample")
    return row


def text_field(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise RowError(f"field {name!r} is missing", "add it")
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"field {name!r} is {describe(value)}", "make it a string")
    if not value.strip():
        raise RowError(f"field {name!r} is empty", "fill it in")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"field {name!r} holds half of a surrogate pair", "repair the cut-off character")
    return value


def identifier(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(row, name)


def without_placeholder(text: str, what: str) -> str:
    """`text` without one `<image>` at either end; the rest, whitespace included, is left as it is."""
    bare = text.strip()
    if PLACEHOLDER not in bare:
        return text
    at_an_end = bare.startswith(PLACEHOLDER) or bare.endswith(PLACEHOLDER)
    if not at_an_end or bare.count(PLACEHOLDER) > 1:
        raise RowError(
            f"the {what} holds {PLACEHOLDER} inside its text: {quote(text)}",
            f"remove it: there is one video per sample and the prompt template writes {PLACEHOLDER} itself",
        )
    if bare == PLACEHOLDER:
        raise RowError(f"the {what} is empty apart from {PLACEHOLDER}", "fill it in")
    return text.replace(PLACEHOLDER, "")


def describe(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {quote(value)}"


def quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
