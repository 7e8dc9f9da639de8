"""A model is asked as it was trained: what its folder records, what overrides it, and what is said about both."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from trainer_toys import make_config, problem, write_world

from fastr1 import cli
from fastr1.config import INSTRUCTION, ConfigError, DataConfig
from fastr1.evaluation import recorded
from fastr1.evaluation.chat import ChatAnswer, chat
from fastr1.evaluation.checkpoint import evaluate_checkpoint
from fastr1.evaluation.recorded import RECORD_FILE, data_settings, read_recorded, record_settings
from fastr1.schema import DataError
from fastr1.video import BackendError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the record of a run on 3 frames, with an instruction of its own and PyAV."""
    folder = tmp_path_factory.mktemp("trained") / "final"
    shutil.copytree(world / "base", folder)
    config = make_config(world, folder.parent, data__num_frames=3, data__instruction="Be brief.")
    record_settings(folder, config)
    return folder


def said(caplog: pytest.LogCaptureFixture) -> str:
    (message,) = caplog.messages
    caplog.clear()
    return message


@pytest.mark.parametrize(
    ("given", "expected", "sentence"),
    [
        (
            {},
            DataConfig(num_frames=3, instruction="Be brief.", backend="pyav"),
            "3 frames (as trained), instruction 'Be brief.' (as trained), decoder pyav (as trained)",
        ),
        (
            {"num_frames": 4, "instruction": "", "backend": "pyav"},
            DataConfig(num_frames=4, instruction="", backend="pyav"),
            "4 frames (given; trained with 3), instruction '' (given; trained with 'Be brief.'), decoder pyav (given)",
        ),
        (
            {"num_frames": -1, "max_frames": 9},
            DataConfig(num_frames=-1, max_frames=9, instruction="Be brief.", backend="pyav"),
            "one frame per second (given; trained with 3), at most 9 (given), instruction 'Be brief.' (as trained), "
            "decoder pyav (as trained)",
        ),
    ],
)
def test_recorded_settings_are_used_unless_overridden_and_said(
    trained: Path, caplog: pytest.LogCaptureFixture, given: dict[str, Any], expected: DataConfig, sentence: str
) -> None:
    caplog.set_level(logging.INFO, "fastr1")
    assert data_settings(trained, **given) == expected
    assert said(caplog) == f"{trained}: {sentence}"


