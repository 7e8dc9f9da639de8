"""Bad rows and videos in a run: one line and one count for each, when it is due, over all processes and resumes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_toys import run_on_two_ranks
from trainer_toys import NUM_SAMPLES, TOYS, make_config, metrics_of, write_world

from fastr1.data.ledger import BadSampleLedger
from fastr1.data.order import SampleOrder
from fastr1.data.questions import load_questions
from fastr1.reporting.run_log import read_rows
from fastr1.schema import DataError
from fastr1.training.agreement import PeerError
from fastr1.training.bad_data import BadData
from fastr1.training.grpo import run_grpo
from fastr1.training.sft import run_sft

SKIP = {"data__policy": "skip", "data__max_bad_fraction": 0.5}
PAIRS = {**SKIP, "optim__per_device_train_batch_size": 2, "optim__max_steps": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def broken_world(world: Path, folder: Path, videos: Sequence[int] = ()) -> Path:
    """A copy in which some videos are none."""
    shutil.copytree(world, folder)
    for index in videos:
        (folder / f"{index}.mp4").write_bytes(b"not a video")
    return folder


def rewrite_questions(folder: Path, changes: dict[int, dict[str, Any]], name: str = "questions.jsonl") -> None:
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for index, fields in changes.items():
        rows[index].update(fields)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def bad_samples(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "bad_samples.jsonl")


def places(run: Path) -> list[tuple[int, str, str, int]]:
    return [(row["step"], row["when"], Path(row["file"]).name, row["line"]) for row in bad_samples(run)]


def due_pairs() -> list[list[int]]:
    """The samples of the three updates of two prompts each."""
    order = SampleOrder(NUM_SAMPLES, prompts_per_update=2, seed=42, max_steps=3)
    pairs = [order.indices(update) for update in range(3)]
    assert sorted(index for pair in pairs for index in pair) == list(range(NUM_SAMPLES))
    return pairs


def test_every_dropped_row_is_a_line_and_counts(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = broken_world(world, tmp_path / "world")
    rewrite_questions(folder, {1: {"solution": "Z"}, 4: {"problem": "Well, " * 400 + "\nOptions:\nA. x\nB. y"}})
    run_grpo(make_config(folder, tmp_path / "run", **SKIP))
    assert places(tmp_path / "run") == [(0, "reading", "questions.jsonl", 2), (0, "reading", "questions.jsonl", 5)]
    solution, prompt = (row["reason"] for row in bad_samples(tmp_path / "run"))
    assert solution.startswith("solution 'Z' is not one of the options")
    assert prompt.startswith("the prompt has ")
    assert "the model takes" in prompt
    assert [row["bad_samples"] for row in metrics_of(tmp_path / "run")] == [2, 2]
    assert not {row["sample_id"] for row in read_rows(tmp_path / "run" / "rollouts.jsonl")} & {"1", "4"}
    assert f"left out so far: 2 (see {tmp_path / 'run' / 'bad_samples.jsonl'})" in caplog.text


def test_undecodable_video_is_counted_when_it_is_due(world: Path, tmp_path: Path) -> None:
    first, _, third = (pair[0] for pair in due_pairs())
    folder = broken_world(world, tmp_path / "world", [first, third])
    run_grpo(make_config(folder, tmp_path / "run", **PAIRS))  # all three updates are loaded ahead of the first
    assert [row["bad_samples"] for row in metrics_of(tmp_path / "run")] == [1, 1, 2]
    expected = [(step, "training", "questions.jsonl", index + 1) for step, index in ((1, first), (3, third))]
    assert places(tmp_path / "run") == expected
    assert bad_samples(tmp_path / "run")[0]["reason"].startswith(f"{folder / str(first)}.mp4: ")
    assert "data.policy" not in bad_samples(tmp_path / "run")[0]["reason"]


@pytest.mark.parametrize("task", ["grpo", "sft"])
def test_update_with_nothing_but_bad_videos_passes_without_a_step(world: Path, tmp_path: Path, task: str) -> None:
    (first,) = SampleOrder(NUM_SAMPLES, prompts_per_update=1, seed=42, max_steps=3).indices(0)
    folder = broken_world(world, tmp_path / "world", [first])
    file = str(folder / ("questions.jsonl" if task == "grpo" else "coldstart.json"))
    settings = {**PAIRS, "optim__per_device_train_batch_size": 1, "task": task, "data__train_file": file}
    final = (run_grpo if task == "grpo" else run_sft)(make_config(folder, tmp_path / "run", **settings))
    rows = metrics_of(tmp_path / "run")
    assert [(row["bad_samples"], "loss" in row, row["num_tokens"] > 0) for row in rows] == [
        (1, False, False),
        (1, True, True),
        (1, True, True),
    ]
    assert final.name == "final"


def test_count_is_not_averaged_over_logging_steps(world: Path, tmp_path: Path) -> None:
    folder = broken_world(world, tmp_path / "world", [due_pairs()[2][0]])
    run_grpo(make_config(folder, tmp_path / "run", **PAIRS, run__logging_steps=3))
    assert [row["bad_samples"] for row in metrics_of(tmp_path / "run")] == [1]


def test_count_and_lines_survive_a_resume(world: Path, tmp_path: Path) -> None:
    folder = broken_world(world, tmp_path / "world", [pair[0] for pair in due_pairs()])
    rewrite_questions(folder, {})
    settings = {**PAIRS, "run__save_steps": 2}
    run_grpo(make_config(folder, tmp_path / "whole", **settings))
    assert [row["bad_samples"] for row in metrics_of(tmp_path / "whole")] == [1, 2, 3]
    # the checkpoint is that of update 2: what was written at update 3 is dropped and comes again
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    again = {**settings, "run__resume_from_checkpoint": "last"}
    run_grpo(make_config(folder, tmp_path / "resumed", **again))
    assert bad_samples(tmp_path / "resumed") == bad_samples(tmp_path / "whole")
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")
    # in another folder, too
    checkpoint = str(tmp_path / "whole" / "checkpoints" / "step-000002")
    run_grpo(make_config(folder, tmp_path / "moved", **{**again, "run__resume_from_checkpoint": checkpoint}))
    assert bad_samples(tmp_path / "moved") == bad_samples(tmp_path / "whole")
    # a bound that the first two exceed together with the third
    tight = {**again, "data__max_bad_fraction": 0.4}
    with pytest.raises(DataError, match=r"3 of 6 rows cannot be used, data\.max_bad_fraction allows 0\.4"):
        run_grpo(make_config(folder, tmp_path / "resumed", **tight))


def _train_two_ranks(rank: int, folder: Path) -> None:
    sys.path.insert(0, str(TOYS))
    one_each = {**PAIRS, "optim__per_device_train_batch_size": 1, "run__eval_steps": 3}
    one_each["data__eval_file"] = str(folder / "world" / "eval.jsonl")
    run_grpo(make_config(folder / "world", folder / "run", **one_each))
    tight = {**one_each, "data__max_bad_fraction": 0.2}
    with pytest.raises(PeerError if rank else DataError, match=r"2 of 6 rows cannot be used"):
        run_grpo(make_config(folder / "world", folder / "tight", **tight))
    (folder / f"done-{rank}").touch()


def test_two_processes_share_count_and_bound(world: Path, tmp_path: Path) -> None:
    """One bad video for each of them: alone neither exceeds 0.2 of the six rows, and each is told of the other's."""
    (_, second), (third, _) = due_pairs()[:2]
    folder = broken_world(world, tmp_path / "world", [second, third])
    rewrite_questions(folder, {}, "eval.jsonl")
    run_on_two_ranks(_train_two_ranks, tmp_path)
    assert [row["bad_samples"] for row in metrics_of(tmp_path / "run")] == [1, 2, 2]
    training = [(1, "training", "questions.jsonl", second + 1), (2, "training", "questions.jsonl", third + 1)]
    evaluation = {(3, "evaluation", "eval.jsonl", index + 1) for index in (second, third)}
    assert places(tmp_path / "run")[:2] == training
    assert set(places(tmp_path / "run")[2:]) == evaluation
    assert metrics_of(tmp_path / "run")[2]["eval/num_left_out"] == 2
    assert places(tmp_path / "tight") == training
    assert all((tmp_path / f"done-{rank}").exists() for rank in (0, 1))


