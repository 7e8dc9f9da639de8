"""A resume is exact, row by row, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_toys import ROOT, child_environment, exported, make_config, metrics_of, write_world

import fastr1.training.checkpoint
import fastr1.training.loop
import fastr1.training.resume
from fastr1.config import TrainConfig, save_config
from fastr1.data.order import SampleOrder
from fastr1.data.questions import load_questions
from fastr1.reporting.run_log import RunLogger, read_rows
from fastr1.training.checkpoint import CheckpointError, find_last_checkpoint
from fastr1.training.distributed import DistributedModel
from fastr1.training.grpo import run_grpo
from fastr1.training.resume import MAY_CHANGE, run_settings

COSINE = {"optim__lr_scheduler_type": "cosine", "optim__max_steps": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "0.mp4").write_bytes(b"not a video")
    return folder


def settings_of(config: TrainConfig) -> dict[str, Any]:
    samples = load_questions(config.data.train_file, config.data.video_root).samples
    return run_settings(config, samples, 1, 4)


# What is compared


def other_value(value: Any) -> Any:
    """A value of the same type that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, "other")
    return "other" if value is None else f"{value}-other"


def test_every_setting_is_compared_unless_it_may_change(world: Path, tmp_path: Path) -> None:
    """So one that is added is compared too. The files have a test of their own."""
    config = make_config(world, tmp_path, **COSINE)
    before = settings_of(config)
    unnoticed = []
    for section, hint in get_type_hints(TrainConfig).items():
        for field in dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ():
            name = f"{section}.{field.name}"
            if name in ("data.train_file", "data.video_root", "data.eval_file", "data.backend", "model.dtype"):
                continue
            if name == "model.use_liger_kernel":  # only a GPU can have another one
                continue
            value = other_value(getattr(getattr(config, section), field.name))
            if name == "model.packed_attn_implementation":  # which is looked up
                value = "eager"
            changed = make_config(world, tmp_path, **{**COSINE, f"{section}__{field.name}": value})
            if settings_of(changed) == before:
                unnoticed.append(name)
    assert sorted(unnoticed) == sorted(MAY_CHANGE)
    assert settings_of(make_config(world, tmp_path, **COSINE, task="sft")) != before
    assert settings_of(make_config(world, tmp_path, **COSINE, model__dtype="auto")) == before  # float32 on a CPU


def test_deepspeed_entries_are_compared_one_by_one(world: Path, tmp_path: Path) -> None:
    def settings(deepspeed: dict[str, Any]) -> dict[str, Any]:
        return settings_of(make_config(world, tmp_path, deepspeed=deepspeed))

    plain = settings({})
    assert settings({"zero_optimization": {"stage": 1}}) == plain  # the default
    assert settings({"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}) == plain
    changed = settings({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}})
    assert changed == {**plain, "deepspeed.zero_optimization.offload_optimizer.device": "cpu"}


def test_the_length_of_a_run_is_compared_only_where_the_learning_rate_follows_it(world: Path, tmp_path: Path) -> None:
    def settings(schedule: str, warmup: float, max_steps: int) -> dict[str, Any]:
        changes = {"optim__lr_scheduler_type": schedule, "optim__warmup_ratio": warmup, "optim__max_steps": max_steps}
        return settings_of(make_config(world, tmp_path, **changes))

    assert settings("constant", 0.0, 2) == settings("constant", 0.0, 4)
    assert settings("constant", 0.1, 2) != settings("constant", 0.1, 4)
    assert settings("cosine", 0.0, 2) != settings("cosine", 0.0, 4)


def test_files_are_compared_by_content_not_by_place(world: Path, tmp_path: Path) -> None:
    def settings(folder: Path, model: Path = world / "base") -> dict[str, Any]:
        questions = str(folder / "questions.jsonl")
        return settings_of(make_config(folder, tmp_path, model__path=str(model), data__eval_file=questions))

    before = settings(world)
    moved = tmp_path / "moved"
    shutil.copytree(world, moved)
    assert settings(moved) == before

    def differing(folder: Path, **options: Path) -> list[str]:
        return [name for name, value in settings(folder, **options).items() if value != before[name]]

    assert differing(moved, model=moved / "base") == ["model.path"]
    clip = moved / "1.mp4"
    content = clip.read_bytes()
    clip.write_bytes(content + b"\0")
    assert differing(moved) == ["data.video_root"]
    clip.write_bytes(content)
    questions = moved / "questions.jsonl"
    questions.write_text(questions.read_text().replace("It is not", "It was not"))
    assert differing(moved) == ["data.train_file", "data.eval_file"]


def test_weights_trained_again_under_the_same_name_are_noticed(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "base", model)
    config = make_config(world, tmp_path, model__path=str(model))
    before = settings_of(config)
    (model / "README.md").write_text("a note")
    assert settings_of(config) == before
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-9] + b"\7" + content[-8:])
    assert settings_of(config)["model.path"] != before["model.path"]
    weights.write_bytes(content)
    assert settings_of(config) == before
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert settings_of(config)["model.path"] != before["model.path"]


