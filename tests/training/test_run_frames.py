"""The frames that a run showed its model, and what it reports to trackers, through whole runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import trainer_toys
from PIL import Image
from trainer_toys import exported, make_config, metrics_of, write_world

import fastr1.reporting.frames
import fastr1.video.loader
from fastr1 import cli
from fastr1.config import ConfigError, save_config
from fastr1.reporting.run_log import read_rows
from fastr1.reporting.trackers import TrackioTracker
from fastr1.rewards.scorer import RewardError
from fastr1.training.grpo import prepare_grpo, run_grpo
from fastr1.training.sft import run_sft
from fastr1.video import load_clip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def held_out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names in another folder; clips of the world with others' content, and questions about four of them."""
    folder = tmp_path_factory.mktemp("held_out")
    for i in range(4):
        trainer_toys.write_video(folder / f"{i}.mp4", i + 1)
    lines = (world / "questions.jsonl").read_text().splitlines(keepends=True)[:4]
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


def settings(world: Path, held_out: Path, output: Path, **changes: Any) -> Any:
    evaluation = {"data__eval_file": str(held_out / "questions.jsonl"), "data__eval_video_root": str(held_out)}
    return make_config(world, output, run__eval_steps=1, **evaluation, **changes)


def index_of(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "frames/index.jsonl", key="sheet", kind=str)


