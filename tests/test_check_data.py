"""`fastr1 check-data`: what is bad is printed and left out of the clean file, and an interrupted check goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainer_toys import make_config, write_world

import fastr1.check_data
from fastr1.check_data import CHECKED_FILE, check_data
from fastr1.cli import main
from fastr1.config import load_config, save_config
from fastr1.data.questions import load_questions
from fastr1.schema import DataError
from fastr1.video.checking import find_problem
from fastr1.workers import Outcome


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A folder of its own for each test, with questions.jsonl also as e.jsonl."""
    folder = tmp_path / "world"
    shutil.copytree(made, folder)
    shutil.copy(folder / "questions.jsonl", folder / "e.jsonl")
    return folder


class Pool:
    """Decodes in this process; some videos have another fate, and after `stop_after` of them someone presses Ctrl-C."""

    decoded: list[str]
    stop_after = 10**6
    fates: dict[str, tuple[Any, ...]]

    def __init__(self, function: str, num_workers: int) -> None:
        assert function == "fastr1.video.checking:find_problem"

    def run(self, tasks: list[tuple[Any, ...]], *, timeout_seconds: float) -> Iterator[Outcome]:
        for index, task in enumerate(tasks):
            if index == self.stop_after:
                raise KeyboardInterrupt
            name = Path(task[0]).name
            self.decoded.append(name)
            yield Outcome(index, *self.fates.get(name, ("returned", find_problem(*task))))

    def close(self) -> None:
        pass


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> type[Pool]:
    monkeypatch.setattr(fastr1.check_data, "WorkerPool", Pool)
    Pool.decoded, Pool.stop_after, Pool.fates = [], 10**6, {}
    return Pool


