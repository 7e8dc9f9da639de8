"""Evaluation by several processes gives what one gives, and their troubles are told as one's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import is_running, listen, until
from trainer_toys import NUM_SAMPLES, child_environment, write_world

from fastr1 import cli
from fastr1.config import ConfigError, DataConfig
from fastr1.evaluation import checkpoint
from fastr1.evaluation.checkpoint import evaluate_checkpoint
from fastr1.models import ModelFileError
from fastr1.reporting.run_log import read_rows
from fastr1.schema import DataError

ASKED = {"max_completion_length": 6, "num_frames": 4, "instruction": "", "backend": "pyav", "device": "cpu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def evaluate(world: Path, output: Path, **options: Any) -> dict[str, Any]:
    files = {"model_path": world / "base", "data_file": world / "questions.jsonl", "video_root": world}
    evaluate_checkpoint(**{**files, **ASKED, **options}, output=output)
    content: dict[str, Any] = json.loads(output.read_text())
    return content


def completions(content: dict[str, Any]) -> list[str]:
    return [answer["completion"] for answer in content["answers"]]


@pytest.mark.parametrize(("num_samples", "batch_size", "num_processes"), [(6, 2, 2), (7, 3, 2), (1, 4, 3), (10, 1, 3)])
def test_every_question_is_in_one_share_and_every_batch_is_whole(
    num_samples: int, batch_size: int, num_processes: int, tmp_path: Path
) -> None:
    devices = [torch.device("cpu")] * num_processes
    job = checkpoint._Job("", None, DataConfig(), None, "auto", devices, batch_size, {})  # type: ignore[arg-type]
    shares = [job.share(num_samples, rank) for rank in range(num_processes)]
    assert sorted(place for share in shares for place in share) == list(range(num_samples))
    batches = {tuple(share[i : i + batch_size]) for share in shares for i in range(0, len(share), batch_size)}
    places = list(range(num_samples))
    assert batches == {tuple(places[i : i + batch_size]) for i in range(0, num_samples, batch_size)}


def test_sampling_follows_the_seed_and_not_the_batches(world: Path, tmp_path: Path) -> None:
    def draw(**options: Any) -> list[str]:
        return completions(evaluate(world, tmp_path / "out.json", temperature=1.0, **options))

    first = draw(seed=1)
    assert draw(seed=1, batch_size=2) == first
    assert draw(seed=2) != first
    assert draw(seed=1, top_p=1e-6) == completions(evaluate(world, tmp_path / "out.json"))  # the likeliest alone


def test_two_processes_answer_as_one_and_leave_out_the_same(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / "2.mp4").write_bytes(b"not a video")
    options: dict[str, Any] = {
        "policy": "skip",
        "max_bad_fraction": 0.5,
        "batch_size": 2,
        "temperature": 1.0,
        "seed": 3,
    }
    one = evaluate(broken, tmp_path / "one.json", **options)
    two = evaluate(broken, tmp_path / "two.json", **options, num_processes=2)
    assert two == one
    assert len(one["answers"]) == NUM_SAMPLES - 1
    assert [row["line"] for row in one["left_out"]] == [3]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_clips_of_an_evaluation_are_added_to_those_of_a_run(
    world: Path, tmp_path: Path, num_processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "--model", world / "base", "--data-file", world / "questions.jsonl", "--video-root", world]
    command += ["--num-frames", 4, "--max-completion-length", 2, "--batch-size", 2, "--num-processes", num_processes]
    command += ["--device", "cpu", "--backend", "pyav", "--frames", tmp_path]
    assert cli.main(list(map(str, command))) == 2
    assert f"--frames is {tmp_path}, which holds no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").touch()
    for _ in range(2):  # the second finds them there
        assert cli.main(list(map(str, command))) == 0
    rows = read_rows(tmp_path / "frames" / "index.jsonl", key="sheet", kind=str)
    assert sorted(row["path"] for row in rows) == sorted(str(path) for path in world.glob("*.mp4"))
    assert {(row["when"], row["num_frames"]) for row in rows} == {("evaluation", 4)}
    assert all((tmp_path / row["sheet"]).is_file() for row in rows)


@pytest.mark.slow
def test_a_refusal_in_one_process_is_told_as_it_is(world: Path, tmp_path: Path) -> None:
    """The weights are read by the processes alone."""
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / "base" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError) as alone:
        evaluate(broken, tmp_path / "out.json")
    with pytest.raises(DataError) as together:
        evaluate(broken, tmp_path / "out.json", num_processes=2, batch_size=2)
    assert str(together.value) == str(alone.value)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_ctrl_c_ends_all_processes_with_one_line(world: Path, tmp_path: Path, to_all: bool) -> None:
    """To all as from a terminal, or to the command alone."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text((world / "questions.jsonl").read_text() * 4000)
    asked = ["--data-file", str(questions), "--video-root", str(world), "--num-frames", "4", "--backend", "pyav"]
    command = [sys.executable, "-m", "fastr1.cli", "eval", "--model", str(world / "base"), *asked, "--device", "cpu"]
    with subprocess.Popen(
        [*command, "--num-processes", "2"],
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen,
    ) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        until(lambda: len(children.read_text().split()) == 3)  # one of them keeps book of what they share
        time.sleep(5)
        pids = [int(pid) for pid in children.read_text().split()]
        (os.killpg if to_all else os.kill)(parent.pid, signal.SIGINT)
        _, errors = parent.communicate(timeout=60)
    assert (parent.returncode, errors.splitlines()[1:]) == (130, ["interrupted"])
    until(lambda: not any(map(is_running, pids)), 10)


@pytest.mark.parametrize(
    ("device", "num_processes", "reason"),
    [
        ("cpu", 0, "num_processes is 0; use 1 or more"),
        ("tpu", 2, "device is 'tpu'"),
        ("cuda:7", 2, "device is 'cuda:7'"),
    ],
)
def test_impossible_processes_are_refused_before_anything_is_loaded(
    tmp_path: Path, device: str, num_processes: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        checkpoint._devices(device, num_processes)


@pytest.mark.parametrize(
    ("device", "num_processes", "expected"),
    [
        (None, 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cpu", 3, ["cpu"] * 3),
        ("cuda:1", 1, ["cuda:1"]),
    ],
)
def test_every_process_has_a_gpu_of_its_own(
    device: str | None, num_processes: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert list(map(str, checkpoint._devices(device, num_processes))) == expected
    for name, count in ((None, 3), ("cuda", 3), ("cuda:1", 2)):
        with pytest.raises(ConfigError, match=rf"num_processes is {count} .* this machine has 2 GPUs"):
            checkpoint._devices(name, count)
