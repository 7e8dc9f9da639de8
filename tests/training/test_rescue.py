"""What is left of a run that an error ends, or that is stopped while it evaluates: the last finished update, to go on
from as if nothing had happened."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_toys
from trainer_toys import exported, make_config, metrics_of, write_world

import fastr1.training.grpo
import fastr1.training.keeper
from fastr1.data.order import SampleOrder
from fastr1.evaluation.multiple_choice import Evaluator
from fastr1.reporting.run_log import read_rows
from fastr1.rewards.scorer import RewardError
from fastr1.schema import DataError
from fastr1.training.checkpoint import CheckpointError, find_last_checkpoint
from fastr1.training.distributed import NonFiniteGradientError
from fastr1.training.grpo import prepare_grpo, run_grpo
from fastr1.training.keeper import DiskError
from fastr1.training.run_folder import holding_folder, refuse_used_folder
from fastr1.training.stop import RESUME, SAME_COMMAND, StopRequest

Parameters = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def settings(world: Path, output: Path, **changes: Any) -> Any:
    """Four updates, an evaluation after every second."""
    evaluation = {"run__eval_steps": 2, "data__eval_file": str(world / "questions.jsonl")}
    reward = {"reward__functions": ("trainer_toys:hooked_reward",)}
    return make_config(world, output, **{"optim__max_steps": 4, **evaluation, **reward, **changes})


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    run_grpo(settings(world, output))
    return output


@pytest.fixture
def before_scoring() -> Iterator[Callable[[Callable[[int], None]], None]]:
    """Adds a hook, and counts the updates of the run from 1."""
    trainer_toys.hooked_reward.update = 0
    yield trainer_toys.BEFORE_SCORING.append
    trainer_toys.BEFORE_SCORING.clear()


def assert_goes_on_like(whole: Path, world: Path, output: Path, **changes: Any) -> None:
    """Resumed, the run ends with the same model and the same rows, to the bit."""
    trainer_toys.BEFORE_SCORING.clear()
    run_grpo(settings(world, output, run__resume_from_checkpoint="last", **changes))
    expected, actual = exported(whole / "final"), exported(output / "final")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    # a bad video counts when it is met ahead of its update, which the uninterrupted run had none of
    actual_rows, expected_rows = ([{**row, "bad_samples": 0} for row in metrics_of(run)] for run in (output, whole))
    assert actual_rows == expected_rows
    actual_rows, expected_rows = (
        [{**row, "video": Path(row["video"]).name} for row in read_rows(run / "rollouts.jsonl")]
        for run in (output, whole)
    )
    assert actual_rows == expected_rows


def assert_saved_and_named(error: BaseException, output: Path, step: int) -> None:
    checkpoint = find_last_checkpoint(output)
    assert checkpoint.name == f"step-{step:06d}"
    assert f"Update {step} is saved in {checkpoint}: {RESUME}" in str(error)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [checkpoint.name]


def place_due_first_in(update: int) -> int:
    """A sample that no earlier update (from 1) holds."""
    order = SampleOrder(6, prompts_per_update=4, seed=42, max_steps=4)
    earlier = {index for number in range(update - 1) for index in order.indices(number)}
    return next(index for index in order.indices(update - 1) if index not in earlier)


def test_bad_video_of_a_later_update(world: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    index, output = place_due_first_in(2), tmp_path / "run"
    (tmp_path / "world" / f"{index}.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError, match=rf"questions\.jsonl:{index + 1}.*{index}\.mp4") as caught:
        run_grpo(settings(tmp_path / "world", output, data__eval_file=str(world / "questions.jsonl")))
    assert_saved_and_named(caught.value, output, 1)
    assert_goes_on_like(whole, world, output, run__allow_changed=("model.path", "data.video_root"))


def test_bad_video_of_the_evaluation_which_is_repeated(world: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world" / "5.mp4").write_bytes(b"not a video")
    evaluation = {"data__eval_file": str(tmp_path / "world" / "questions.jsonl")}
    output, elsewhere = tmp_path / "run", {"data__eval_video_root": str(tmp_path / "world")}
    with pytest.raises(DataError, match=r"5\.mp4") as caught:
        run_grpo(settings(world, output, **evaluation, **elsewhere))
    assert_saved_and_named(caught.value, output, 2)
    assert [row["step"] for row in read_rows(output / "metrics.jsonl")] == [1]
    assert_goes_on_like(whole, world, output)


def test_reward_that_raises(world: Path, whole: Path, tmp_path: Path, before_scoring: Any) -> None:
    before_scoring(lambda update: 1 / (update - 3))
    with pytest.raises(RewardError, match="ZeroDivisionError") as caught:
        run_grpo(settings(world, tmp_path))
    assert_saved_and_named(caught.value, tmp_path, 2)
    assert_goes_on_like(whole, world, tmp_path)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_non_finite_gradient(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_scoring: Any, stage: int
) -> None:
    updates: list[int] = []
    before_scoring(updates.append)
    compute_loss = fastr1.training.grpo.compute_loss

    def explode(*args: Any, **kwargs: Any) -> Any:
        out = compute_loss(*args, **kwargs)
        return out._replace(loss=out.loss * torch.nan) if updates[-1] == 2 else out

    zero, same_stage = {"deepspeed": {"zero_optimization": {"stage": stage}}}, whole
    if stage in (0, 3):  # which round otherwise
        same_stage = tmp_path / "whole"
        run_grpo(settings(world, same_stage, **zero))
    trainer_toys.hooked_reward.update = 0
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(fastr1.training.grpo, "compute_loss", explode)
        with pytest.raises(NonFiniteGradientError, match="not applied") as caught:
            run_grpo(settings(world, output, **zero))
    assert_saved_and_named(caught.value, output, 1)
    assert_goes_on_like(same_stage, world, output, **zero)


@pytest.mark.parametrize("stage", [0, 1])
def test_non_finite_gradient_after_a_step_of_the_same_update(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_scoring: Any, stage: int
) -> None:
    """What is in memory is no update then: the second one was half applied."""
    losses: list[int] = []
    compute_loss = fastr1.training.grpo.compute_loss

    def explode(*args: Any, **kwargs: Any) -> Any:
        out = compute_loss(*args, **kwargs)
        losses.append(1)
        return out._replace(loss=out.loss * torch.nan) if len(losses) == 4 else out

    monkeypatch.setattr(fastr1.training.grpo, "compute_loss", explode)
    twice = {"grpo__num_iterations": 2, "deepspeed": {"zero_optimization": {"stage": stage}}}
    with pytest.raises(NonFiniteGradientError, match=r"Update 1 could not be saved \(the next one is half done\)"):
        run_grpo(settings(world, tmp_path, **twice))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_error_of_a_library(
    world: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, before_scoring: Any
) -> None:
    def leave(update: int) -> None:
        if update == 4:
            raise MemoryError

    before_scoring(leave)
    with pytest.raises(RewardError, match="MemoryError") as caught:
        run_grpo(settings(world, tmp_path, run__save_steps=1, run__save_total_limit=1))
    assert_saved_and_named(caught.value, tmp_path, 3)  # which was there already
    assert_goes_on_like(whole, world, tmp_path)


@pytest.fixture
def small_files() -> Iterator[Callable[[bool], None]]:
    """Files of more than 50 kB cannot be written, as on a full disk, while this is on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if on else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_and_names_the_checkpoint_before(
    world: Path, whole: Path, tmp_path: Path, before_scoring: Any, small_files: Any
) -> None:
    before_scoring(lambda update: small_files(update == 3))
    with pytest.raises(DiskError, match=r"cannot write .*step-000003\.partial/.*: File too large; free") as caught:
        run_grpo(settings(world, tmp_path, run__save_steps=1, run__save_total_limit=1))
    small_files(False)
    checkpoint = find_last_checkpoint(tmp_path)
    assert checkpoint.name == "step-000002"
    assert f"the last complete checkpoint is {checkpoint}: {RESUME}" in str(caught.value)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000002"]
    assert_goes_on_like(whole, world, tmp_path)


