"""What an update does once per prompt, and several steps of the optimizer on one rollout, against a loop of its own."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from trainer_toys import exported, make_config, metrics_of, write_world
from twin_toys import padded_logits

import fastr1.training.updates
from fastr1.config import ConfigError, TrainConfig, loss_options
from fastr1.config.checks import check_config
from fastr1.models import VideoLanguageModel, load_model
from fastr1.models.tinyllava import TinyLlavaVideo
from fastr1.schema import Batch, DataError
from fastr1.training.distributed import DistributedModel
from fastr1.training.grpo import GRPOTrainer, run_grpo
from fastr1.training.loop import TrainingRun
from fastr1.training.sft import SftTrainer, run_sft
from fastr1.training.visual import VisualTokens
from fastr1_kernels import grpo_loss, selective_log_softmax

ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


# Once per prompt and update


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Videos that were decoded, encoded and connected by updates, and backward passes through the connector."""
    seen: Counter[str] = Counter()
    train = TrainingRun.train
    # what came before, the longest sample beside a blank video, is no part of an update
    monkeypatch.setattr(TrainingRun, "train", lambda self, step: seen.clear() or train(self, step))

    def count(owner: Any, name: str, videos: Any) -> None:
        original = getattr(owner, name)

        def counted(*args: Any) -> Any:
            seen[name] += videos(args)
            return original(*args)

        monkeypatch.setattr(owner, name, counted)

    count(fastr1.training.updates, "load_pixels", lambda args: 1)
    count(TinyLlavaVideo, "encode", lambda args: 1)
    count(TinyLlavaVideo, "connect", lambda args: len(args[1]))
    count(DistributedModel, "backward_from", lambda args: 1)
    return seen


@pytest.mark.parametrize("freeze", [("vision_tower",), ("vision_tower", "connector"), ()])
@pytest.mark.parametrize("budget", [8192, 150], ids=["one micro-batch", "several"])
def test_every_video_is_decoded_encoded_and_connected_once(
    world: Path, tmp_path: Path, seen: Counter[str], freeze: tuple[str, ...], budget: int
) -> None:
    changes = {"model__freeze": freeze, "optim__max_tokens_per_micro_batch": budget}
    run_grpo(make_config(world, tmp_path, optim__max_steps=1, **changes))
    num_backward = 0 if "connector" in freeze else 1
    assert seen == Counter(load_pixels=4, encode=4, connect=4, backward_from=num_backward)


@pytest.mark.parametrize(
    ("freeze", "encoded", "connected", "backward"),
    [
        (("vision_tower",), 4, 8, 2),
        (("vision_tower", "connector"), 4, 4, 0),
        ((), 8, 8, 2),
    ],
    ids=["frozen tower", "frozen tower and connector", "all trained"],
)
def test_further_steps_run_again_what_is_trained(
    world: Path,
    tmp_path: Path,
    seen: Counter[str],
    freeze: tuple[str, ...],
    encoded: int,
    connected: int,
    backward: int,
) -> None:
    run_grpo(make_config(world, tmp_path, optim__max_steps=1, grpo__num_iterations=2, model__freeze=freeze))
    assert seen == Counter(load_pixels=4, encode=encoded, connect=connected, backward_from=backward)


def test_reference_has_a_connector_of_its_own_where_that_is_trained(
    world: Path, tmp_path: Path, seen: Counter[str]
) -> None:
    run_grpo(make_config(world, tmp_path / "trained", optim__max_steps=1, grpo__beta=0.1))
    assert (seen["encode"], seen["connect"]) == (4, 8)
    seen.clear()
    frozen = {"model__freeze": ("vision_tower", "connector")}
    run_grpo(make_config(world, tmp_path / "frozen", optim__max_steps=1, grpo__beta=0.1, **frozen))
    assert (seen["encode"], seen["connect"]) == (4, 4)
    seen.clear()
    run_grpo(make_config(world, tmp_path / "tower", optim__max_steps=1, grpo__beta=0.1, model__freeze=()))
    assert (seen["encode"], seen["connect"]) == (8, 8)  # from the pixels: its tower is the initial one


