"""Exact resume, atomic saves, pruning, and refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_toys import (
    OPTIM,
    ToyModel,
    full_parameters,
    make_batches,
    make_engine,
    run_on_two_ranks,
    token_loss,
    train,
)

from fastr1.config import OptimConfig
from fastr1.training.checkpoint import CheckpointError, find_last_checkpoint, load_checkpoint, save_checkpoint
from fastr1.training.distributed import DistributedModel


def train_with_noise(engine: DistributedModel, updates: range) -> None:
    """Updates whose losses depend on all three CPU random generators, so a resume that misses one diverges."""
    for update in updates:
        for ids, labels, frames in make_batches(update, (2, 2))[engine.rank :: engine.world_size]:
            noise = torch.rand(()) + random.random() + float(np.random.rand())
            engine.backward(token_loss(engine(ids, frames), labels) * noise)
        engine.step()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train_with_and_without_resume(output_dir: Path, stage: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Parameters after 4 updates, and after 2 updates, a save, a load into a fresh model and 2 more."""
    rank_seed = 5
    straight = make_engine(stage, dtype=dtype)
    seed_everything(rank_seed + straight.rank)
    train_with_noise(straight, range(4))
    expected = full_parameters(straight), straight.learning_rate
    straight.close()

    first = make_engine(stage, dtype=dtype)
    seed_everything(rank_seed + first.rank)
    train_with_noise(first, range(2))
    save_checkpoint(first, output_dir, 2, {"position": 20 + first.rank}, save_total_limit=2)
    first.close()

    seed_everything(999)
    resumed = make_engine(stage, dtype=dtype)
    step, trainer_state = load_checkpoint(resumed, "last", output_dir)
    assert step == 2
    assert trainer_state == {"position": 20 + resumed.rank}
    train_with_noise(resumed, range(2, 4))
    actual = full_parameters(resumed), resumed.learning_rate
    resumed.close()
    return expected, actual