@pytest.mark.slow
def test_full_disk_while_the_model_is_exported(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        assert path.is_dir()  # the export has made it
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("fastr1.training.export.save_model", full)
        with pytest.raises(DiskError, match=r"final\.partial: No space left on device") as caught:
            run_grpo(settings(world, tmp_path))
    assert_saved_and_named(caught.value, tmp_path, 4)
    assert not (tmp_path / "final").exists()
    assert_goes_on_like(whole, world, tmp_path)


@pytest.mark.slow
def test_error_inside_an_update_saves_nothing_of_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(torch.optim.AdamW):
        def step(self, *args: Any) -> Any:
            raise RuntimeError("half-way")

    monkeypatch.setattr(torch.optim, "AdamW", Interrupted)
    with pytest.raises(RuntimeError, match="half-way"):
        run_grpo(settings(world, tmp_path))
    assert "No update was finished: start again with the same command" in caplog.text
    assert not (tmp_path / "checkpoints").exists()


def test_run_gone_on_with_elsewhere_names_no_checkpoint_that_its_folder_lacks(
    world: Path, tmp_path: Path, before_scoring: Any
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_grpo(settings(world, first, optim__max_steps=2, run__save_steps=2))
    taken = first / "checkpoints" / "step-000002"
    trainer_toys.hooked_reward.update = 0
    changes = {"run__resume_from_checkpoint": str(taken), "run__eval_steps": 0}
    before_scoring(lambda update: 1 / (update - 1))
    with pytest.raises(RewardError) as caught:
        run_grpo(settings(world, second, **changes))
    assert str(caught.value).endswith(f"Update 2 is saved in {taken}: {SAME_COMMAND}")
    trainer_toys.hooked_reward.update = -1
    with pytest.raises(RewardError) as caught:
        run_grpo(settings(world, second, **changes))
    assert_saved_and_named(caught.value, second, 3)


def test_run_that_finished_no_update_leaves_its_folder_to_the_same_command(
    world: Path, whole: Path, tmp_path: Path, before_scoring: Any
) -> None:
    before_scoring(lambda update: 1 / (update - 1))
    with pytest.raises(RewardError, match="No update was finished: start again with the same command"):
        run_grpo(settings(world, tmp_path, run__report_to=("jsonl", "tensorboard")))
    trainer_toys.BEFORE_SCORING.clear()
    run_grpo(settings(world, tmp_path))
    assert metrics_of(tmp_path) == metrics_of(whole)


@pytest.mark.parametrize(
    "update", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_stop_in_update_or_evaluation(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_scoring: Any, update: int
) -> None:
    """In the third update; in the evaluations after the second and the fourth, which are repeated."""
    stop, answer = StopRequest(), Evaluator.answer

    def interrupted(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        if trainer_toys.hooked_reward.update == update:
            stop.request("asked")
        return answer(self, *args, **kwargs)

    before_scoring(lambda number: stop.request("asked") if number == update == 3 else None)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "answer", interrupted)
        checkpoint = run_grpo(settings(world, tmp_path), stop)
    assert checkpoint == find_last_checkpoint(tmp_path)
    assert checkpoint.name == f"step-{update:06d}"
    assert not (tmp_path / "final").exists()
    assert_goes_on_like(whole, world, tmp_path)


def test_checkpoints_by_the_clock(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = iter(range(0, 1000, 4))
    monkeypatch.setattr(fastr1.training.keeper, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    run_grpo(settings(world, tmp_path / "never", run__save_minutes=0.0, optim__max_steps=2))
    assert not (tmp_path / "never" / "checkpoints").exists()
    run_grpo(settings(world, tmp_path / "at times", run__save_minutes=7.0, run__save_total_limit=9))
    saved = [path.name for path in (tmp_path / "at times" / "checkpoints").iterdir()]
    assert sorted(saved) == ["step-000002", "step-000004"]


def test_refusal_says_what_to_type(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "my run"
    shutil.copytree(whole, run)
    (tmp_path / "my run-2").mkdir()
    expected = (
        f"{run} holds an earlier run (metrics.jsonl, rollouts.jsonl, final): add --set run.output_dir='{run}-3' to the "
        f"command to keep it, or remove it first: rm -r '{run}'"
    )
    with pytest.raises(DataError) as caught:
        refuse_used_folder(run)
    assert str(caught.value) == expected


def test_refusal_offers_to_go_on_where_that_is_possible(world: Path, tmp_path: Path, before_scoring: Any) -> None:
    before_scoring(lambda update: 1 / (update - 3))
    with pytest.raises(RewardError):
        run_grpo(settings(world, tmp_path))
    last = "or --set run.resume_from_checkpoint=last to go on with it from step-000002"
    with pytest.raises(DataError, match=last):
        refuse_used_folder(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(DataError, match=r"rollouts\.jsonl\): add (?!.*last).*rm -r"):
        refuse_used_folder(tmp_path)
    with pytest.raises(CheckpointError):
        find_last_checkpoint(tmp_path)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_two_runs_at_once_do_not_share_a_folder(
    world: Path, tmp_path: Path, before_scoring: Any, is_resumed: bool
) -> None:
    alone: Any = SimpleNamespace(rank=0, world_size=1)

    def second_run(update: int) -> None:
        with holding_folder(alone, tmp_path, is_resumed=is_resumed):
            pass

    before_scoring(second_run)
    # the reward function raises what the hook does
    with pytest.raises(RewardError, match=rf"another run is writing {tmp_path} \(process {os.getpid()} on "):
        run_grpo(settings(world, tmp_path))
    second_run(1)  # the first one has ended


def test_run_that_came_and_went_during_the_checks_is_kept(world: Path, tmp_path: Path) -> None:
    with prepare_grpo(settings(world, tmp_path)) as run:
        (tmp_path / "final").mkdir()
        with pytest.raises(DataError, match=r"holds an earlier run \(final\)"):
            run.train(lambda update: pytest.fail("an update in the folder of another run"))