class OtherMachine:
    """Of two processes the first; the other one read other rows."""

    rank, world_size = 0, 2

    def __init__(self, theirs: BadSampleLedger) -> None:
        self._theirs = theirs

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, {"training": self._theirs.rows}]

    def sum_across_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_processes_that_read_different_data_do_not_start(world: Path, tmp_path: Path) -> None:
    other = broken_world(world, tmp_path / "other")
    (other / "4.mp4").unlink()
    loaded = [
        load_questions(world / "questions.jsonl", root, policy="skip", max_bad_fraction=0.5) for root in (world, other)
    ]
    mine, theirs = (BadSampleLedger(one, policy="skip", max_bad_fraction=0.5) for one in loaded)
    BadData(OtherMachine(mine), tmp_path, mine, None).begin()  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"process 1 does not read the same training file.*line 5 .*does not exist"):
        BadData(OtherMachine(theirs), tmp_path, mine, None).begin()  # type: ignore[arg-type]


def test_evaluation_during_training_follows_the_policy(world: Path, tmp_path: Path) -> None:
    folder = broken_world(world, tmp_path / "world", [5])
    rewrite_questions(
        folder, {0: {"solution": "Z"}, 2: {"problem": "Well, " * 400 + "\nOptions:\nA. x\nB. y"}}, "e.jsonl"
    )
    rows = [line for index, line in enumerate((folder / "questions.jsonl").read_text().splitlines()) if index != 5]
    (folder / "questions.jsonl").write_text("\n".join(rows))
    evaluation = {"run__eval_steps": 1, "data__eval_file": str(folder / "e.jsonl")}
    run_grpo(make_config(folder, tmp_path / "skip", **SKIP, **evaluation))
    expected = [(0, "reading", "e.jsonl", 1), (0, "reading", "e.jsonl", 3), (1, "evaluation", "e.jsonl", 6)]
    assert places(tmp_path / "skip") == expected  # one line, though it failed at two evaluations
    for row in metrics_of(tmp_path / "skip"):
        assert (row["eval/num_questions"], row["eval/num_left_out"], row["bad_samples"]) == (3, 3, 0)
    with pytest.raises(DataError, match=r"e\.jsonl:1: solution 'Z'"):
        run_grpo(make_config(folder, tmp_path / "error", **evaluation))
    rewrite_questions(folder, {}, "e.jsonl")
    (folder / "e.jsonl").write_text(
        (folder / "e.jsonl").read_text() + json.dumps({**json.loads(rows[0]), "video_filename": "5.mp4"})
    )
    with pytest.raises(DataError, match=r"e\.jsonl:6: .*5\.mp4: .*repair or remove the sample"):
        run_grpo(make_config(folder, tmp_path / "error", **evaluation))


def test_answer_that_would_be_cut_is_a_bad_row(world: Path, tmp_path: Path) -> None:
    content = json.loads((world / "coldstart.json").read_text())
    content[3]["conversations"][1]["value"] = f"<think> {'It is ' * 400} </think> <answer> A </answer>"
    content[4]["conversations"][0]["value"] = "<image>\n" + "Well, " * 400
    (tmp_path / "long.json").write_text(json.dumps(content))
    sft = {"task": "sft", "data__train_file": str(tmp_path / "long.json")}
    with pytest.raises(DataError, match=r"long\.json\[3\]: the prompt has \d+ positions, the answer \d+ tokens, and"):
        run_sft(make_config(world, tmp_path / "error", **sft))
    run_sft(make_config(world, tmp_path / "skip", **sft, **SKIP))
    assert places(tmp_path / "skip") == [(0, "reading", "long.json", 3), (0, "reading", "long.json", 4)]
    assert [row["bad_samples"] for row in metrics_of(tmp_path / "skip")] == [2, 2]
