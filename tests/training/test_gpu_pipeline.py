"""The toy model end to end on a GPU: both trainings, evaluation, checkpoint and resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_toys import NUM_SAMPLES, exported, make_config, metrics_of, write_world

from fastr1.config import TrainConfig
from fastr1.evaluation.chat import chat
from fastr1.evaluation.checkpoint import evaluate_checkpoint
from fastr1.evaluation.multiple_choice import CONTROLS
from fastr1.models import load_model
from fastr1.reporting.run_log import read_rows
from fastr1.training.grpo import run_grpo
from fastr1.training.sft import run_sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def config_of(world: Path, output: Path, task: str, dtype: str, **changes: Any) -> TrainConfig:
    """Four updates in which everything takes part: accumulation, a reference model, evaluation, checkpoints."""
    file = world / ("coldstart.json" if task == "sft" else "questions.jsonl")
    given = {
        "task": task,
        "model__dtype": dtype,
        "data__train_file": str(file),
        "data__eval_file": str(world / "questions.jsonl"),
        "data__num_frames": 4,
        "data__backend": "auto",
        "grpo__beta": 0.05,
        "optim__max_steps": 4,
        "optim__per_device_train_batch_size": 2,
        "optim__gradient_accumulation_steps": 2,
        "run__eval_steps": 2,
        "run__save_steps": 2,
    }
    return make_config(world, output, **{**given, **changes})


def run(config: TrainConfig) -> Path:
    return run_sft(config) if config.task == "sft" else run_grpo(config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_training_on_a_gpu(world: Path, tmp_path: Path, task: str, dtype: str) -> None:
    final = run(config_of(world, tmp_path, task, dtype))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert all(torch.tensor(float(row[name])).isfinite() for name in ("loss", "grad_norm", "num_tokens"))
        assert row["peak_memory_bytes"] > 0
    assert 0 <= rows[1]["eval/accuracy"] <= 1
    before, after = exported(world / "base"), exported(final)
    changed = [name for name, value in after.items() if not torch.equal(before[name].to(value.dtype), value)]
    assert changed
    assert not [name for name in changed if name.startswith("vision_tower")]
    assert load_model(final).device.type == "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_resume_on_a_gpu_goes_on_where_it_stopped(world: Path, tmp_path: Path, task: str, dtype: str) -> None:
    straight = config_of(world, tmp_path / "straight", task, dtype)
    expected = exported(run(straight))
    output = tmp_path / "resumed"
    run(config_of(world, output, task, dtype))
    checkpoint = output / "checkpoints" / "step-000002"
    again = config_of(world, output, task, dtype, run__resume_from_checkpoint=str(checkpoint))
    actual = exported(run(again))
    for name, value in expected.items():
        # Sums of a GPU may be added up in another order.
        torch.testing.assert_close(actual[name].float(), value.float(), rtol=0, atol=2e-3, msg=name)
    assert metrics_of(output)[-1]["step"] == metrics_of(tmp_path / "straight")[-1]["step"] == 4


@pytest.mark.parametrize("changes", [{"grpo__importance_sampling_level": "sequence"}, {"model__freeze": ()}])
def test_other_paths_of_grpo(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run(config_of(world, tmp_path, "grpo", "bfloat16", optim__max_steps=1, run__eval_steps=0, **changes))
    assert torch.tensor(metrics_of(tmp_path)[0]["loss"]).isfinite()


def test_gradient_checkpointing_and_zero_stages(world: Path, tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        config = config_of(world, tmp_path / str(stage), "grpo", "bfloat16", model__gradient_checkpointing=stage == 2)
        run(dataclasses.replace(config, deepspeed={"zero_optimization": {"stage": stage}}))
        assert torch.tensor(metrics_of(tmp_path / str(stage))[-1]["loss"]).isfinite()


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_evaluation_on_a_gpu(world: Path, control: Any) -> None:
    given = {"num_frames": 4, "max_completion_length": 6, "control": control}
    summary = evaluate_checkpoint(
        model_path=world / "base", data_file=world / "questions.jsonl", video_root=world, **given
    )
    assert summary["num_questions"] == NUM_SAMPLES


def test_chat_on_a_gpu(world: Path) -> None:
    answer = chat(world / "base", world / "0.mp4", "Which?", num_frames=4, max_completion_length=4, temperature=1.0)
    assert isinstance(answer.text, str)
