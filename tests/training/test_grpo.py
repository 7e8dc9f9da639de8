"""GRPO runs of a random model, end to end: what must not change the result, what must, and what a run leaves behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys
from distributed_toys import run_on_two_ranks
from rescue_toys import fail_on_one_rank
from torch.testing import assert_close
from trainer_toys import (
    INSTRUCTION,
    ROOT,
    TOYS,
    child_environment,
    exported,
    make_config,
    metrics_of,
    write_world,
)

import fastr1.reporting.timing
import fastr1.training.grpo
from fastr1.config import RolloutConfig, load_config, save_config
from fastr1.data.questions import load_questions
from fastr1.evaluation.recorded import Recorded, read_recorded
from fastr1.models import load_model, load_processor
from fastr1.models.texts import prompt_ids
from fastr1.models.tinyllava import TinyLlavaVideo
from fastr1.reporting.run_log import read_rows
from fastr1.reporting.statistics import mean_metrics
from fastr1.rollout import RolloutEngine
from fastr1.schema import DataError, Sample, Update
from fastr1.training.checkpoint import find_last_checkpoint
from fastr1.training.grpo import GRPOTrainer, run_grpo
from fastr1.training.held_out import build_evaluator
from fastr1.training.loop import TrainingRun
from fastr1.training.stop import RESUME
from fastr1_kernels import LOSSES

ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
Parameters = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two updates with the default toy settings and KL."""
    output = tmp_path_factory.mktemp("plain")
    run_grpo(make_config(world, output, grpo__beta=0.1, run__report_to=("jsonl", "tensorboard")))
    return output


def train(world: Path, output: Path, **changes: Any) -> Parameters:
    return exported(run_grpo(make_config(world, output, **changes)))