def assert_identical(expected: Any, actual: Any) -> None:
    assert expected[1] == actual[1]
    for name, parameter in expected[0].items():
        assert torch.equal(parameter, actual[0][name]), name


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(stage, torch.float32) for stage in (0, 1, 2, 3)] + [(stage, torch.bfloat16) for stage in (1, 2, 3)],
)
def test_2_updates_resume_2_updates_equal_4(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    assert_identical(*train_with_and_without_resume(tmp_path, stage, dtype))


def _resume_on_two_ranks(rank: int, folder: Path) -> None:
    assert_identical(*train_with_and_without_resume(folder, 2, torch.float32))


def test_two_processes_resume_exactly_and_one_process_is_refused(tmp_path: Path) -> None:
    run_on_two_ranks(_resume_on_two_ranks, tmp_path)
    engine = make_engine(2)
    with pytest.raises(CheckpointError, match=r"number of processes\) was 2 and is 1 now"):
        load_checkpoint(engine, "last", tmp_path)
    engine.close()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of one checkpoint, of step 7."""
    engine = make_engine(1)
    train(engine, ((4,),))
    folder = save_checkpoint(engine, tmp_path, 7, {"epoch": 1}, save_total_limit=0)
    engine.close()
    return folder


def load_into(stage: int, folder: Path, **kwargs: Any) -> None:
    engine = make_engine(stage, **kwargs)
    try:
        load_checkpoint(engine, folder, folder.parent.parent)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("stage", "kwargs", "message"),
    [
        (2, {}, "zero_optimization.stage was 1 and is 2 now"),
        (1, {"dtype": torch.bfloat16}, "model.dtype was 'float32' and is 'bfloat16' now"),
    ],
)
def test_another_machinery_is_refused(saved: Path, stage: int, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_into(stage, saved, **kwargs)
    assert "allow_changed" not in str(refusal.value)  # it would not help


SETTINGS = {"optim.learning_rate": 0.01, "data.instruction": "Think.", "reward.functions": ["a", "b"], "old": None}


def test_settings_are_compared_by_name_and_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(1)
    train(engine, ((4,),))
    folder = save_checkpoint(engine, tmp_path, 7, {}, save_total_limit=0, settings=SETTINGS)

    def load(settings: dict[str, Any], allow_changed: tuple[str, ...] = ()) -> int:
        return load_checkpoint(engine, folder, tmp_path, settings=settings, allow_changed=allow_changed)[0]

    assert load(SETTINGS) == 7
    assert not caplog.records
    changed = {**SETTINGS, "optim.learning_rate": 0.5, "reward.functions": ["b", "a"], "new": 3}
    del changed["old"]
    with pytest.raises(CheckpointError) as refusal:
        load(changed)
    for part in (
        "optim.learning_rate was 0.01 and is 0.5 now",
        "reward.functions was ['a', 'b'] and is ['b', 'a'] now",
        "new was not recorded and is 3 now",
        "old was None and does not exist now",
        'run.allow_changed=["optim.learning_rate", "reward.functions", "new", "old"]',
    ):
        assert part in str(refusal.value)
    with pytest.raises(CheckpointError, match=r"exactly: new was not recorded and is 3 now\. Restore") as refusal:
        load(changed, ("optim.learning_rate", "reward.functions", "old"))
    assert 'run.allow_changed=["optim.learning_rate", "reward.functions", "old", "new"]' in str(refusal.value)
    assert load(changed, ("optim.learning_rate", "reward.functions", "old", "new")) == 7
    assert "optim.learning_rate was 0.01 and is 0.5 now" in caplog.text  # not in silence

    with pytest.raises(CheckpointError, match=r"'optim\.lerning_rate'.*did you mean 'optim\.learning_rate'\?"):
        load(SETTINGS, ("optim.lerning_rate",))
    with pytest.raises(CheckpointError, match=r"names 'model\.dtype', which cannot change"):
        load(SETTINGS, ("model.dtype",))
    engine.close()


def test_other_versions_of_libraries_are_logged(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = saved / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "versions": {**manifest["versions"], "torch": "1.0"}}))
    load_into(1, saved)
    assert f"but for rounding: torch was '1.0' and is '{torch.__version__}' now" in caplog.text


def test_a_manifest_of_another_version_is_refused(saved: Path) -> None:
    file = saved / "manifest.json"
    manifest = json.loads(file.read_text())
    for version in (1, None):
        file.write_text(json.dumps({**manifest, "version": version}))
        with pytest.raises(CheckpointError, match=rf"written by another version of fastr1 \(format {version}"):
            load_into(1, saved)


def train_plain_and_change(before: OptimConfig, after: OptimConfig) -> dict[str, torch.Tensor]:
    """The oracle: two updates of AdamW under `before`, two under `after`, without DeepSpeed."""
    model = ToyModel()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    for update in range(4):
        optim = before if update < 2 else after
        for ids, labels, frames in make_batches(update, (4,)):
            token_loss(model(ids, frames), labels).backward()
        torch.nn.utils.clip_grad_norm_(trainable, optim.max_grad_norm)
        optimizer.param_groups[0] |= {
            "lr": optim.learning_rate,
            "weight_decay": optim.weight_decay,
            "betas": (optim.adam_beta1, optim.adam_beta2),
            "eps": optim.adam_epsilon,
        }
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_changed_optimizer_settings_take_effect(tmp_path: Path, stage: int) -> None:
    """DeepSpeed would go on with those of the checkpoint and say nothing."""
    before = dataclasses.replace(OPTIM, lr_scheduler_type="constant", warmup_ratio=0.0)
    after = dataclasses.replace(
        before,
        learning_rate=3e-3,
        weight_decay=0.5,
        adam_beta1=0.7,
        adam_beta2=0.9,
        adam_epsilon=1e-3,
        max_grad_norm=0.1,
    )
    engine = make_engine(stage, optim=before)
    for update in range(2):
        for ids, labels, frames in make_batches(update, (4,)):
            engine.backward(token_loss(engine(ids, frames), labels))
        engine.step()
    save_checkpoint(engine, tmp_path, 2, {}, save_total_limit=0)
    engine.close()
    engine = make_engine(stage, optim=after)
    load_checkpoint(engine, "last", tmp_path)
    assert engine.learning_rate == after.learning_rate
    for update in range(2, 4):
        for ids, labels, frames in make_batches(update, (4,)):
            engine.backward(token_loss(engine(ids, frames), labels))
        engine.step()
    expected, unchanged = train_plain_and_change(before, after), train_plain_and_change(before, before)
    for name, value in full_parameters(engine).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    assert (unchanged["block.weight"] - expected["block.weight"]).abs().max() > 1e-3
    engine.close()


def test_every_truncated_or_missing_file_is_noticed(saved: Path) -> None:
    names = json.loads((saved / "manifest.json").read_text())["files"]
    assert "rank-00000.pt" in names
    assert any("optim_states" in name for name in names)
    engine = make_engine(1)
    for name in names:
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"damaged: {name}"):
            load_checkpoint(engine, saved, saved.parent.parent)
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match="0 bytes instead of"):
            load_checkpoint(engine, saved, saved.parent.parent)
        (saved / name).write_bytes(content)
    assert load_checkpoint(engine, saved, saved.parent.parent) == (7, {"epoch": 1})
    engine.close()


def test_missing_checkpoints_are_explained(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_into(1, saved.parent / "step-000008")
    for suffix in (".partial", ".removed"):  # complete, but a save or a removal was under way
        moved = saved.rename(saved.with_suffix(suffix))
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            find_last_checkpoint(tmp_path)
        moved.rename(saved)
    whole = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(whole[:20])  # what a power loss may leave
    with pytest.raises(CheckpointError, match="saving did not finish"):
        load_into(1, saved)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_last_checkpoint(tmp_path)
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="saving did not finish"):
        load_into(1, saved)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_last_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_last_checkpoint(tmp_path / "elsewhere")


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", "manifest.json")

    monkeypatch.setattr("fastr1.training.checkpoint.shutil.rmtree", refuse)
    engine = make_engine(1)
    for step in (8, 9):  # the second finds what the first has left
        folder = save_checkpoint(engine, saved.parent.parent, step, {}, save_total_limit=1)
        assert find_last_checkpoint(saved.parent.parent) == folder
    engine.close()
    first, second = (saved.parent / f"step-{step:06d}.removed" for step in (7, 8))
    reason = "cannot be removed: Permission denied"
    assert caplog.messages[0] == f"{first} {reason}"
    assert sorted(caplog.messages[1:]) == [f"{first} {reason}", f"{second} {reason}"]


@pytest.mark.parametrize("moment", ["engine", "rank file", "manifest"])
def test_a_crash_while_saving_leaves_the_previous_checkpoint_last(
    saved: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    output_dir = saved.parent.parent

    def crash(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    engine = make_engine(1)
    train(engine, ((4,),))
    with monkeypatch.context() as patch:
        if moment == "engine":
            patch.setattr(DistributedModel, "save", crash)
        elif moment == "rank file":
            patch.setattr("fastr1.training.checkpoint.random_state", crash)
        else:
            patch.setattr(Path, "write_text", crash)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(engine, output_dir, 8, {}, save_total_limit=1)
    assert find_last_checkpoint(output_dir) == saved
    assert not list(saved.parent.glob("step-000008*"))  # the room it takes may be needed

    newest = save_checkpoint(engine, output_dir, 8, {}, save_total_limit=1)
    engine.close()
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-000008"]
    assert find_last_checkpoint(output_dir) == newest


def test_pruning_keeps_the_most_recently_saved(tmp_path: Path) -> None:
    engine = make_engine(1)
    train(engine, ((4,),))

    def save(step: int, limit: int) -> list[str]:
        save_checkpoint(engine, tmp_path, step, {}, save_total_limit=limit)
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    assert save(10, 0) == ["step-000010"]
    assert save(20, 0) == ["step-000010", "step-000020"]
    assert save(30, 2) == ["step-000020", "step-000030"]
    # A run restarted from an earlier step: its checkpoints are newer than the abandoned ones of higher steps.
    assert save(15, 2) == ["step-000015", "step-000030"]
    assert find_last_checkpoint(tmp_path).name == "step-000015"
    assert save(15, 2) == ["step-000015", "step-000030"]
    assert save(16, 1) == ["step-000016"]
    with pytest.raises(CheckpointError, match="save_total_limit is -1"):
        save(17, -1)
    engine.close()
