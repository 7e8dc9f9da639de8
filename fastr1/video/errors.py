"""What is raised when a video cannot be used."""

from __future__ import annotations

from pathlib import Path

from fastr1.schema import DataError

REPLACE_FILE = 'Replace the file, remove its rows, or set data.policy to "skip".'


class BackendError(ValueError):
    """The decoder that was asked for cannot be loaded; no fault of any video."""


class VideoError(DataError):
    """A video cannot be decoded. The message names path, reason and remedy; no other clip is ever used instead."""

    def __init__(self, path: Path, reason: str, remedy: str = REPLACE_FILE) -> None:
        super().__init__(f"{path}: {reason.rstrip('.')}. {remedy}")
        self.path = path
        self.reason = reason
        self.problem = f"{path}: {reason.rstrip('.')}"  # without the remedy