# Several steps of the optimizer per rollout


class Kept:
    """The batch of an update, as it is before the first step of the optimizer."""

    batch: Batch
    videos: list[torch.Tensor]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    kept, original = Kept(), GRPOTrainer._optimize

    def keep(trainer: GRPOTrainer, batch: Batch, steps: Any, visual: VisualTokens) -> Any:
        kept.batch, kept.videos = batch, list(visual.videos)
        return original(trainer, batch, steps, visual)

    monkeypatch.setattr(GRPOTrainer, "_optimize", keep)
    return kept


def logps_of(model: VideoLanguageModel, kept: Kept, prompts: slice) -> torch.Tensor:
    """(rows, T) by the padded forward."""
    rows = slice(prompts.start * 3, prompts.stop * 3)
    rollout = kept.batch.rollout
    ids, mask = rollout.completion_ids[rows], rollout.completion_mask[rows]
    logits = padded_logits(model, kept.batch.prompt_ids[prompts], kept.videos[prompts], ids, mask)
    return selective_log_softmax(logits, ids)


def own_loop(config: TrainConfig, kept: Kept, parts: list[slice]) -> dict[str, torch.Tensor]:
    """Every step of the optimizer, written out: padded forward, whole logits, torch's AdamW."""
    model = load_model(config.model.path, device="cpu", dtype="float32")
    model.freeze(config.model.freeze)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optim.learning_rate, eps=config.optim.adam_epsilon, weight_decay=0)
    with torch.no_grad():
        old = logps_of(model, kept, slice(0, 4))
    batch = kept.batch
    for prompts in parts * config.grpo.num_iterations:
        rows = slice(prompts.start * 3, prompts.stop * 3)
        ids, mask = batch.rollout.completion_ids[rows], batch.rollout.completion_mask[rows]
        out = grpo_loss(
            padded_logits(model, batch.prompt_ids[prompts], kept.videos[prompts], ids, mask),
            ids,
            mask=mask,
            advantages=batch.advantages[rows],
            old_logps=old[rows],
            normalizer=float(mask.sum()),
            options=loss_options(config.grpo),
        )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        optimizer.step()
    return dict(model.state_dict())


SEVERAL = {
    "two iterations": ({"grpo__num_iterations": 2}, [slice(0, 4)]),
    "two halves": (
        {"optim__per_device_train_batch_size": 2, "grpo__steps_per_generation": 2},
        [slice(0, 2), slice(2, 4)],
    ),
    "two iterations of two halves in accumulated quarters": (
        {
            "optim__per_device_train_batch_size": 1,
            "optim__gradient_accumulation_steps": 2,
            "grpo__steps_per_generation": 4,
            "grpo__num_iterations": 2,
        },
        [slice(0, 2), slice(2, 4)],
    ),
}


@pytest.mark.parametrize("zero", [{"zero_optimization": {"stage": s}} for s in (1, 2)] + [ZERO_3], ids=["1", "2", "3"])
@pytest.mark.parametrize("name", SEVERAL)
def test_steps_on_one_rollout_are_those_of_a_plain_loop(
    world: Path, tmp_path: Path, kept: Kept, name: str, zero: dict[str, Any]
) -> None:
    changes, parts = SEVERAL[name]
    # Steps so large that the ratio leaves the bounds, which bites only with true old log-probabilities.
    large = {"optim__learning_rate": 5e-3, "grpo__epsilon": 0.05, "optim__max_steps": 1}
    config = make_config(world, tmp_path, deepspeed=zero, **large, **changes)
    actual = exported(run_grpo(config))
    expected = own_loop(config, kept, parts)
    before = exported(world / "base")
    assert max((actual[k] - before[k]).abs().max().item() for k in actual) > 5e-3
    for key, value in actual.items():
        assert_close(value, expected[key], atol=2e-5, rtol=0, msg=lambda text, k=key: f"{k}: {text}")
    (row,) = metrics_of(tmp_path)
    assert row["clip_low"] + row["clip_high"] > 0


