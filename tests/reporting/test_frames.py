"""Contact sheets of a run: one per clip, within a budget, whatever the disk does."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastr1.reporting import frames
from fastr1.reporting.frames import FrameRecorder, SheetIndex
from fastr1.reporting.run_log import RunLogError, read_rows
from fastr1.schema import Clip, Sample

MIB = 2**20
ROOT = Path("videos")


def make_recorder(run: Path, budget_mib: int = 1, *, evaluates: bool = False, **ranks: int) -> FrameRecorder:
    roots: dict[Any, Path] = {"training": ROOT, **({"evaluation": Path("held_out")} if evaluates else {})}
    return FrameRecorder(run, budget_mib, roots, **ranks)


def begun(run: Path, budget_mib: int = 1, *, is_resumed: bool = False, **options: Any) -> FrameRecorder:
    recorder = make_recorder(run, budget_mib, **options)
    recorder.clean(is_resumed=is_resumed)
    recorder.begin()
    return recorder


def make_sample(index: int, root: Path = ROOT) -> Sample:
    return Sample(f"id{index}", "?", "AB", "A", root / f"a/{index}.mp4", f"q.jsonl:{index}")


def make_clip(index: int = 0, num_frames: int = 6, side: int = 32, first: int = 0) -> Clip:
    """Noise, which a JPEG does not make much smaller."""
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(256, (num_frames, 3, side, 2 * side), dtype=torch.uint8, generator=generator)
    indices = tuple(range(first, first + num_frames))
    return Clip(pixels, indices, tuple(i / 4 for i in indices), 4.0, 10.0, "pyav")


def index_of(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "frames/index.jsonl", key="sheet", kind=str)


def files_of(run: Path) -> set[str]:
    return {path.name for path in (run / "frames").iterdir()}


def is_whole(run: Path) -> bool:
    """Every sheet has a line and every line a sheet, of the size it says."""
    rows = index_of(run)
    sizes = {row["sheet"]: row["bytes"] for row in rows}
    found = {f"frames/{path.name}": path.stat().st_size for path in (run / "frames").glob("*.jpg")}
    return (
        sizes == found and len(rows) == len(sizes) and files_of(run) == {Path(s).name for s in sizes} | {"index.jsonl"}
    )


def test_a_sheet_and_its_line_say_what_was_shown(tmp_path: Path) -> None:
    recorder = begun(tmp_path)
    recorder.note("training", make_sample(3), make_clip(side=100, first=2))
    recorder.close()
    (row,) = index_of(tmp_path)
    sheet = tmp_path / row.pop("sheet")
    assert row == {
        "video": "a/3.mp4",
        "path": "videos/a/3.mp4",
        "sample_id": "id3",
        "when": "training",
        "num_frames": 6,
        "columns": 4,
        "frame_px": [128, 64],
        "timestamps_seconds": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
        "frame_indices": [2, 3, 4, 5, 6, 7],
        "bytes": sheet.stat().st_size,
    }
    with Image.open(sheet) as picture:
        assert (picture.format, picture.size) == ("JPEG", (4 * 128, 2 * 64))
    assert SheetIndex(tmp_path).find("videos/a/3.mp4") == sheet


def test_one_sheet_per_video_and_frames_over_epochs_threads_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = frames.draw_sheet
    monkeypatch.setattr(frames, "draw_sheet", lambda small: [drawn.append(1), draw(small)][1])
    for is_resumed in (False, True, True):
        recorder = begun(tmp_path, is_resumed=is_resumed)

        def epoch(recorder: FrameRecorder = recorder) -> None:
            for i in range(5):
                recorder.note("training", make_sample(i), make_clip(i))

        threads = [threading.Thread(target=epoch) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        recorder.close()
    assert sorted(row["video"] for row in index_of(tmp_path)) == [f"a/{i}.mp4" for i in range(5)]
    recorder = begun(tmp_path, is_resumed=True)
    recorder.note("training", make_sample(0), make_clip(first=1))  # other frames of the same video
    recorder.close()
    assert len(index_of(tmp_path)) == len(drawn) == 6  # those that are there cost nothing
    assert is_whole(tmp_path)


def test_processes_share_one_folder_without_collisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def slow(*paths: Any) -> None:  # between the look whether a sheet is there and its line
        threading.Event().wait(0.005)
        replace(*paths)

    monkeypatch.setattr(frames.os, "replace", slow)
    ranks = [make_recorder(tmp_path, 4, rank=rank, world_size=2) for rank in range(2)]
    ranks[0].clean(is_resumed=False)
    for recorder in ranks:
        recorder.begin()
    for i in range(40):  # both see all of them, at the same time
        for recorder in ranks:
            recorder.note("training", make_sample(i), make_clip(i))
    for recorder in ranks:
        recorder.close()
    assert sorted(row["sample_id"] for row in index_of(tmp_path)) == sorted(f"id{i}" for i in range(40))
    assert is_whole(tmp_path)


def size_of_one(tmp_path: Path) -> int:
    recorder = begun(tmp_path / "one")
    recorder.note("training", make_sample(0), make_clip(0, side=128))
    recorder.close()
    return int(index_of(tmp_path / "one")[0]["bytes"])


def note_many(recorder: FrameRecorder, when: Any, numbers: range) -> None:
    root = ROOT if when == "training" else Path("held_out")
    for i in numbers:
        recorder.note(when, make_sample(i, root), make_clip(i, side=128))
        recorder._written[-1].result()  # none waits: all that is left out is left out for the budget


def total(run: Path, when: str) -> int:
    return sum(row["bytes"] for row in index_of(run) if row["when"] == when)


def test_the_budget_is_kept_over_resumes_and_its_end_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one = size_of_one(tmp_path)
    fitting = MIB // one
    assert 5 < fitting < 100
    recorder = begun(tmp_path / "run")
    note_many(recorder, "training", range(fitting // 2))
    recorder.close()
    assert not caplog.records
    recorder = begun(tmp_path / "run", is_resumed=True)
    note_many(recorder, "training", range(fitting // 2, 2 * fitting))
    recorder.close()
    assert MIB - 2 * one < total(tmp_path / "run", "training") <= MIB
    assert [record.getMessage() for record in caplog.records] == [
        "no more contact sheets of training clips: run.report_frames, 1 MiB, is spent"
    ]
    assert is_whole(tmp_path / "run")


def test_a_quarter_is_kept_for_held_out_clips_which_may_use_the_rest_too(tmp_path: Path) -> None:
    one = size_of_one(tmp_path)
    many = 2 * MIB // one
    run = tmp_path / "training_first"
    recorder = begun(run, evaluates=True)
    note_many(recorder, "training", range(many))
    assert 0.75 * MIB - 2 * one < total(run, "training") <= 0.75 * MIB
    recorder.close()
    recorder = begun(run, evaluates=True, is_resumed=True)  # what is kept is kept over a resume
    note_many(recorder, "training", range(many, many + 2))
    note_many(recorder, "evaluation", range(many))
    recorder.close()
    assert total(run, "training") <= 0.75 * MIB
    assert 0.25 * MIB - one < total(run, "evaluation")
    assert total(run, "training") + total(run, "evaluation") <= MIB
    held_out = next(row for row in index_of(run) if row["when"] == "evaluation")
    assert (held_out["video"], held_out["path"]) == ("a/0.mp4", "held_out/a/0.mp4")

    run = tmp_path / "held_out_first"
    recorder = begun(run, evaluates=True)
    note_many(recorder, "evaluation", range(many))
    note_many(recorder, "training", range(many, many + 2))
    recorder.close()
    assert MIB - 2 * one < total(run, "evaluation") <= MIB


def test_processes_have_equal_parts_of_the_budget(tmp_path: Path) -> None:
    one = size_of_one(tmp_path)
    recorder = begun(tmp_path / "run", world_size=4)
    note_many(recorder, "training", range(MIB // one))
    recorder.close()
    assert MIB / 4 - 2 * one < total(tmp_path / "run", "training") <= MIB / 4


def test_no_budget_writes_nothing(tmp_path: Path) -> None:
    recorder = begun(tmp_path, 0)
    recorder.note("training", make_sample(0), make_clip())
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def full_disk(*args: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_costs_sheets_is_told_and_counted_and_is_over_when_there_is_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    recorder = begun(tmp_path, world_size=world_size)
    recorder.note("training", make_sample(0), make_clip(0))
    recorder._written[-1].result()
    with monkeypatch.context() as patch:
        patch.setattr(frames.os, "replace", full_disk)
        for i in range(1, 5):
            recorder.note("training", make_sample(i), make_clip(i))
            recorder._written[-1].result()
    assert is_whole(tmp_path)
    assert len(index_of(tmp_path)) == 1
    recorder.note("training", make_sample(2), make_clip(2))  # in the next epoch
    recorder.close()
    assert [row["sample_id"] for row in index_of(tmp_path)] == ["id0", "id2"]
    assert is_whole(tmp_path)
    first, last = (record.getMessage() for record in caplog.records)
    assert f"cannot be written to {tmp_path / 'frames'} (No space left on device); training goes on" in first
    assert last == f"3 clips of this process have no contact sheet in {tmp_path / 'frames'}"


def test_a_line_that_does_not_fit_on_the_disk_leaves_neither_itself_nor_its_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = begun(tmp_path)
    recorder.note("training", make_sample(0), make_clip(0))
    recorder._written[-1].result()
    real_open = open

    def short(*args: Any, **kwargs: Any) -> Any:
        file = real_open(*args, **kwargs)
        if kwargs.get("buffering") != 0:
            return file

        class Short:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> Short:
                return self

            def __exit__(self, *error: Any) -> None:
                file.close()

            def write(self, content: bytes) -> int:
                return int(file.write(content[:20]))

        return Short()

    with monkeypatch.context() as patch:
        patch.setattr(frames, "open", short, raising=False)
        recorder.note("training", make_sample(1), make_clip(1))
        recorder._written[-1].result()
    recorder.note("training", make_sample(2), make_clip(2))
    recorder.close()
    assert [row["sample_id"] for row in index_of(tmp_path)] == ["id0", "id2"]
    assert is_whole(tmp_path)


def test_a_failed_sheet_is_given_back_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = size_of_one(tmp_path)
    recorder = begun(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(frames.os, "replace", full_disk)
        note_many(recorder, "training", range(2 * MIB // one))
    note_many(recorder, "training", range(2 * MIB // one))
    recorder.close()
    assert MIB - 2 * one < total(tmp_path / "run", "training") <= MIB


def test_clips_that_come_faster_than_they_are_written_do_not_wait_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(0)
    monkeypatch.setattr(frames, "QUEUE_BYTES", 2 * clip.frames.nbytes)
    recorder = begun(tmp_path)
    go_on, draw = threading.Event(), frames.draw_sheet
    monkeypatch.setattr(frames, "draw_sheet", lambda small: go_on.wait(10) and draw(small))
    for i in range(5):
        recorder.note("training", make_sample(i), make_clip(i))
    go_on.set()
    recorder._written[-1].result()
    recorder.note("training", make_sample(3), make_clip(3))  # in the next epoch
    recorder.close()
    assert [row["sample_id"] for row in index_of(tmp_path)] == ["id0", "id1", "id3"]
    first, last = (record.getMessage() for record in caplog.records)
    assert "faster than they can be written" in first
    assert last.startswith("2 clips of this process have no contact sheet")


def test_a_single_clip_larger_than_the_queue_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "QUEUE_BYTES", 1)
    recorder = begun(tmp_path)
    recorder.note("training", make_sample(0), make_clip())
    recorder.close()
    assert len(index_of(tmp_path)) == 1


def test_close_waits_for_what_is_still_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = frames.draw_sheet
    monkeypatch.setattr(frames, "draw_sheet", lambda small: threading.Event().wait(0.05) or draw(small))
    recorder = begun(tmp_path)
    for i in range(6):
        recorder.note("training", make_sample(i), make_clip(i))
    recorder.close()
    assert len(index_of(tmp_path)) == 6
    recorder.note("training", make_sample(7), make_clip(7))  # of a thread that still loads
    recorder.close()
    assert len(index_of(tmp_path)) == 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("report-frames")]


def test_an_error_that_is_not_the_disks_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(small: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(frames, "draw_sheet", broken)
    recorder = begun(tmp_path / "at_the_next_clip")
    recorder.note("training", make_sample(0), make_clip())
    with pytest.raises(ZeroDivisionError):
        recorder._written[-1].result()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        recorder.note("training", make_sample(1), make_clip())
    recorder = begun(tmp_path / "at_the_end")
    recorder.note("training", make_sample(0), make_clip())
    with pytest.raises(ZeroDivisionError, match="a bug"):
        recorder.close()


def test_a_new_run_removes_the_sheets_that_are_there_and_nothing_else(tmp_path: Path) -> None:
    recorder = begun(tmp_path)
    recorder.note("training", make_sample(0), make_clip())
    recorder.close()
    (tmp_path / "frames" / "notes.txt").write_text("mine")
    begun(tmp_path).close()
    assert files_of(tmp_path) == {"index.jsonl", "notes.txt"}
    assert index_of(tmp_path) == []


def test_a_resumed_run_drops_what_a_kill_cut_short(tmp_path: Path) -> None:
    recorder = begun(tmp_path)
    for i in range(3):
        recorder.note("training", make_sample(i), make_clip(i))
        recorder._written[-1].result()
    recorder.close()
    folder, rows = tmp_path / "frames", index_of(tmp_path)
    (tmp_path / rows[0]["sheet"]).unlink()
    (folder / ".x.jpg.0.tmp").write_text("half")
    with open(folder / "index.jsonl", "r+") as file:
        text = file.read().rstrip("\n")
        file.seek(0)
        file.write(text[:-30])
        file.truncate()
    begun(tmp_path, is_resumed=True).close()
    assert [row["sample_id"] for row in index_of(tmp_path)] == ["id1"]
    assert is_whole(tmp_path)


def test_a_damaged_index_is_reported_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/index.jsonl").write_text('{"video": "a"}\n')
    with pytest.raises(RunLogError, match=r"index\.jsonl:1 is not an object with .sheet."):
        begun(tmp_path, is_resumed=True)


def test_the_index_is_read_while_it_grows(tmp_path: Path) -> None:
    sheets = SheetIndex(tmp_path)
    assert sheets.find("a") is None
    (tmp_path / "frames").mkdir()
    lines = [json.dumps({"path": name, "sheet": f"frames/{name}.jpg"}) + "\n" for name in "ab"]
    with open(tmp_path / "frames/index.jsonl", "a") as file:
        for content, found in ((lines[0] + lines[1][:9], (True, False)), (lines[1][9:], (True, True))):
            file.write(content)
            file.flush()
            os.sync()
            expected = [tmp_path / f"frames/{n}.jpg" if has else None for n, has in zip("ab", found, strict=True)]
            assert [sheets.find("a"), sheets.find("b")] == expected