def test_command_prints_what_is_bad_and_writes_clean_files(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With real processes: a crash of a decoder is covered by the tests of workers."""
    (world / "3.mp4").write_bytes(b"not a video")
    rows = (world / "questions.jsonl").read_text().splitlines()
    rows[1] = rows[1].replace("<answer>B", "<answer>Z")
    (world / "questions.jsonl").write_text("\n".join([rows[0], "", *rows[1:]]))
    save_config(make_config(world, world / "run", data__eval_file=str(world / "e.jsonl")), world / "config.json")
    command = ["check-data", "--config", str(world / "config.json"), "--num-workers", "1"]
    assert main(command) == 1
    out, err = capfd.readouterr()
    train, clean, evaluation = world / "questions.jsonl", world / "questions.clean.jsonl", world / "e.jsonl"
    assert f"{train}:3: solution '<answer>Z</answer>' is not one of the options" in out
    assert f"{train}:5: {world / '3.mp4'}: not a readable video" in out
    assert f"{train}: 2 of 6 rows cannot be used" in out
    assert f"{evaluation}:4: {world / '3.mp4'}: " in out
    assert f"written without them: {clean} (use it with --set data.train_file={clean})" in out
    assert "decoding: 100%" in err
    assert "6/6" in err
    assert clean.read_text().splitlines() == [rows[0], rows[2], rows[4], rows[5]]
    lines = [json.loads(line) for line in (world / "bad_samples.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"], row["when"]) for row in lines] == [
        ("questions.jsonl", 3, "reading"),
        ("questions.jsonl", 5, "checking"),
        ("e.jsonl", 4, "checking"),
    ]
    config = load_config(
        world / "config.json",
        [f"data.{key}_file={world / name}.clean.jsonl" for key, name in (("train", "questions"), ("eval", "e"))],
    )
    assert len(load_questions(config.data.train_file, world).samples) == 4
    assert check_data(config, num_workers=1) == 0
    assert "5 videos, 5 of them known to be good" in capfd.readouterr().out


def test_nothing_bad_writes_no_clean_file(world: Path, pool: type[Pool], capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data(make_config(world, world / "run")) == 0
    assert f"{world / 'questions.jsonl'}: 0 of 6 rows cannot be used" in capsys.readouterr().out
    assert not list(world.glob("*.clean.jsonl"))
    assert not (world / "bad_samples.jsonl").exists()
    assert len(pool.decoded) == 6


def test_interrupted_check_goes_on_and_looks_again_at_what_changed(
    world: Path, pool: type[Pool], capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "0.mp4").write_bytes(b"not a video")
    config = make_config(world, world / "run")
    pool.stop_after = 3
    assert check_data(config) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not list(world.glob("*.clean.jsonl"))
    with open(world / CHECKED_FILE, "a") as file:
        file.write('{"video": "cut')  # killed while it wrote
    pool.stop_after = 10**6
    assert check_data(config) == 1
    assert "6 videos, 2 of them known to be good" in capsys.readouterr().out
    assert pool.decoded == ["0.mp4", "1.mp4", "2.mp4", "0.mp4", "3.mp4", "4.mp4", "5.mp4"]
    shutil.copy(world / "1.mp4", world / "0.mp4")
    (world / "4.mp4").write_bytes(b"damaged since")
    pool.decoded.clear()
    assert check_data(config) == 1
    assert pool.decoded == ["0.mp4", "4.mp4"]
    pool.decoded.clear()
    check_data(make_config(world, world / "run", data__num_frames=2))
    assert len(pool.decoded) == 6  # other frames may be damaged


def test_crash_and_hang_are_bad_videos(world: Path, pool: type[Pool], capsys: pytest.CaptureFixture[str]) -> None:
    pool.fates = {
        "1.mp4": ("died", None, "SIGSEGV"),
        "2.mp4": ("timed out",),
        "4.mp4": ("raised", None, "MemoryError()"),
    }
    assert check_data(make_config(world, world / "run"), timeout_seconds=7, output_dir=world / "out" / "put") == 1
    out = capsys.readouterr().out
    for line, reason in (
        (2, "the decoder crashed (SIGSEGV)"),
        (3, "not decoded within 7 seconds"),
        (5, "decoding raised Mem"),
    ):
        assert f"questions.jsonl:{line}: {world / str(line - 1)}.mp4: {reason}" in out
    assert sorted(path.name for path in (world / "out" / "put").iterdir()) == [
        "bad_samples.jsonl",
        CHECKED_FILE,
        "questions.clean.jsonl",
    ]


def test_conversations_and_texts_are_checked_too(
    world: Path, pool: type[Pool], capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((world / "coldstart.json").read_text())
    content[2]["conversations"][1]["value"] = "It is " * 600
    (world / "coldstart.json").write_text(json.dumps(content))
    sft = {"task": "sft", "data__train_file": str(world / "coldstart.json")}
    assert check_data(make_config(world, world / "run", **sft)) == 1
    assert f"{world / 'coldstart.json'}:2: the prompt has " in capsys.readouterr().out
    assert json.loads((world / "coldstart.clean.json").read_text()) == [*content[:2], *content[3:]]
    elsewhere = make_config(world, world / "run", **sft, model__path=str(world / "none"))
    assert check_data(elsewhere) == 0
    assert f"lengths of texts are not checked: model.path {world / 'none'} is not there" in capsys.readouterr().out


def test_files_of_the_same_name_do_not_overwrite_each_other(world: Path, pool: type[Pool]) -> None:
    (world / "held").mkdir()
    shutil.copy(world / "e.jsonl", world / "held" / "questions.jsonl")
    (world / "1.mp4").write_bytes(b"not a video")
    for folder in (None, world / "out"):
        config = make_config(world, world / "run", data__eval_file=str(world / "held" / "questions.jsonl"))
        assert check_data(config, output_dir=folder) == 1
    assert (world / "held" / "questions.clean.jsonl").exists()
    assert (world / "questions.clean.jsonl").exists()
    names = [path.name for path in (world / "out").glob("*clean*")]
    assert sorted(names) == ["eval.questions.clean.jsonl", "questions.clean.jsonl"]


def test_folder_that_cannot_be_written_is_named(world: Path, pool: type[Pool]) -> None:
    (world / "file").touch()
    with pytest.raises(
        DataError, match=r"file/out/checked_videos\.jsonl cannot be written .*choose another --output-dir"
    ):
        check_data(make_config(world, world / "run"), output_dir=world / "file" / "out")