@pytest.mark.parametrize("zero", [{"zero_optimization": {"stage": s}} for s in (1, 2)] + [ZERO_3], ids=["1", "2", "3"])
def test_step_without_signal_where_videos_alone_are_trained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: dict[str, Any]
) -> None:
    """The blank micro-batch of the second step is of a prompt whose video has a gradient in that step."""

    def rewards(completions: list[str], solutions: list[str], samples: Any) -> list[float]:
        return [float(i % 3 == 0) if i < 6 else 1.0 for i in range(len(completions))]  # of the first half alone

    monkeypatch.setattr("trainer_toys.vowel_reward", rewards)
    halves = {"optim__per_device_train_batch_size": 2, "grpo__steps_per_generation": 2}
    frozen = {"model__freeze": ("vision_tower", "language_model")}
    run_grpo(make_config(world, tmp_path, optim__max_steps=1, deepspeed=zero, **halves, **frozen))
    (row,) = metrics_of(tmp_path)
    assert row["groups_without_signal"] == 2
    assert row["grad_norm"] > 0


def test_schedule_counts_steps_of_the_optimizer(world: Path, tmp_path: Path) -> None:
    schedule = {"optim__lr_scheduler_type": "linear", "optim__max_steps": 2, "grpo__num_iterations": 2}
    run_grpo(make_config(world, tmp_path, **schedule))
    assert [row["learning_rate"] for row in metrics_of(tmp_path)] == pytest.approx([1e-3, 0.5e-3])


