"""Greedy evaluation and chat with a random model and with one that has learnt the six toy questions by heart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from trainer_toys import NUM_SAMPLES, make_config, problem, write_world

from fastr1.config import INSTRUCTION, Control
from fastr1.evaluation.chat import chat
from fastr1.evaluation.checkpoint import evaluate_checkpoint
from fastr1.evaluation.multiple_choice import CONTROLS, summarise_answers
from fastr1.schema import Answer, DataError
from fastr1.training.sft import run_sft


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def learnt(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on the toy answers until it repeats them."""
    config = make_config(
        world,
        tmp_path_factory.mktemp("learnt"),
        task="sft",
        data__train_file=str(world / "coldstart.json"),
        optim__max_steps=80,
        optim__learning_rate=1e-2,
        optim__adam_epsilon=1e-8,
        optim__per_device_train_batch_size=NUM_SAMPLES,
    )
    return run_sft(config)


def evaluate(model: Path, world: Path, output: Path, **options: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    summary = evaluate_checkpoint(
        model_path=model,
        video_root=world,
        num_frames=4,
        output=output / "answers.json",
        **{
            "max_completion_length": 40,
            "instruction": "",
            "device": "cpu",
            "data_file": world / "questions.jsonl",
            **options,
        },
    )
    content = json.loads((output / "answers.json").read_text())
    for answer in content["answers"]:
        assert Path(answer["video"]).parent == world
        answer["video"] = Path(answer["video"]).name
    assert content["summary"] == summary
    return summary, content["answers"]


def make_answer(letter: str | None, solution: str, kind: str, is_well_formed: bool = True, length: int = 4) -> Answer:
    return Answer("1", kind, "q", "text", solution, letter, letter == solution, is_well_formed, length, "0.mp4")


def test_summary_counts_unparsable_answers_as_wrong() -> None:
    answers = [
        make_answer("A", "A", "what"),
        make_answer("B", "A", "what"),
        make_answer(None, "C", "where", is_well_formed=False, length=12),
        make_answer("D", "D", "where", is_well_formed=False),
        make_answer("E", "E", "where"),
    ]
    assert summarise_answers(answers) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "strict_accuracy": 2 / 5,
            "format_rate": 3 / 5,
            "unparsable_rate": 1 / 5,
            "completion_length": 28 / 5,
            "num_questions": 5,
            "num_left_out": 0,
            "accuracy/what": 1 / 2,
            "accuracy/where": 2 / 3,
            "strict_accuracy/what": 1 / 2,
            "strict_accuracy/where": 1 / 3,
        }
    )


def test_one_problem_type_has_no_column_of_its_own() -> None:
    assert "accuracy/what" not in summarise_answers([make_answer("A", "A", "what")])


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(DataError, match="there is no question"):
        summarise_answers([])


def test_random_model_is_unparsable(world: Path, tmp_path: Path) -> None:
    summary, answers = evaluate(world / "base", world, tmp_path)
    assert summary["unparsable_rate"] == 1
    assert summary["accuracy"] == summary["format_rate"] == 0
    assert [answer["letter"] for answer in answers] == [None] * NUM_SAMPLES


def test_learnt_answers_are_all_right(world: Path, learnt: Path, tmp_path: Path) -> None:
    summary, answers = evaluate(learnt, world, tmp_path)
    assert [answer["letter"] for answer in answers] == list("ABCABC")
    expected = ("accuracy", "format_rate", "accuracy/what", "accuracy/where")
    assert [summary[name] for name in expected] == [1, 1, 1, 1]
    assert summary["unparsable_rate"] == 0
    assert summary["num_questions"] == NUM_SAMPLES


def test_accuracy_is_by_problem_type(world: Path, learnt: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
    for row in rows[1::2]:  # the questions of type "where" get another solution
        row["solution"] = f"<answer>{'BCA'['ABC'.index(row['solution'][8])]}</answer>"
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, _ = evaluate(learnt, world, tmp_path, data_file=tmp_path / "other.jsonl")
    assert (summary["accuracy"], summary["accuracy/what"], summary["accuracy/where"]) == (0.5, 1, 0)


def test_result_does_not_depend_on_batch_size_and_limit_takes_the_first(world: Path, tmp_path: Path) -> None:
    _, together = evaluate(world / "base", world, tmp_path, batch_size=NUM_SAMPLES)
    _, apart = evaluate(world / "base", world, tmp_path, batch_size=1)
    assert apart == together
    _, first = evaluate(world / "base", world, tmp_path, batch_size=4, limit=2)
    assert first == together[:2]


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_what_it_says(control: Control) -> None:
    pixels = torch.randn(5, 3, 2, 4)
    shown = CONTROLS[control](pixels)
    assert shown.shape == pixels.shape
    if control == "blank_video":
        assert not shown.any()
    if control == "repeated_frame":
        assert all(torch.equal(frame, pixels[2]) for frame in shown)
    if control == "shuffled_frames":
        places = [next(i for i, frame in enumerate(pixels) if torch.equal(frame, other)) for other in shown]
        assert sorted(places) == [0, 1, 2, 3, 4] != places


def test_controls_are_those_of_the_configuration() -> None:
    assert tuple(CONTROLS) == get_args(Control)


def test_unknown_control_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="control is 'blind'; choose from blank_video, "):
        evaluate(world / "base", world, tmp_path, control="blind")