def test_a_limit_of_frames_is_kept_with_the_recorded_number_alone(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_settings(tmp_path, make_config(world, tmp_path, data__num_frames=-1, data__max_frames=9))
    caplog.set_level(logging.INFO, "fastr1")
    assert data_settings(tmp_path, num_frames=-1).max_frames == data_settings(tmp_path).max_frames == 9
    assert data_settings(tmp_path, num_frames=4).max_frames is None
    caplog.clear()
    assert data_settings(tmp_path, max_frames=5).max_frames == 5
    assert "one frame per second (as trained), at most 5 (given; trained with 9), " in said(caplog)


def test_a_folder_without_a_record_takes_the_defaults_and_says_so(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastr1")
    data = data_settings(world / "base", backend="pyav")
    assert (data.num_frames, data.instruction) == (DataConfig.num_frames, INSTRUCTION)
    assert f"{DataConfig.num_frames} frames (default), instruction {INSTRUCTION!r} (default)" in said(caplog)


def test_a_cold_start_records_no_instruction_because_its_conversations_carry_theirs(
    world: Path, tmp_path: Path
) -> None:
    record_settings(tmp_path / "new" / "final", make_config(world, tmp_path, task="sft"))
    found = read_recorded(tmp_path / "new" / "final")
    assert found is not None
    assert (found.instruction, found.num_frames, found.backend) == (None, 4, "pyav")
    assert data_settings(tmp_path / "new" / "final").instruction == INSTRUCTION


def test_a_recorded_decoder_that_is_not_here_is_replaced_aloud_and_a_given_one_is_not(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def only_pyav(backend: str = "auto") -> str:
        if backend == "torchcodec":
            raise BackendError("no torchcodec here")
        return "pyav"

    shutil.copytree(trained, tmp_path / "elsewhere")
    file = tmp_path / "elsewhere" / RECORD_FILE
    file.write_text(file.read_text().replace("pyav", "torchcodec"))
    monkeypatch.setattr(recorded, "resolve_backend", only_pyav)
    caplog.set_level(logging.INFO, "fastr1")
    assert data_settings(file.parent).backend == "pyav"
    assert said(caplog).endswith("decoder pyav (trained with torchcodec, which cannot be loaded here)")
    with pytest.raises(BackendError):
        data_settings(file.parent, backend="torchcodec")


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 0},
        {"num_frames": "8"},
        {"num_frames": True},
        {"max_frames": -1},
        {"instruction": 3},
        {"backend": "decord"},
        {"backend": None},
        {"stop_strings": "</answer>"},
        {"stop_strings": ["</answer>", ""]},
        {"stop_strings": None},
        None,
    ],
)
def test_a_damaged_record_is_an_error_that_names_it(trained: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(trained, tmp_path / "damaged")
    file = tmp_path / "damaged" / RECORD_FILE
    content = json.loads(file.read_text())
    file.write_text("{" if change is None else json.dumps(content | change))
    with pytest.raises(DataError, match=rf"{RECORD_FILE}: .*delete it to use defaults"):
        data_settings(file.parent)


def test_evaluation_and_chat_ask_what_was_trained(world: Path, trained: Path) -> None:
    limits: dict[str, Any] = {"max_completion_length": 8, "device": "cpu"}
    explicit: dict[str, Any] = {"num_frames": 3, "instruction": "Be brief.", "backend": "pyav"}

    def ask(model: Path, **options: Any) -> str:
        return chat(model, world / "0.mp4", problem(0), **limits, **options).text

    assert ask(trained) == ask(world / "base", **explicit)
    assert ask(trained) != ask(world / "base", backend="pyav")

    def evaluate(model: Path, **options: Any) -> dict[str, float]:
        files: dict[str, Any] = {"data_file": world / "questions.jsonl", "video_root": world}
        return evaluate_checkpoint(model_path=model, **files, **limits, **options)

    assert evaluate(trained) == evaluate(world / "base", **explicit)


def test_evaluation_and_chat_stop_where_training_did(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"num_frames": 4, "instruction": INSTRUCTION}
    options |= {"max_completion_length": 8, "device": "cpu"}
    files: dict[str, Any] = {"data_file": world / "questions.jsonl", "video_root": world}
    unstopped = chat(world / "base", world / "0.mp4", problem(0), **options)
    length = evaluate_checkpoint(model_path=world / "base", **files, **options)["completion_length"]
    stop = next(letter for letter in unstopped.text[1:] if letter.isascii() and letter.isalnum())
    folder = tmp_path / "new" / "final"
    shutil.copytree(world / "base", folder)
    record_settings(folder, make_config(world, tmp_path, grpo__stop_strings=("never said", stop)))
    caplog.set_level(logging.INFO, "fastr1")
    answer = chat(folder, world / "0.mp4", problem(0), **options)
    assert answer.text == unstopped.text[: len(answer.text)]
    assert len(answer.text) < len(unstopped.text)
    assert not answer.is_truncated
    assert caplog.messages[-1].endswith(f"a completion ends with 'never said', {stop!r} (as trained)")
    assert evaluate_checkpoint(model_path=folder, **files, **options)["completion_length"] < length


def test_a_record_of_before_stop_strings_is_read(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "older")
    file = tmp_path / "older" / RECORD_FILE
    content = json.loads(file.read_text())
    del content["stop_strings"]
    file.write_text(json.dumps(content))
    found = read_recorded(file.parent)
    assert found is not None
    assert found.stop_strings == ()


def test_commands_say_in_one_line_how_they_ask(
    world: Path, trained: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastr1")
    options = ["--max-completion-length", "3", "--device", "cpu", "--num-frames", "2"]
    assert cli.main(["chat", str(trained), str(world / "0.mp4"), "Which?", *options]) == 0
    assert "2 frames (given; trained with 3), instruction 'Be brief.' (as trained)" in said(caplog)
    captured = capsys.readouterr()
    assert captured.out.startswith("completion, not in the form <think> … </think> <answer> … </answer>:\n")
    files = ["--model", str(trained), "--data-file", str(world / "questions.jsonl"), "--video-root", str(world)]
    assert cli.main(["eval", *files, *options, "--limit", "1", "--dtype", "bfloat16"]) == 0
    assert "2 frames (given; trained with 3), instruction 'Be brief.' (as trained)" in said(caplog)
    assert json.loads(capsys.readouterr().out)["num_questions"] == 1


def test_chat_shows_thinking_and_answer_apart() -> None:
    text = "<think>\nIt is green.\nSurely.\n</think> <answer> B </answer>"
    assert ChatAnswer("It is green.\nSurely.", "B", text).format() == "thinking:\nIt is green.\nSurely.\n\nanswer:\nB"
    assert ChatAnswer(None, "B", "<answer>B</answer>").format() == (
        "completion, not in the form <think> … </think> <answer> … </answer>:\n<answer>B</answer>\n\nanswer:\nB"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-frames", "9"], "max_frames is 9 but num_frames is 3 (as trained)"),
        (["--top-p", "0.5"], "--top-p 0.5 has no effect with --temperature 0"),
        (["--seed", "3"], "--seed 3 has no effect with --temperature 0"),
    ],
)
def test_options_without_effect_are_refused(
    world: Path, trained: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", str(trained), str(world / "0.mp4"), "Which?", *options]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("device", ["foo", "cuda:x", "cpu:1", "cuda:99", "", "meta"])
def test_a_device_that_is_not_here_is_one_line(world: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(world / "base"), str(world / "0.mp4"), "Which?", "--device", device]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: device is {device!r}")
    assert "choose cpu" in error


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(world: Path, tmp_path: Path) -> None:
    where = {"data_file": world / "questions.jsonl", "video_root": world}
    for output in (tmp_path, world / "0.mp4" / "answers.json"):
        with pytest.raises(ConfigError, match="cannot be written"):
            evaluate_checkpoint(model_path=tmp_path / "no model", output=output, **where)
    answers = tmp_path / "answers.json"
    with pytest.raises(ValueError, match="not found"):
        evaluate_checkpoint(model_path=tmp_path / "no model", output=answers, **where)
    assert not answers.exists()  # which was made to see whether it can be


def test_the_summary_survives_a_disk_that_fills_up(world: Path) -> None:
    full = {"output": "/dev/full", "limit": 1, "max_completion_length": 2}
    with pytest.raises(DataError, match=r"/dev/full could not be written \(No space left.*\); .*\"num_questions\": 1"):
        evaluate_checkpoint(
            model_path=world / "base", data_file=world / "questions.jsonl", video_root=world, device="cpu", **full
        )


def test_the_shipped_model_goes_by_the_name_that_configurations_have_for_it(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(world / "0.mp4"), "Which?", "--device", "cpu", "--max-completion-length", "1"]
    assert cli.main(["chat", "fastr1:demo/base_model", *asked]) == 0
    where = ["--data-file", str(world / "questions.jsonl"), "--video-root", str(world), "--limit", "1"]
    assert cli.main(["eval", "--model", "fastr1:demo/base_model", *where, *asked[2:]]) == 0
    assert '"num_questions": 1.0' in capsys.readouterr().out


def test_a_run_and_its_checkpoints_are_no_model_and_the_refusal_names_the_one_there_is(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    arguments = ["--data-file", "q.jsonl", "--video-root", "."]
    assert cli.main(["eval", "--model", str(run), *arguments]) == 2
    told = f"error: {run} is the folder of a run, not a model: its model will be {run}/final when the run has ended\n"
    assert capsys.readouterr().err == told
    shutil.copytree(trained, run / "final")
    for folder in (checkpoint, checkpoint.parent):
        assert cli.main(["chat", str(folder), "clip.mp4", "?"]) == 2
        told = f"error: {folder} is a checkpoint to go on from, not a model: its model is {run}/final\n"
        assert capsys.readouterr().err == told
    shutil.copytree(run / "final", run, dirs_exist_ok=True)  # whatever lies beside it
    for model in (run, run / "final", trained):
        assert data_settings(model).num_frames == 3
