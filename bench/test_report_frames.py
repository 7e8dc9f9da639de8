"""What do the contact sheets of its clips cost an update? Every clip is taken for a new one, as in the first epoch.

Updates with and without them differ by more than the sheets take, so the share is measured directly: all that they take
of one core, from the copy in the loader to the file and its line in the index, over the time of an update without them.
A share above `MOST` fails where the update takes the same cores.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Call, Group, Outputs, time_ms, time_ms_once
from test_step import updating
from update_judge import UpdateGroup, judge_update
from update_shapes import UpdateCase
from update_steps import update_packed
from update_work import ClipFiles, Work, draw_work, make_model

from fastr1.reporting.frames import FrameRecorder
from fastr1.schema import Clip, Sample

BUDGET_MIB = 1 << 20  # never spent
MOST = 0.01  # of an update
PAIRS = 10
NUM_THREADS = 2  # that decode, the trainer's default


class Sheets:
    """A recorder that has not seen any clip before; its folder is removed with this object."""

    def __init__(self) -> None:
        folder, root = tempfile.mkdtemp(prefix="fastr1-bench-"), Path("videos")
        self._recorder = FrameRecorder(folder, BUDGET_MIB, {"training": root})
        self._recorder.begin()
        self._samples = (Sample(str(i), "", "AB", "A", root / f"{i}.mp4", "bench") for i in itertools.count())
        self.close = weakref.finalize(self, _remove, folder, self._recorder)

    def note(self, clip: Clip) -> None:
        self.last = clip
        self._recorder.note("training", next(self._samples), clip)


def _remove(folder: str, recorder: FrameRecorder) -> None:
    recorder.close()
    shutil.rmtree(folder)


def write_sheets(clip: Clip, number: int) -> None:
    """All of it, and nothing beside it."""
    sheets = Sheets()
    for _ in range(number):
        sheets.note(clip)
    sheets.close()


@dataclass
class Inputs:
    work: Work
    sheets: Sheets
    files: dict[str, ClipFiles]  # of each provider


def updating_from(name: str) -> Callable[[Inputs], Call]:
    """Whole updates from the files of that provider."""

    def make(inputs: Inputs) -> Call:
        update = updating(update_packed)(inputs.work)

        def call() -> Outputs:
            inputs.work.clips = inputs.files[name]
            return update()

        return call

    return make


WITHOUT = "without sheets"
OPS = {"report_frames": {name: updating_from(name) for name in ("ours", WITHOUT)}}


def set_up(case: UpdateCase) -> Group:
    model, sheets = make_model(case), Sheets()
    files = partial(ClipFiles, case, model.config.vision.image_size, NUM_THREADS)  # type: ignore[attr-defined]
    inputs = {"ours": files(sheets.note), WITHOUT: files()}
    work = draw_work(case, model, inputs[WITHOUT].take(case.num_prompts))
    gold, scales = judge_update(work)
    return UpdateGroup(case, Inputs(work, sheets, inputs), gold, scales, None, None)


def test_report_frames(case: UpdateCase, provider: str, make: Any, run: Any, group: Group) -> None:
    row = run(provider, make, rounds=4)
    if provider == WITHOUT:  # and one after the other, which drifts less than one block after the other
        calls = [updating_from(name)(group.inputs) for name in ("ours", WITHOUT)]
        pairs = [[time_ms_once(call, case) for call in calls] for _ in range(PAIRS)]
        row["sheets_over_without"] = statistics.median(ours / without for ours, without in pairs)
        row["pairs_ms"] = pairs
        last = group.inputs.sheets.last
        row["sheets_ms"] = time_ms(lambda: write_sheets(last, case.num_prompts), rounds=20)
        row["sheets_share"] = row["sheets_ms"] / row["median_ms"]
        if harness.device().type == "cpu":  # elsewhere the update leaves the cores to the loader
            assert row["sheets_share"] <= MOST, row
