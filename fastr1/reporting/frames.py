"""The frames that a run showed its model, as contact sheets in `RUN/frames/`, written in the background.

One JPEG per distinct clip, a video and the numbers of its frames, whatever the number of epochs, resumes and
processes; one line per sheet in `frames/index.jsonl`. What the loader's threads pay is a small copy of the frames of a
clip that has no sheet yet; a thread of each process draws and writes. Sizes are bounded: of the sheets by a budget, a
part of which is kept for the held-out clips, and of the copies that wait by `QUEUE_BYTES`. An error of the disk costs
sheets, which the log counts, never the run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastr1.reporting.run_log import read_rows
from fastr1.schema import Clip, Sample, SftSample
from fastr1.video.sheets import SmallFrames, draw_sheet, encode_jpeg, small_frames

FRAMES_DIR = "frames"
INDEX_FILE = "frames/index.jsonl"
FRAME_PX = 128  # longer side of a frame in a sheet
JPEG_QUALITY = 70
HELD_OUT_SHARE = 0.25  # of the budget
QUEUE_BYTES = 64 * 2**20

When = Literal["training", "evaluation"]

logger = logging.getLogger(__name__)


class FrameRecorder:
    """Writes the sheets of this process's clips.

    Args:
        output_dir: the run folder.
        budget_mib: size of all sheets of the run, with those of earlier starts; 0 writes none.
        roots: the folder that the videos of each annotation file are relative to. With one for "evaluation", a quarter
            of the budget is kept for its clips, which may also use the rest.
        rank, world_size: of this process; each has the same part of what is left of the budget.
    """

    def __init__(
        self, output_dir: str | Path, budget_mib: int, roots: Mapping[When, Path], *, rank: int = 0, world_size: int = 1
    ) -> None:
        self._run, self._folder, self._index = (Path(output_dir) / name for name in ("", FRAMES_DIR, INDEX_FILE))
        self._budget, self._roots, self._rank, self._world_size = budget_mib * 2**20, roots, rank, world_size
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._written: deque[Future[None]] = deque()
        self._known: set[str] = set()  # sheets that are there or will be
        self._lost: set[str] = set()  # of clips that should have had one
        self._spent: set[When] = set()
        self._left = self._reserved = 0.0
        self._waiting_bytes = 0
        self._has_warned = False

    def clean(self, *, is_resumed: bool) -> None:
        """What an earlier start left: removed for a new run; for a resumed one, what was cut short. One process calls
        it before any begins."""
        rows = self._read_index() if is_resumed else []
        rows = [row for row in rows if (self._run / row["sheet"]).is_file()]
        kept = {(self._run / row["sheet"]).name for row in rows}
        for path in [*self._folder.glob("*.jpg"), *self._folder.glob(".*.tmp")]:
            if path.name not in kept:
                path.unlink()
        if self._index.exists():
            temporary = self._index.with_name(".index.tmp")
            temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
            os.replace(temporary, self._index)

    def begin(self) -> None:
        """Start to write, after the sheets that are there."""
        if not self._budget:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = self._read_index()
        self._known = {Path(row["sheet"]).name for row in rows}
        spent = {when: sum(row["bytes"] for row in rows if row["when"] == when) for when in ("training", "evaluation")}
        left = max(0, self._budget - sum(spent.values()))
        reserve = HELD_OUT_SHARE * self._budget if "evaluation" in self._roots else 0
        self._left = left / self._world_size
        self._reserved = min(left, max(0, reserve - spent["evaluation"])) / self._world_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="report-frames")

    def note(self, when: When, sample: Sample | SftSample, clip: Clip) -> None:
        """A clip that the model is shown; has it drawn where it has no sheet yet. Called in the loader's threads.

        Raises: what a sheet before it could not be drawn for, unless that was an error of the disk.
        """
        if self._pool is None:
            return
        name = _sheet_name(sample.video_path, clip)
        with self._lock:
            if name in self._known or when in self._spent:
                return
            self._known.add(name)
        small = small_frames(clip.frames, FRAME_PX)
        row = {
            "video": sample.video_path.relative_to(self._roots[when]).as_posix(),
            "path": str(sample.video_path),
            "sample_id": sample.sample_id,
            "when": when,
            "sheet": f"{FRAMES_DIR}/{name}",
            "num_frames": len(clip.indices),
            "columns": small.columns,
            "frame_px": list(small.size),
            "timestamps_seconds": list(clip.timestamps_seconds),
            "frame_indices": list(clip.indices),
        }
        with self._lock:
            while self._written and self._written[0].done():
                self._written.popleft().result()
            if self._pool is None:
                return
            waiting = self._waiting_bytes + small.frames.nbytes
            if self._waiting_bytes and waiting > QUEUE_BYTES:
                self._lose(name, "sheets of clips are wanted faster than they can be written")
                return
            self._waiting_bytes = waiting
            self._written.append(self._pool.submit(self._write, when, name, row, small))

    def close(self) -> None:
        """Wait for what is still to be written, and log how many clips got no sheet that they should have.

        Raises: what a sheet could not be drawn for, unless that was an error of the disk.
        """
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is None:
            return
        pool.shutdown(wait=True)
        if self._lost:
            logger.warning("%d clips of this process have no contact sheet in %s", len(self._lost), self._folder)
        for written in self._written:
            written.result()

    def _write(self, when: When, name: str, row: dict[str, Any], small: SmallFrames) -> None:
        try:
            content = encode_jpeg(draw_sheet(small), JPEG_QUALITY)
            if not self._takes(when, len(content)):
                return
            try:
                self._store(name, content, {**row, "bytes": len(content)})
            except OSError as error:
                with self._lock:
                    self._left += len(content)
                    self._lose(name, f"a contact sheet cannot be written to {self._folder} ({error.strerror})")
            else:
                with self._lock:
                    self._lost.discard(name)
        finally:
            with self._lock:
                self._waiting_bytes -= small.frames.nbytes

    def _takes(self, when: When, num_bytes: int) -> bool:
        """Whether the budget has room for a sheet, which is then taken off it."""
        with self._lock:
            if when in self._spent:
                return False
            if num_bytes > self._left - (self._reserved if when == "training" else 0):
                self._spent.add(when)
                kind, budget = {"training": "training", "evaluation": "held-out"}[when], self._budget // 2**20
                logger.info("no more contact sheets of %s clips: run.report_frames, %d MiB, is spent", kind, budget)
                return False
            self._left -= num_bytes
            if when == "evaluation":
                self._reserved = max(0.0, self._reserved - num_bytes)
            return True

    def _lose(self, name: str, reason: str) -> None:
        """A sheet is not written now; the clip may come again. The reason is logged for the first."""
        self._known.discard(name)
        self._lost.add(name)
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s; training goes on without it, and the end of the log counts all of these", reason)

    def _store(self, name: str, content: bytes, row: dict[str, Any]) -> None:
        """The sheet, then its line, unless another process has them already. Raises: OSError, leaving neither."""
        sheet, temporary = self._folder / name, self._folder / f".{name}.{self._rank}.tmp"
        with open(self._index, "ab", buffering=0) as index:
            if self._world_size > 1:
                fcntl.flock(index, fcntl.LOCK_EX)  # until the file is closed
            if sheet.exists():
                return
            end = index.seek(0, os.SEEK_END)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, sheet)
                line = _line(row).encode()
                if index.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                temporary.unlink(missing_ok=True)
                sheet.unlink(missing_ok=True)
                index.truncate(end)
                raise

    def _read_index(self) -> list[dict[str, Any]]:
        return read_rows(self._index, key="sheet", kind=str) if self._index.exists() else []


@contextmanager
def recording(
    run_dir: str | Path, budget_mib: int, video_root: str | Path, rank: int = 0, world_size: int = 1
) -> Iterator[Callable[[Sample, Clip], None]]:
    """Takes the clips of an evaluation outside of the run, and adds the sheets of those that have none to it."""
    roots: dict[When, Path] = {"evaluation": Path(video_root)}
    recorder = FrameRecorder(run_dir, budget_mib, roots, rank=rank, world_size=world_size)
    recorder.begin()
    try:
        yield partial(recorder.note, "evaluation")
    finally:
        recorder.close()


class SheetIndex:
    """Finds the sheets of a run, while they are written."""

    def __init__(self, run_dir: Path) -> None:
        self._run, self._offset = run_dir, 0
        self._sheets: dict[str, Path] = {}

    def find(self, path: str) -> Path | None:
        """The sheet of a video, as rows of rollouts.jsonl name it; None where it has none, or not yet."""
        if path not in self._sheets and (self._run / INDEX_FILE).exists():
            with open(self._run / INDEX_FILE, "rb") as file:
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
            self._offset += len(whole) + bool(whole)
            for line in whole.splitlines():
                row = json.loads(line)
                self._sheets[row["path"]] = self._run / row["sheet"]
        return self._sheets.get(path)


def _sheet_name(video_path: Path, clip: Clip) -> str:
    """The same for the same file and frames."""
    key = json.dumps([str(video_path), list(clip.indices)])
    return f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.jpg"


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
