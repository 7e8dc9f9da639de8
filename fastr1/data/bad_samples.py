"""bad_samples.jsonl of a run folder: one line for every row or video that was left out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastr1.schema import BadSample

BAD_SAMPLES_FILE = "bad_samples.jsonl"


class BadSampleFile:
    """Writes the file, one object {"step", "when", "file", "line", "reason"} per line. Nothing bad: no file.

    `is_main=False`: every method does nothing.
    """

    def __init__(self, folder: str | Path, is_main: bool = True) -> None:
        self.path = Path(folder) / BAD_SAMPLES_FILE
        self._is_main = is_main

    def rewrite(self, rows: Sequence[BadSample]) -> None:
        """Replace what an earlier process wrote, in one move: a resumed run starts from its checkpoint's rows."""
        if not self._is_main:
            return
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(_lines(rows), encoding="utf-8")
        os.replace(temporary, self.path)

    def append(self, rows: Sequence[BadSample]) -> None:
        """Add rows; a process that is killed afterwards has kept them."""
        if rows and self._is_main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_lines(rows))


def _lines(rows: Sequence[BadSample]) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
