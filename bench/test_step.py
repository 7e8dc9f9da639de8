"""How long does an update take, and its phases: packed and shared as it is, with one of these left out, as it was, as
the original does it, and in TRL?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Call, Group, Outputs
from torch import Tensor
from update_judge import UpdateGroup, judge_reference, judge_update
from update_passes import (
    logps_before,
    logps_packed,
    loss_of_logits,
    see,
    train_before,
    train_packed,
    train_padded,
    train_unshared,
)
from update_shapes import LEFT_OUT, UpdateCase, stated_targets
from update_steps import encode, update_before, update_original, update_packed
from update_trl import make_trainer, update_trl
from update_work import ClipFiles, Work, copy_model, draw_work, make_model

Videos = list[Tensor]  # features


def training(compute: Callable[[Work, Videos], float]) -> Callable[[Work], Call]:
    """Loss and gradients from the features of the tower; the connector is part of it."""

    def make(work: Work) -> Call:
        features = [encode(work.model, video) for video in work.videos]

        def call() -> Outputs:
            work.forget_gradients()
            loss = compute(work, features)
            return {"loss": torch.tensor(loss), **work.gradients()}

        return call

    return make


def scoring(compute: Callable[[Work, Videos], Tensor]) -> Callable[[Work], Call]:
    """Log-probabilities of the reference from the features of the tower."""

    def make(work: Work) -> Call:
        features = [encode(work.model, video) for video in work.videos]
        return lambda: {"logps": compute(work, features)}

    return make


@torch.no_grad()
def score_packed(work: Work, features: Videos) -> Tensor:
    assert work.reference is not None
    return logps_packed(work, list(work.reference.visual_tokens(features)))


def updating(compute: Callable[[Work], float]) -> Callable[[Work], Call]:
    """Everything, from clips or pixels; `work.phases_ms` says of the last call how long each phase took."""

    def make(work: Work) -> Call:
        work.optimizer = torch.optim.AdamW(work.trained.values(), lr=0.0, weight_decay=0.0, fused=True)

        def call() -> Outputs:
            work.forget_gradients()
            work.phases_ms.clear()
            loss = compute(work)
            return {"loss": torch.tensor(loss), **work.gradients()}

        return call

    return make


def trl(work: Work) -> Call:
    trainer = make_trainer(work)

    def call() -> Outputs:
        work.forget_gradients()
        work.phases_ms.clear()
        loss = update_trl(work, trainer)
        return {"loss": torch.tensor(loss), **work.gradients()}

    return call


OPS = {
    "train": {
        "ours": training(lambda work, features: train_packed(work, see(work, features))),
        "ours, whole logits": training(lambda work, features: train_packed(work, see(work, features), loss_of_logits)),
        "ours, prompts not shared": training(lambda work, features: train_unshared(work, see(work, features))),
        "ours, padded, not shared": training(lambda work, features: train_padded(work, see(work, features))),
        "before": training(train_before),
    },
    "reference": {"ours": scoring(score_packed), "before": scoring(logps_before)},
    "update": {
        "ours": updating(update_packed),
        "before": updating(update_before),
        "original's schedule": updating(update_original),
        "TRL GRPOTrainer": trl,
    },
}


def set_up(case: UpdateCase) -> Group:
    model = make_model(case)
    clips = None
    if case.video_size is not None:
        clips = ClipFiles(case, model.config.vision.image_size, num_threads=8)  # type: ignore[attr-defined]
    work = draw_work(case, model, clips.take(case.num_prompts) if clips else None)
    work.clips = clips
    if case.beta:
        work.reference = copy_model(model)
    gold, scales = judge_reference(work) if case.op == "reference" else judge_update(work)
    return UpdateGroup(case, work, gold, scales, None, None)


def test_step(case: UpdateCase, provider: str, make: Any, run: Any, group: Group) -> None:
    if (case.name, provider) in LEFT_OUT:
        pytest.skip("left out")
    row = run(provider, make, rounds=2)
    if case.op == "update":
        row["phases_ms"] = dict(group.inputs.phases_ms)
    row.update(stated_targets(case, provider, row["median_ms"]))