def test_blank_video_hides_the_video(world: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "swapped"
    shutil.copytree(world, swapped)
    for index in range(NUM_SAMPLES):
        shutil.copy(world / f"{(index + 1) % NUM_SAMPLES}.mp4", swapped / f"{index}.mp4")
    seen = [evaluate(world / "base", folder, tmp_path)[1] for folder in (world, swapped)]
    blank = [evaluate(world / "base", folder, tmp_path, control="blank_video")[1] for folder in (world, swapped)]
    assert seen[0] != seen[1]
    assert blank[0] == blank[1]


def test_bad_video_is_never_left_out_of_the_rate(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / "4.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"questions\.jsonl:5: .*4\.mp4: .*repair or remove the sample"):
        evaluate(world / "base", broken, tmp_path)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_left_out_questions_are_counted_and_named(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, batch_size: int
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / "4.mp4").write_bytes(b"not a video")
    rows = [json.loads(line) for line in (broken / "questions.jsonl").read_text().splitlines()]
    rows[1]["solution"] = "Z"
    rows[2]["problem"] = "Well, " * 400 + rows[2]["problem"]
    (broken / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skip = {"policy": "skip", "max_bad_fraction": 0.5, "data_file": broken / "questions.jsonl"}
    summary, answers = evaluate(world / "base", broken, tmp_path, batch_size=batch_size, **skip)
    assert (summary["num_questions"], summary["num_left_out"]) == (3, 3)
    assert [answer["sample_id"] for answer in answers] == ["0", "3", "5"]
    left_out = json.loads((tmp_path / "answers.json").read_text())["left_out"]
    assert [(row["when"], row["line"]) for row in left_out] == [("reading", 2), ("reading", 3), ("evaluation", 5)]
    assert all(f"questions.jsonl, line {line} is left out: " in caplog.text for line in (2, 3, 5))
    _, whole = evaluate(world / "base", world, tmp_path, batch_size=batch_size)
    assert answers == [whole[i] for i in (0, 3, 5)]
    summary, _ = evaluate(world / "base", broken, tmp_path, limit=4, **skip)
    assert (summary["num_questions"], summary["num_left_out"]) == (2, 2)  # of the first four rows
    with pytest.raises(DataError, match=r"3 of 6 rows cannot be used.*allows 0\.4"):
        evaluate(world / "base", broken, tmp_path, **{**skip, "max_bad_fraction": 0.4})


def test_chat_splits_thinking_and_answer(world: Path, learnt: Path) -> None:
    reply = chat(learnt, world / "1.mp4", problem(1), instruction="", num_frames=4, device="cpu")
    assert reply.thinking == "It is green."
    assert reply.answer == "B"
    assert reply.text == "<think> It is green. </think> <answer> B </answer>"


def test_chat_without_tags_has_no_parts(world: Path) -> None:
    reply = chat(world / "base", world / "1.mp4", problem(1), num_frames=4, max_completion_length=6, device="cpu")
    assert reply.text
    assert reply.thinking is None
    assert reply.answer is None


def test_chat_is_greedy_by_default_and_follows_the_seed_otherwise(world: Path) -> None:
    def ask(**options: Any) -> str:
        base, video = world / "base", world / "0.mp4"
        return chat(base, video, problem(0), num_frames=4, max_completion_length=8, device="cpu", **options).text

    assert ask(seed=1) == ask(seed=2)
    assert ask(temperature=1.0, seed=1) == ask(temperature=1.0, seed=1)
    assert len({ask(temperature=1.0, seed=seed) for seed in range(4)}) > 1


def test_chat_asks_with_the_instruction_of_training_unless_told_otherwise(world: Path) -> None:
    def ask(**options: Any) -> str:
        limits = {"num_frames": 4, "max_completion_length": 8, "device": "cpu"}
        return chat(world / "base", world / "0.mp4", problem(0), **limits, **options).text

    assert ask() == ask(instruction=INSTRUCTION) != ask(instruction="")


def test_prompt_that_would_be_cut_is_an_error(world: Path, tmp_path: Path) -> None:
    long = tmp_path / "long"
    shutil.copytree(world, long)
    rows = [json.loads(line) for line in (long / "questions.jsonl").read_text().splitlines()]
    rows[3]["problem"] = "Well, " * 400 + rows[3]["problem"]
    (long / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"questions\.jsonl:4: the prompt has \d+ tokens and the model takes \d+ "):
        evaluate(world / "base", long, tmp_path)
    with pytest.raises(DataError, match="question: the prompt has"):
        chat(world / "base", world / "0.mp4", "Well, " * 400, num_frames=4, device="cpu")


def test_nothing_answered_is_told_apart_from_nothing_asked() -> None:
    with pytest.raises(DataError, match=r"none of 3 questions could be asked; bad_samples\.jsonl"):
        summarise_answers([], 3)
    with pytest.raises(DataError, match="there is no question to evaluate"):
        summarise_answers([])