def test_one_step_keeps_no_old_log_probabilities(world: Path, tmp_path: Path, kept: Kept) -> None:
    run_grpo(make_config(world, tmp_path, optim__max_steps=1))
    assert kept.batch.old_logps is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grpo__steps_per_generation": 3, "optim__gradient_accumulation_steps": 2},
            r"steps_per_generation is 3; .* multiple of optim.gradient_accumulation_steps, 2",
        ),
        ({"grpo__num_iterations": 2, "grpo__loss_type": "tinyllava_video_r1"}, r"2 steps .* knows no older policy"),
        ({"grpo__max_num_gen_batches": 2, "grpo__beta": 0.1}, r"max_num_gen_batches=2 has no effect with grpo.beta"),
        ({"grpo__sampler_cap": 2.0}, r"grpo.sampler_cap is 2.0, which has no effect without grpo.sampler_correction"),
    ],
)
def test_contradictions_are_refused(world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(make_config(world, tmp_path, **changes))


# What is trained on, and what is reported


def test_groups_without_signal_are_counted_and_not_forwarded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    original = VideoLanguageModel.completion_states

    def states(model: Any, prompt_ids: Any, *args: Any) -> Any:
        rows.append(len(prompt_ids))
        return original(model, prompt_ids, *args)

    monkeypatch.setattr(VideoLanguageModel, "completion_states", states)

    def rewards(completions: list[str], solutions: list[str], samples: Any) -> list[float]:
        return [float(i % 3 == 0) if i < 6 else 1.0 for i in range(len(completions))]  # two groups of four differ

    monkeypatch.setattr("trainer_toys.vowel_reward", rewards)
    run_grpo(make_config(world, tmp_path / "without", optim__max_steps=1))
    assert rows == [2]
    assert metrics_of(tmp_path / "without")[0]["groups_without_signal"] == 2
    run_grpo(make_config(world, tmp_path / "with", optim__max_steps=1, grpo__entropy_coef=0.1))
    assert rows == [2, 4]
    assert metrics_of(tmp_path / "with")[0]["groups_without_signal"] == 0


@pytest.mark.parametrize("freeze", [("vision_tower",), ()])
@pytest.mark.parametrize("task", ["grpo", "sft"])
def test_sample_beyond_a_micro_batch_is_refused_before_the_first_update(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, freeze: tuple[str, ...]
) -> None:
    path, origin = tmp_path / "long.jsonl", r"long.jsonl:5"
    if task == "grpo":
        rows = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
        rows[4]["problem"] += " word" * 40
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path, origin = tmp_path / "long.json", r"long.json\[4\]"
        rows = json.loads((world / "coldstart.json").read_text())
        rows[4]["conversations"][1]["value"] += " word" * 40
        path.write_text(json.dumps(rows))

    def run(budget: int) -> None:
        data = {"data__train_file": str(path), "model__freeze": freeze}
        config = make_config(world, tmp_path / "run", task=task, optim__max_tokens_per_micro_batch=budget, **data)
        run_grpo(config) if task == "grpo" else run_sft(config)

    for trainer in (GRPOTrainer, SftTrainer):
        monkeypatch.setattr(trainer, "step", lambda self, update: pytest.fail("an update began"))
    with pytest.raises(DataError, match=rf"{origin}: a prompt of \d+ tokens .* set it to \d+ or more") as error:
        run(60)
    enough = int(re.findall(r"set it to (\d+)", str(error.value))[0])
    with pytest.raises(DataError, match=origin):
        run(enough - 1)
    with pytest.raises(pytest.fail.Exception, match="an update began"):
        run(enough)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grpo__top_k": 3},
        {"grpo__min_p": 0.5, "grpo__temperature": 0.7},
        {"grpo__top_k": 3, "grpo__max_num_gen_batches": 3, "grpo__num_generations": 2},  # some groups are replaced
    ],
)
@pytest.mark.parametrize("backend", ["engine", "eager"])
def test_sampler_and_trainer_are_compared_on_the_same_distribution(
    world: Path, tmp_path: Path, backend: str, changes: dict[str, Any]
) -> None:
    run_grpo(make_config(world, tmp_path, optim__max_steps=1, rollout__backend=backend, **changes))
    (row,) = metrics_of(tmp_path)
    assert (row["sampler_gap"], row["sampler_k3"]) == pytest.approx((0, 0), abs=1e-5)
    assert (row["sampler_ratio_max"], row["sampler_ess"]) == pytest.approx((1, 1), abs=1e-4)


def test_sampler_correction_changes_the_update_where_the_sampler_differs(world: Path, tmp_path: Path) -> None:
    updates = {}
    for name, changes in {"none": {}, "truncate": {"grpo__sampler_correction": "token_truncate"}}.items():
        updates[name] = exported(
            run_grpo(make_config(world, tmp_path / name, optim__max_steps=1, grpo__top_k=3, **changes))
        )
    (row,) = metrics_of(tmp_path / "truncate")
    assert 0 < row["sampler_weight"] < 1
    assert any(not torch.equal(updates["none"][key], value) for key, value in updates["truncate"].items())


def test_distance_to_the_limit_is_reported_for_every_phase(world: Path, tmp_path: Path) -> None:
    run_grpo(make_config(world, tmp_path, optim__max_steps=1, grpo__beta=0.1, run__roofline=True))
    (row,) = metrics_of(tmp_path)
    for name in ("vision", "rollout", "reference", "train", "optimizer", "step"):
        assert row[f"roofline/{name}"] > 0
    assert 0 < row["mfu/train"] < 1
    assert row["train_tokens_per_second"] > 0
    assert [
        name for name in row if name.endswith("rollout_tokens_per_second")
    ] == []  # rollout/ has it, roofline or not
    run_grpo(make_config(world, tmp_path / "without", optim__max_steps=1))
    assert not any(name.startswith(("roofline", "mfu")) for name in metrics_of(tmp_path / "without")[0])
