"""Exact resume, atomic saves, pruning, and refusals."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_toys import OPTIM, full_parameters, make_batches, make_engine, run_on_two_ranks, token_loss, train

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
        (
            1,
            {"optim": dataclasses.replace(OPTIM, learning_rate=0.5)},
            r"optim\.learning_rate was 0\.01 and is 0\.5 now",
        ),
        (1, {"optim": dataclasses.replace(OPTIM, max_grad_norm=9.0)}, r"max_grad_norm was 0\.5 and is 9\.0 now"),
    ],
)
def test_other_settings_are_refused(saved: Path, stage: int, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_into(stage, saved, **kwargs)


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