def test_the_decoder_that_auto_stands_for_is_compared(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for decoder in ("torchcodec 0.13.0, FFmpeg 7", "torchcodec 0.14.0, FFmpeg 7", "pyav 15.1.0"):
        monkeypatch.setattr(fastr1.training.resume, "describe_backend", lambda backend, text=decoder: text)
        found.append(settings_of(make_config(world, tmp_path, data__backend="auto"))["data.backend"])
    assert found == ["auto: torchcodec", "auto: torchcodec", "auto: pyav"]


def test_the_layers_that_null_stands_for_are_compared(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(setting: bool | None) -> bool:
        return settings_of(make_config(world, tmp_path, model__use_liger_kernel=setting))["model.use_liger_kernel"]

    assert [used(None), used(False)] == [torch.cuda.is_available(), False]
    monkeypatch.setattr(fastr1.training.resume, "resolve_liger", lambda setting, device: setting is not False)
    assert [used(None), used(True), used(False)] == [True, True, False]


def test_a_reward_function_that_was_edited_is_noticed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "my_own_rewards.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for score in (1.0, 2.0):
        module.write_text(f"def reward(completions, solutions, samples):\n    return [{score}] * len(completions)\n")
        functions = ("think_format", "my_own_rewards:reward")
        found.append(settings_of(make_config(world, tmp_path, reward__functions=functions))["reward.functions"])
    assert found[0] != found[1]
    assert found[0][0] == "think_format"


# Refused by name, before a model is built, unless it is allowed

SKIP = {"data__policy": "skip", "data__max_bad_fraction": 0.5}


@pytest.fixture(scope="module")
def interrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four updates that has a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("interrupted")
    run_grpo(make_config(world, folder, **COSINE, **SKIP, run__save_steps=2, run__save_total_limit=9))
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    return folder


def resume(world: Path, folder: Path, **changes: Any) -> Path:
    settings = {**COSINE, **SKIP, "run__resume_from_checkpoint": "last", **changes}
    return run_grpo(make_config(world, folder, **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__instruction": "Guess."}, r"data.instruction was 'Think, then answer.' and is 'Guess.' now"),
        ({"data__num_frames": 8}, "data.num_frames was 4 and is 8 now"),
        ({"reward__correct": 3.0}, r"reward.correct was 1.0 and is 3.0 now"),
        ({"grpo__epsilon_high": 0.3}, "grpo.epsilon_high was None and is 0.3 now"),
        ({"optim__warmup_ratio": 0.5}, "optim.warmup_ratio was 0.0 and is 0.5 now"),
        ({"optim__max_steps": 6}, "optim.max_steps was 4 and is 6 now"),
        ({"run__seed": 7}, "run.seed was 42 and is 7 now"),
        ({"model__freeze": ()}, r"model.freeze was \['vision_tower'\] and is \[\] now"),
        ({"optim__per_device_train_batch_size": 2}, "prompts per update was 4 and is 2 now"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed.zero_optimization.stage was 1 and is 2 now"),
        ({"run__allow_changed": ("optim.beta",)}, "run.allow_changed names 'optim.beta'"),
    ],
)
def test_a_difference_is_refused_before_a_model_is_built(
    world: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(fastr1.training.loop, "load_policy", lambda config: pytest.fail("a model was built"))
    with pytest.raises(CheckpointError, match=message):
        resume(world, interrupted, **changes)


def test_changed_data_and_model_are_refused_by_name(world: Path, interrupted: Path, tmp_path: Path) -> None:
    other = tmp_path / "world"
    shutil.copytree(world, other)
    lines = (other / "questions.jsonl").read_text().splitlines()
    (other / "questions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(CheckpointError) as refusal:
        resume(other, interrupted)
    text = str(refusal.value)
    assert "data.train_file was '6 samples, sha256 " in text
    assert "and is '5 samples, sha256 " in text
    assert "data.video_root was '6 clips, sha256 " in text
    assert f"model.path was '{world / 'base'}, sha256 " in text
    assert f"and is '{other / 'base'}, sha256 " in text


def test_what_is_allowed_to_change_does(world: Path, interrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    other = tmp_path / "world"
    shutil.copytree(world, other)
    lines = (other / "questions.jsonl").read_text().splitlines()
    (other / "questions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    allowed = ("data.train_file", "data.video_root", "model.path", "optim.learning_rate")
    changes = {"optim__learning_rate": 5e-4, "data__policy": "error", "run__save_steps": 1}
    resume(other, run, **changes, run__allow_changed=allowed)
    rows, before = metrics_of(run), metrics_of(interrupted)
    assert rows[:2] == before[:2]
    assert rows[2]["learning_rate"] == pytest.approx(before[2]["learning_rate"] / 2)
    assert {row["sample_id"] for row in read_rows(run / "rollouts.jsonl") if row["step"] > 2} <= set("12345")
    resume(other, run, **changes)  # its own checkpoints hold the new settings


def test_a_checkpoint_with_more_updates_than_the_run_is_refused(world: Path, tmp_path: Path) -> None:
    settings = {**SKIP, "run__save_steps": 2}
    run_grpo(make_config(world, tmp_path, **settings))
    with pytest.raises(CheckpointError, match=r"has 2 updates behind it and this run only 1: raise optim\.max_steps"):
        run_grpo(make_config(world, tmp_path, **settings, optim__max_steps=1, run__resume_from_checkpoint="last"))


def test_resuming_into_the_folder_of_another_run_is_refused(world: Path, interrupted: Path, tmp_path: Path) -> None:
    checkpoint = find_last_checkpoint(interrupted)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds another run \(metrics\.jsonl\)"):
        resume(world, tmp_path, run__resume_from_checkpoint=str(checkpoint))
    with pytest.raises(CheckpointError, match=rf"the folder of a run: .* 'last' with run.output_dir={interrupted}"):
        resume(world, tmp_path, run__resume_from_checkpoint=str(interrupted))
    assert resume(world, tmp_path / "new", run__resume_from_checkpoint=str(checkpoint)).is_dir()


# Exact, row by row


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) per name, without those that depend on the machine."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    machine = ("time/", "rollout/", "tokens_per_second", "peak_memory_bytes")
    names = [name for name in events.Tags()["scalars"] if not name.startswith(machine)]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def assert_same_run(actual: Path, expected: Path) -> None:
    assert metrics_of(actual) == metrics_of(expected)
    assert read_rows(actual / "rollouts.jsonl") == read_rows(expected / "rollouts.jsonl")
    assert scalars_of(actual) == scalars_of(expected)
    wanted, found = exported(expected / "final"), exported(actual / "final")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


LOGGED = {
    **SKIP,
    "optim__lr_scheduler_type": "cosine",
    "optim__max_steps": 7,
    "grpo__beta": 0.1,
    "run__logging_steps": 3,
    "run__save_steps": 2,
    "run__report_to": ("jsonl", "tensorboard"),
}


def test_a_run_killed_anywhere_and_resumed_equals_the_uninterrupted_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a SIGKILL leaves are the files as they are: they are copied at many moments of one run, and each copy is
    resumed. Rows of metrics hold three updates, checkpoints come every two: most fall into an open row."""
    whole, copies = tmp_path / "whole", []

    def copy_before(owner: Any, name: str, calls: set[int]) -> None:
        original, count = getattr(owner, name), 0

        def copying(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count in calls:
                copies.append(tmp_path / f"{name}-{count}")
                shutil.copytree(whole, copies[-1])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, copying)

    copy_before(RunLogger, "log", {2})  # update 6: two rows of rollouts after the checkpoint, none of metrics
    copy_before(RunLogger, "log_rollouts", {7})  # the last update, in metrics but not in rollouts
    copy_before(DistributedModel, "save", {2})  # an unfinished checkpoint of update 4 beside that of update 2
    copy_before(fastr1.training.checkpoint, "_remove_leftovers", {4})  # update 4 is saved, nothing tidied up
    copy_before(DistributedModel, "consolidated_state_dict", {1})  # all updates done, the model not written
    evaluation = {"run__eval_steps": 2, "run__eval_samples": 2, "data__eval_file": str(world / "held_out.jsonl")}
    lines = (world / "questions.jsonl").read_text().splitlines(keepends=True)
    (world / "held_out.jsonl").write_text("".join(lines[1:4]))
    settings = {**LOGGED, **evaluation}
    run_grpo(make_config(world, whole, **settings))
    monkeypatch.undo()
    assert [row["step"] for row in read_rows(whole / "metrics.jsonl")] == [3, 6, 7]
    last = [json.loads((find_last_checkpoint(copy) / "manifest.json").read_text())["step"] for copy in copies]
    assert last == [2, 4, 4, 6, 6]
    for copy in copies:
        run_grpo(make_config(world, copy, **settings, run__resume_from_checkpoint="last"))
        assert_same_run(copy, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_random_moments_and_resumed_equals_the_uninterrupted_one(
    world: Path, tmp_path: Path, seed: int
) -> None:
    """Two real SIGKILLs per seed, each after a random share of the time that the run needs, its start included."""
    folder, rng = tmp_path / "world", random.Random(seed)
    shutil.copytree(world, folder)
    shutil.copy(folder / "1.mp4", folder / "0.mp4")
    bad = SampleOrder(6, prompts_per_update=4, seed=seed).indices(0)[0]
    (folder / f"{bad}.mp4").write_bytes(b"not a video")
    lines = [line for i, line in enumerate((folder / "questions.jsonl").read_text().splitlines()) if i != bad]
    (folder / "held_out.jsonl").write_text("\n".join(lines[:3]) + "\n")
    settings = {
        **LOGGED,
        "run__seed": seed,
        "optim__max_steps": 30,
        "run__save_steps": rng.choice((1, 2, 5)),
        "run__logging_steps": rng.choice((1, 3, 4)),
        "run__eval_steps": 6,
        "data__eval_file": str(folder / "held_out.jsonl"),
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    run_grpo(make_config(folder, whole, **settings))
    seconds = time.monotonic() - start

    def resumption() -> str | None:
        try:
            find_last_checkpoint(killed)
        except CheckpointError:  # killed before the first checkpoint: from the start again
            shutil.rmtree(killed, ignore_errors=True)
            return None
        return "last"

    for number in range(2):
        config = make_config(folder, killed, **settings, run__resume_from_checkpoint=resumption())
        save_config(config, tmp_path / "config.json")
        command = [sys.executable, str(ROOT / "fastr1" / "train.py"), "--config", str(tmp_path / "config.json")]
        with open(tmp_path / f"log-{number}", "w") as log:
            child = subprocess.Popen(command, env=child_environment(), stderr=log, stdout=log)
            deadline = time.monotonic() + 120
            config_file, before = killed / "config.json", time.time()
            while time.monotonic() < deadline and child.poll() is None:
                if config_file.exists() and config_file.stat().st_mtime >= before - 0.01:  # the loop begins
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0, seconds))
            child.kill()
            assert child.wait() in (-9, 0), (tmp_path / f"log-{number}").read_text()
    run_grpo(make_config(folder, killed, **settings, run__resume_from_checkpoint=resumption()))
    assert_same_run(killed, whole)


def test_a_skipped_sample_is_still_counted_after_a_resume_that_never_meets_it(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    first = SampleOrder(6, prompts_per_update=2, seed=42).indices(0)[0]
    shutil.copy(folder / "1.mp4", folder / "0.mp4")
    (folder / f"{first}.mp4").write_bytes(b"not a video")
    settings = {**SKIP, "optim__per_device_train_batch_size": 2, "optim__max_steps": 3, "run__save_steps": 2}
    run_grpo(make_config(folder, tmp_path / "run", **settings))
    before = metrics_of(tmp_path / "run")
    run_grpo(make_config(folder, tmp_path / "run", **settings, run__resume_from_checkpoint="last"))
    assert before[2]["bad_samples"] == 1
    assert metrics_of(tmp_path / "run") == before


def test_a_run_that_is_over_is_resumed_without_losing_its_last_row(world: Path, tmp_path: Path) -> None:
    settings = {**LOGGED, "optim__max_steps": 4}
    run_grpo(make_config(world, tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "final")
    run_grpo(make_config(world, tmp_path / "again", **settings, run__resume_from_checkpoint="last"))
    assert [row["step"] for row in read_rows(tmp_path / "again" / "metrics.jsonl")] == [3, 4]
    assert_same_run(tmp_path / "again", tmp_path / "whole")


def test_a_longer_run_that_goes_on_from_a_shorter_one_equals_the_long_one(world: Path, tmp_path: Path) -> None:
    """The shorter run's last row holds one update; in the longer run it belongs to a row of three."""
    settings = {**LOGGED, "optim__lr_scheduler_type": "constant"}
    run_grpo(make_config(world, tmp_path / "long", **settings))
    run_grpo(make_config(world, tmp_path / "short", **{**settings, "optim__max_steps": 4}))
    assert [row["step"] for row in read_rows(tmp_path / "short" / "metrics.jsonl")] == [3, 4]
    run_grpo(make_config(world, tmp_path / "short", **settings, run__resume_from_checkpoint="last"))
    assert_same_run(tmp_path / "short", tmp_path / "long")