def test_every_clip_of_training_and_evaluation_has_its_frames(world: Path, held_out: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_grpo(settings(world, held_out, run, optim__max_steps=3))  # twelve prompts of six samples: two epochs
    rows = index_of(run)
    found = {(row["when"], row["video"]) for row in rows}
    assert len(rows) == len(found)
    assert found == {("training", f"{i}.mp4") for i in range(6)} | {("evaluation", f"{i}.mp4") for i in range(4)}
    hardware = json.loads((run / "hardware.json").read_text())
    assert (hardware["device"], hardware["processes"]) == ("cpu", 1)
    for row in rows:
        root = world if row["when"] == "training" else held_out
        assert row["path"] == str(root / row["video"])
        assert row["sample_id"] == row["video"].removesuffix(".mp4")
        clip = load_clip(row["path"], num_frames=4)
        assert row["frame_indices"] == list(clip.indices)
        assert row["timestamps_seconds"] == list(clip.timestamps_seconds)
        with Image.open(run / row["sheet"]) as sheet:
            pixels = np.asarray(sheet).astype(int)
        shown = np.concatenate(list(clip.frames.permute(0, 2, 3, 1).numpy()), axis=1).astype(int)
        assert np.abs(pixels - shown).mean() < 8
    paths = {row["path"] for row in rows}
    rollouts = read_rows(run / "rollouts.jsonl")
    assert rollouts
    assert all(row["video"] in paths for row in rollouts)


def test_answers_name_the_video_that_its_frames_are_found_by(world: Path, held_out: Path, tmp_path: Path) -> None:
    files = ["--data-file", str(held_out / "questions.jsonl"), "--video-root", str(held_out)]
    output = tmp_path / "answers.json"
    arguments = ["--model", str(world / "base"), *files, "--num-frames", "4", "--max-completion-length", "3"]
    assert cli.main(["eval", *arguments, "--device", "cpu", "--output", str(output)]) == 0
    answers = json.loads(output.read_text())["answers"]
    assert [answer["video"] for answer in answers] == [str(held_out / f"{i}.mp4") for i in range(4)]


def test_sheets_change_nothing_and_decode_nothing_again(
    world: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = fastr1.video.loader.load_clip

    def counting(*args: Any, **options: Any) -> Any:
        decoded.append(1)
        return decode(*args, **options)

    monkeypatch.setattr(fastr1.video.loader, "load_clip", counting)
    counts = []
    for budget in (0, 64):
        run_grpo(settings(world, held_out, tmp_path / str(budget), run__report_frames=budget))
        counts.append(len(decoded))
    assert counts == [16, 32]  # two updates of four, two evaluations of four
    assert not (tmp_path / "0" / "frames").exists()
    assert metrics_of(tmp_path / "0") == metrics_of(tmp_path / "64")
    first, second = (exported(tmp_path / budget / "final") for budget in ("0", "64"))
    assert all(first[name].equal(second[name]) for name in first)


def test_a_resumed_run_adds_to_the_sheets(world: Path, held_out: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"run__save_steps": 1}
    run_grpo(settings(world, held_out, tmp_path, optim__max_steps=1, **changes))
    before = {row["sheet"]: (tmp_path / row["sheet"]).stat().st_mtime_ns for row in index_of(tmp_path)}
    assert len(before) == 4 + 4
    changes |= {"run__resume_from_checkpoint": "last", "run__report_frames": 32}  # which a resume may change
    run_grpo(settings(world, held_out, tmp_path, optim__max_steps=2, **changes))
    after = {row["sheet"]: (tmp_path / row["sheet"]).stat().st_mtime_ns for row in index_of(tmp_path)}
    assert len(after) == len(index_of(tmp_path)) == 10
    assert before.items() <= after.items()


def test_supervised_fine_tuning_has_them_too(world: Path, tmp_path: Path) -> None:
    config = make_config(world, tmp_path, task="sft", data__train_file=str(world / "coldstart.json"))
    run_sft(config)
    assert {row["when"] for row in index_of(tmp_path)} == {"training"}
    assert len(index_of(tmp_path)) >= 4


def test_a_disk_that_takes_no_sheets_does_not_end_the_run(
    world: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fastr1.reporting.frames.FrameRecorder, "_store", full)
    run_grpo(settings(world, held_out, tmp_path))
    assert (tmp_path / "final").is_dir()
    assert "(No space left on device); training goes on without it" in caplog.text
    assert "10 clips of this process have no contact sheet" in caplog.text


def test_what_an_error_leaves_has_the_sheets_of_the_clips_so_far(
    world: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(update: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(trainer_toys, "BEFORE_SCORING", [fail])
    draw = fastr1.reporting.frames.draw_sheet
    monkeypatch.setattr(fastr1.reporting.frames, "draw_sheet", lambda small: sum(range(10**6)) and draw(small))
    with pytest.raises(RewardError):
        run_grpo(settings(world, held_out, tmp_path, reward__functions=("trainer_toys:hooked_reward",)))
    assert len(index_of(tmp_path)) >= 4


# Trackers


class Run:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, data: dict[str, Any], step: int) -> None:
        self.calls.append((step, data))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("trackio")
    module.runs = []

    def init(**options: Any) -> Run:
        run = Run()
        module.runs.append((options, run))
        return run

    def table(columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, cells, strict=True)) for cells in data]

    module.init, module.Table, module.Image = init, table, lambda path: Path(path)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_a_run_gives_a_tracker_its_numbers_and_completions_with_their_frames(
    world: Path, tmp_path: Path, trackio: Any
) -> None:
    changes: dict[str, Any] = {"optim__max_steps": 4, "run__logging_steps": 2, "run__report_to": ("jsonl", "trackio")}
    run_grpo(make_config(world, tmp_path, **changes))
    ((options, run),) = trackio.runs
    assert options["config"]["grpo"]["num_generations"] == 3
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [call[0] for call in run.calls[:-1]] == [2, 2, 4, 4]
    assert run.calls[0][1]["reward"] == rows[0]["reward"]
    assert run.calls[-1] == "finish"
    expected = [row for row in read_rows(tmp_path / "rollouts.jsonl") if row["step"] == 4]
    table = run.calls[3][1]["rollouts"]
    assert [row["completion"] for row in table] == [row["completion"] for row in expected]
    sheets = {row["path"]: tmp_path / row["sheet"] for row in index_of(tmp_path)}
    assert [row["frames"] for row in table] == [sheets[row["video"]] for row in expected]


def test_an_error_finishes_the_run_of_a_tracker_too(
    world: Path, tmp_path: Path, trackio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(update: int) -> None:
        if update == 2:
            raise ZeroDivisionError

    trainer_toys.hooked_reward.update = 0
    monkeypatch.setattr(trainer_toys, "BEFORE_SCORING", [fail])
    changes = {"reward__functions": ("trainer_toys:hooked_reward",), "run__report_to": ("trackio",)}
    closed: list[Any] = []
    close = TrackioTracker.close
    monkeypatch.setattr(TrackioTracker, "close", lambda self, **how: closed.append(how) or close(self, **how))
    with pytest.raises(RewardError):
        run_grpo(make_config(world, tmp_path, **changes))
    ((_, run),) = trackio.runs
    assert run.calls[-1] == "finish"
    assert closed == [{"has_failed": True}]


@pytest.mark.parametrize("is_dry_run", [True, False])
def test_a_missing_tracker_is_told_before_anything_is_built(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_dry_run: bool,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(world, tmp_path / "run", run__report_to=("wandb",))
    with pytest.raises(ConfigError, match="pip install wandb"):
        prepare_grpo(config)
    save_config(config, tmp_path / "config.json")
    dry_run = ["--dry-run"] if is_dry_run else []
    assert cli.main(["train", "--config", str(tmp_path / "config.json"), *dry_run]) == 2
    assert "error: run.report_to names 'wandb'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