def assert_same(actual: Parameters, expected: Parameters, tolerance: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def largest_change(actual: Parameters, before: Parameters, prefix: str) -> float:
    return max((actual[k] - before[k]).abs().max().item() for k in before if k.startswith(prefix))


def loss_settings(loss_type: str) -> dict[str, Any]:
    """The loss with what it needs."""
    needs = {"epsilon_high": 5.0, "importance_sampling_level": "sequence"}
    extra = {f"grpo__{name}": value for name, value in needs.items() if name in LOSSES[loss_type].needs}
    return {"grpo__loss_type": loss_type, **extra}


# What must not change the result


@pytest.mark.parametrize("loss_type", LOSSES)
def test_result_does_not_depend_on_accumulation(world: Path, tmp_path: Path, loss_type: str) -> None:
    runs = []
    for per_device, accumulation in ((4, 1), (2, 2), (1, 4)):
        output = tmp_path / f"{per_device}x{accumulation}"
        split = {
            "optim__per_device_train_batch_size": per_device,
            "optim__gradient_accumulation_steps": accumulation,
        }
        settings = {**loss_settings(loss_type), "grpo__beta": 0.1, **split}
        runs.append((train(world, output, **settings), metrics_of(output)))
    expected, expected_metrics = runs[0]
    assert largest_change(expected, exported(world / "base"), "language_model") > 1e-4
    for parameters, metrics in runs[1:]:
        assert_same(parameters, expected)
        for row, expected_row in zip(metrics, expected_metrics, strict=True):
            assert row == pytest.approx(expected_row, abs=2e-5)


def slow_down(owner: Any, name: str, seconds: float) -> None:
    original = getattr(owner, name)

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return original(*args)

    setattr(owner, name, slow)


def _train_in_two_processes(rank: int, folder: Path) -> None:
    sys.path.insert(0, str(TOYS))
    halves = {"optim__per_device_train_batch_size": 1, "optim__gradient_accumulation_steps": 2, "grpo__beta": 0.1}
    questions = str(folder / "world" / "questions.jsonl")
    evaluation = {"run__eval_steps": 2, "data__eval_file": questions}
    fastr1.reporting.timing.peak_memory_bytes = lambda device: (7 if rank else 5) << 40
    if rank == 1:
        slow_down(trainer_toys, "vowel_reward", seconds=0.1)
    for name, stage in (("one", {"zero_optimization": {"stage": 1}}), ("three", ZERO_3)):
        run_grpo(make_config(folder / "world", folder / name, deepspeed=stage, **halves, **evaluation))
    fail_on_one_rank(rank, folder)


@pytest.fixture(scope="module")
def two_processes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs in two processes; starting them is what takes long."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(world, folder / "world")
    run_on_two_ranks(_train_in_two_processes, folder)
    return folder


def test_two_processes_equal_one(two_processes: Path, plain: Path) -> None:
    for name in ("one", "three"):
        assert_same(exported(two_processes / name / "final"), exported(plain / "final"))
        for row, expected in zip(metrics_of(two_processes / name), metrics_of(plain), strict=True):
            assert {key: row[key] for key in expected} == pytest.approx(expected, abs=2e-5)
        assert metrics_of(two_processes / name)[1]["eval/num_questions"] == 6
        # the rank that needed most: rank 1 has the higher peak and waits in its reward function
        for row in read_rows(two_processes / name / "metrics.jsonl"):
            assert row["peak_memory_bytes"] == 7 << 40
            assert row["time/step_seconds"] > row["time/reward_seconds"] > 0.1
            assert row["num_tokens"] / row["tokens_per_second"] > 0.1
        sheets = [row["video"] for row in read_rows(two_processes / name / "frames/index.jsonl", key="sheet", kind=str)]
        assert sorted(sheets) == [f"{i}.mp4" for i in range(6)]  # each once, though both processes saw some
        rollouts, expected_rollouts = (read_rows(f / "rollouts.jsonl") for f in (two_processes / name, plain))
        assert [row.pop("rank") for row in rollouts] == [0] * 6 + [1] * 6 + [0] * 6 + [1] * 6
        for row, expected in zip(rollouts, expected_rollouts, strict=True):
            assert expected.pop("rank") == 0
            assert Path(row.pop("video")).name == Path(expected.pop("video")).name
            assert row.pop("advantage") == pytest.approx(expected.pop("advantage"), abs=1e-5)
            assert row == expected


def test_error_on_one_of_two_ranks_hangs_and_loses_nothing(two_processes: Path) -> None:
    folder = two_processes
    told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert [told[rank][name][0] for name in ("whole", "reward resumed") for rank in range(2)] == [""] * 4
    # what a video lacks is known to both, and the first tells it
    failures = (("reward", "RewardError", 1), ("rollout", "NonFiniteLogitsError", 1), ("disk", "DiskError", 1))
    for name, error, own in (*failures, ("evaluation", "DataError", 0)):
        (kind, text), (own_kind, own_text) = told[1 - own][name], told[own][name]
        last = folder / name / "checkpoints" / "step-000002"
        assert (kind, own_kind) == ("PeerError", error)
        assert text.startswith(f"rank {own} failed: ")
        assert f"{last}: {RESUME}" in own_text
        assert ("could not be saved (writing it failed)" in own_text) == (name == "disk")
        assert sorted(path.name for path in last.parent.iterdir()) == [last.name]
        assert find_last_checkpoint(folder / name).parent == last.parent
    last = folder / "no answer" / "checkpoints" / "step-000002"  # what all know, and the first tells
    why = "none of 6 questions could be asked; bad_samples.jsonl or the log says why: repair them"
    kept = f"Update 2 is saved in {last}: {RESUME}"
    assert told[0]["no answer"] == ["DataError", f"{why}. {kept}"]
    assert told[1]["no answer"] == ["PeerError", f"rank 0 failed: DataError: {why}. {kept}"]
    assert find_last_checkpoint(folder / "no answer") == last
    assert_same(exported(folder / "reward" / "final"), exported(folder / "whole" / "final"), tolerance=0)
    assert metrics_of(folder / "reward") == metrics_of(folder / "whole")


@pytest.mark.parametrize("zero", [{"zero_optimization": {"stage": s}} for s in (0, 2)] + [ZERO_3], ids=["0", "2", "3"])
def test_zero_stages_give_the_same_update(world: Path, plain: Path, tmp_path: Path, zero: dict[str, Any]) -> None:
    questions = str(world / "questions.jsonl")
    assert_same(
        train(world, tmp_path, grpo__beta=0.1, deepspeed=zero, run__eval_steps=1, data__eval_file=questions),
        exported(plain / "final"),
    )


@pytest.mark.parametrize("freeze", [("vision_tower",), ("vision_tower", "language_model"), ()])
def test_zero_stages_agree_where_videos_have_a_backward_of_their_own(
    world: Path, tmp_path: Path, freeze: tuple[str, ...]
) -> None:
    """After several micro-batches, of several updates: nothing is left over from the last one."""
    settings = {"model__freeze": freeze, "optim__max_steps": 3, "optim__max_tokens_per_micro_batch": 150}
    runs = {stage: {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2)} | {3: ZERO_3}
    after = {stage: train(world, tmp_path / str(stage), deepspeed=zero, **settings) for stage, zero in runs.items()}
    assert largest_change(after[0], exported(world / "base"), "connector") > 1e-4
    for stage in (1, 2, 3):
        assert_same(after[stage], after[0])


def test_zero_3_gathers_once_around_vision_rollout_and_evaluation(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not gathered, each layer would be fetched per token, and ranks of unequal rollouts would wait for ever."""
    sizes: dict[str, list[int]] = {"sample": [], "encode": [], "forward": []}

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            sizes[name].append(min(p.numel() for p in getattr(self, "model", self).parameters()))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(RolloutEngine, "sample")  # that of the update, and those of the evaluation
    watch(TinyLlavaVideo, "encode")
    watch(TinyLlavaVideo, "forward")
    questions = str(world / "questions.jsonl")
    train(world, tmp_path, deepspeed=ZERO_3, optim__max_steps=1, run__eval_steps=1, data__eval_file=questions)
    assert len(sizes["sample"]) >= 2
    assert min(*sizes["sample"], sizes["encode"][-1]) > 0
    assert max(sizes["forward"]) == 0  # training itself stays partitioned


def test_gradient_checkpointing_gives_the_same_update(world: Path, plain: Path, tmp_path: Path) -> None:
    assert_same(train(world, tmp_path, grpo__beta=0.1, model__gradient_checkpointing=True), exported(plain / "final"))


def test_two_updates_resume_and_two_updates_equal_four_exactly(world: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    expected = train(world, whole, optim__max_steps=4, grpo__beta=0.1)
    train(world, halves, optim__max_steps=2, grpo__beta=0.1, run__save_steps=1)
    assert sorted(p.name for p in (halves / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    resumed = train(world, halves, optim__max_steps=4, grpo__beta=0.1, run__resume_from_checkpoint="last")
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name
    assert metrics_of(halves) == metrics_of(whole)
    assert read_rows(halves / "rollouts.jsonl") == read_rows(whole / "rollouts.jsonl")


# What must change, and what must not


def test_speculation_changes_nothing_and_remembers_the_last_epoch(world: Path, tmp_path: Path) -> None:
    changes = {"optim__max_steps": 6, "grpo__max_completion_length": 12, "grpo__temperature": 0.1}
    plain = train(world, tmp_path / "plain", **changes)
    assert_same(train(world, tmp_path / "guessing", rollout__num_speculative_tokens=4, **changes), plain)
    for row, expected in zip(*(metrics_of(tmp_path / name) for name in ("guessing", "plain")), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
    rows = read_rows(tmp_path / "guessing" / "metrics.jsonl")
    lengths = [row["rollout/mean_acceptance_length"] for row in rows]
    assert rows[-1]["epoch"] == 4
    assert min(lengths[3:]) > max(lengths[:2])
    assert all(0 < row["rollout/draft_acceptance_rate"] <= 1 for row in rows[3:])


def test_held_out_questions_are_answered_without_speculation(world: Path, tmp_path: Path) -> None:
    changes = {"data__eval_file": str(world / "questions.jsonl"), "run__eval_steps": 1}
    config = make_config(world, tmp_path, rollout__num_speculative_tokens=4, rollout__keep_arenas=False, **changes)
    evaluator = build_evaluator(config, load_processor(world / "base"))
    assert evaluator is not None
    assert evaluator._rollout == RolloutConfig(keep_arenas=False)


def test_frozen_tower_stays_and_the_rest_moves(world: Path, plain: Path) -> None:
    before, after = exported(world / "base"), exported(plain / "final")
    assert largest_change(after, before, "vision_tower") == 0
    assert largest_change(after, before, "connector") > 1e-4
    assert largest_change(after, before, "language_model") > 1e-4


def test_trainable_tower_moves(world: Path, tmp_path: Path) -> None:
    after = train(world, tmp_path, model__freeze=("language_model",))
    before = exported(world / "base")
    assert largest_change(after, before, "vision_tower") > 1e-5
    assert largest_change(after, before, "language_model") == 0


def test_kl_is_zero_at_first_and_grows_away_from_the_reference(plain: Path) -> None:
    first, second = metrics_of(plain)
    assert abs(first["kl"]) < 1e-6
    assert second["kl"] > 1e-4
    assert second["sampler_gap"] < 1e-5


def test_reward_of_random_model_rises(world: Path, tmp_path: Path) -> None:
    train(
        world,
        tmp_path,
        optim__max_steps=25,
        optim__learning_rate=1e-2,
        optim__adam_epsilon=1e-8,
        grpo__num_generations=8,
    )
    rewards = [row["reward"] for row in metrics_of(tmp_path)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_logging_steps_average_over_their_updates(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "each", optim__max_steps=3)
    train(world, tmp_path / "pairs", optim__max_steps=3, run__logging_steps=2)
    each, pairs = metrics_of(tmp_path / "each"), metrics_of(tmp_path / "pairs")
    assert [row["step"] for row in pairs] == [2, 3]
    assert pairs[0]["reward"] == pytest.approx((each[0]["reward"] + each[1]["reward"]) / 2)
    assert pairs[1] == each[2]
    assert mean_metrics([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}


# Bad videos


def break_video(world: Path, tmp_path: Path, index: int) -> Path:
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / f"{index}.mp4").write_bytes(b"not a video")
    return broken


def test_prompt_that_would_be_cut_stops_the_run_before_its_first_update(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    rows[-1]["problem"] = "Well, " * 400 + rows[-1]["problem"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"questions\.jsonl:{len(rows)}: the prompt has \d+ tokens"):
        train(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_new_run_refuses_a_folder_with_an_earlier_one(world: Path, plain: Path) -> None:
    before = (plain / "metrics.jsonl").read_bytes()
    typed = re.escape(f"--set run.output_dir={plain}-2")
    with pytest.raises(
        DataError, match=rf"holds an earlier run \(metrics\.jsonl, .*final\): add {typed} to the command"
    ):
        train(world, plain, run__seed=7)
    assert (plain / "metrics.jsonl").read_bytes() == before


def test_missing_evaluation_file_stops_the_run_before_its_first_update(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.jsonl"):
        train(world, tmp_path, data__eval_file=str(world / "nope.jsonl"), run__eval_steps=2)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_bad_video_stops_the_run_by_default(world: Path, tmp_path: Path) -> None:
    broken = break_video(world, tmp_path, 3)
    with pytest.raises(DataError, match=r"questions\.jsonl:4.*3\.mp4"):
        run_grpo(make_config(broken, tmp_path / "run"))


def test_skipped_video_is_counted_and_reported(world: Path, tmp_path: Path) -> None:
    broken = break_video(world, tmp_path, 3)
    train(broken, tmp_path / "run", data__policy="skip", data__max_bad_fraction=0.5, optim__max_steps=3)
    rows = read_rows(tmp_path / "run" / "rollouts.jsonl")
    assert {row["sample_id"] for row in rows if not row["valid"]} == {"3"}
    assert all(row["advantage"] == 0 for row in rows if not row["valid"])
    valid = [row["reward"] for row in rows if row["valid"] and row["step"] == 2]
    metrics = metrics_of(tmp_path / "run")
    assert metrics[-1]["bad_samples"] == 1
    assert metrics[1]["reward"] == pytest.approx(sum(valid) / len(valid))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_skipped_video_contributes_nothing(world: Path, tmp_path: Path, loss_type: str) -> None:
    """An update with three good videos and a bad one equals the update with the three alone."""
    states = []
    for num_samples in (4, 3):
        config = make_config(world, tmp_path, grpo__loss_type=loss_type, grpo__beta=0.1)
        with TrainingRun[Sample](config, load_questions, prompt_ids) as run:
            samples = run.samples[:num_samples]
            pixels: list[torch.Tensor | None] = [torch.full((4, 3, 28, 28), 0.1 * i) for i in range(3)]
            pixels += [None] * (num_samples - 3)
            places = list(range(num_samples))
            update = Update(1, samples, places, places, pixels)
            metrics, _ = GRPOTrainer(run).step(update)
            counted = {name: value for name, value in metrics.items() if not name.startswith("rollout/")}
            states.append((run.distributed.consolidated_state_dict(), counted))
    assert_same(states[0][0], states[1][0])
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-5, abs=1e-6)


# What a run leaves behind


def test_run_folder(world: Path, plain: Path) -> None:
    config = load_config(plain / "config.json")
    assert config == make_config(world, plain, grpo__beta=0.1, run__report_to=("jsonl", "tensorboard"))
    names = set(read_rows(plain / "metrics.jsonl")[0])
    assert names >= {
        "step", "loss", "kl", "entropy", "reward", "rewards/trainer_toys:vowel_reward", "reward_std",
        "frac_reward_zero_std", "completion_length", "completion_length_max", "completion_clipped_ratio", "num_tokens",
        "grad_norm", "learning_rate", "epoch", "bad_samples", "sampler_gap", "tokens_per_second", "peak_memory_bytes",
        "time/decode_wait_seconds", "time/vision_seconds", "time/rollout_seconds", "time/reward_seconds",
        "time/reference_seconds", "time/train_seconds", "time/optimizer_seconds", "time/step_seconds",
    }  # fmt: skip
    rows = read_rows(plain / "rollouts.jsonl")
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        assert row["question"].startswith("Which colour")
        assert row["reward"] == row["rewards"]["trainer_toys:vowel_reward"]
    group = [row["advantage"] for row in rows[:3]]
    assert sum(group) == pytest.approx(0, abs=1e-5)
    assert any(not row["is_truncated"] for row in rows)
    assert any(row["is_truncated"] for row in rows)
    assert list((plain / "tensorboard").glob("events.*"))
    model = load_model(plain / "final", device="cpu", dtype="float32")
    assert torch.equal(
        model.language_model.lm_head.weight, exported(plain / "final")["language_model.model.embed_tokens.weight"]
    )
    assert not (plain / "checkpoints").exists()
    assert read_recorded(plain / "final") == Recorded(4, None, INSTRUCTION, "pyav")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["deepspeed", "deepspeed --num_gpus 2"])
def test_deepspeed_launcher(world: Path, plain: Path, tmp_path: Path, command: str) -> None:
    per_device = 2 if "2" in command else 4
    config = make_config(world, tmp_path / "run", grpo__beta=0.1, optim__per_device_train_batch_size=per_device)
    save_config(config, tmp_path / "config.json")
    binary, *options = command.split()
    script = str(ROOT / "fastr1" / "train.py")
    launch = [str(Path(sys.executable).parent / binary), *options, "--master_port", "29619", script]
    subprocess.run(
        [*launch, "--config", str(tmp_path / "config.json")], env=child_environment(), check=True, timeout=300
    )
    assert_same(exported(tmp_path / "run" / "final"), exported(plain / "final"))
