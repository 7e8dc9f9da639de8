"""Whole updates: clips, tower, rollout, reference, gradients, optimizer; without rewards and without DeepSpeed.

In the rollout every completion ends at its own length; in that of before, which decoded all until the last had ended,
none does. Then the case's own completions take the place of those drawn, so that every provider computes the same
gradients. The optimizer is AdamW with a learning rate of 0, its moments in the dtype of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import harness
import torch
from harness import UnavailableError
from rollout_before import sample_before
from torch import Tensor
from update_passes import (
    logps_before,
    logps_packed,
    loss_arguments,
    padded,
    padded_states,
    see,
    train_before,
    train_packed,
)
from update_work import Work

from fastr1.config import RolloutConfig
from fastr1.config.fields import RolloutBackend
from fastr1.models import VideoLanguageModel
from fastr1.rollout import SamplingParams, eager, sample_completions, token_step
from fastr1.rollout.noise import completion_keys
from fastr1.schema import Rollout
from fastr1_kernels import grpo_loss
from fastr1_kernels.sampling import SampledTokens

# Completions end by their length alone.
ENDLESS: Any = SimpleNamespace(end_token_ids=(-1,), pad_token_id=0, decode=lambda ids: "")


def update_packed(work: Work) -> float:
    """As the trainer does it."""
    model, batch = work.model, work.batch
    pixels = work.load()
    with work.phase("vision"):
        features = [encode(model, video) for video in pixels]
        visual = see(work, features)
    ends = ending_at(batch.lengths, work.case.num_generations, model.layout.vocab_size - 1)
    with work.phase("rollout"), ends as processor:
        sample(model, batch.prompt_ids, visual.detached, max(batch.lengths), work.case.num_generations, processor)
    if work.reference is not None:
        with work.phase("reference"), torch.no_grad():
            # The reference's connector is the initial one.
            tokens = work.reference.visual_tokens(features) if visual.is_trained else visual.detached
            batch.ref_logps = logps_packed(work, tokens)
    with work.phase("train"):
        loss = train_packed(work, visual)
    return step(work, loss)


def update_before(work: Work) -> float:
    """As at commit 2c9de69: the tower once, the connector in every pass."""
    model, batch = work.model, work.batch
    pixels = work.load()
    with work.phase("vision"):
        features = [encode(model, video) for video in pixels]
    with work.phase("rollout"), torch.no_grad():
        tokens = see(work, features).detached
        sample_before(model.eval(), batch.prompt_ids, tokens, max(batch.lengths), work.case.num_generations)
        model.train()
    if work.reference is not None:
        with work.phase("reference"):
            batch.ref_logps = logps_before(work, features)
    with work.phase("train"):
        loss = train_before(work, features)
    return step(work, loss)


def update_original(work: Work) -> float:
    """The schedule of TinyLLaVA-Video-R1: one prompt after another, one completion after another; tower and connector
    once per completion in rollout, reference and policy pass; a row per completion; logits of all positions; eager
    attention."""
    if not work.videos:
        raise UnavailableError("asks about videos")
    batch, group = work.batch, work.case.num_generations
    pixels = work.load()
    total = 0.0
    batch.ref_logps = None if work.reference is None else torch.zeros_like(batch.rollout.sampler_logps)
    with eager_attention(work.model), eager_attention(work.reference):
        for prompt in range(work.case.num_prompts):
            video, rows = pixels[prompt : prompt + 1], slice(prompt * group, (prompt + 1) * group)
            with work.phase("rollout"):
                for length in batch.lengths[rows]:
                    with torch.no_grad():
                        tokens = see(work, [encode(work.model, v) for v in video]).detached
                    ids = batch.prompt_ids[prompt : prompt + 1]
                    sample(work.model, ids, tokens, length, 1, backend="eager")
            ids, mask = padded(work, rows)
            if work.reference is not None:
                with work.phase("reference"), torch.no_grad():
                    logits = original_logits(work, work.reference, prompt, video, ids, mask)
                    logps = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
                    batch.ref_logps[rows, : ids.shape[1]] = logps.masked_fill(~mask, 0.0)  # type: ignore[index]
            with work.phase("train"):
                logits = original_logits(work, work.model, prompt, video, ids, mask)
                out = grpo_loss(logits, ids, **loss_arguments(work, rows, mask))
                out.loss.backward()
                total += out.loss.item()
    return step(work, total)


def original_logits(
    work: Work, model: VideoLanguageModel, prompt: int, video: Sequence[Tensor], ids: Tensor, mask: Tensor
) -> Tensor:
    """Logits (G, T, V), a slice of those of all positions; the video goes through tower and connector for every row."""
    group = work.case.num_generations
    tokens: list[Tensor] = []
    for _ in range(group):
        tokens += model.visual_tokens([encode(model, v) for v in video])
    logits = model.project(padded_states(model, [work.batch.prompt_ids[prompt]] * group, tokens, ids, mask))
    return logits[:, -ids.shape[1] :]


@contextmanager
def eager_attention(model: VideoLanguageModel | None) -> Iterator[None]:
    """Tower and decoder compute their attention as written in transformers."""
    configs = [] if model is None else [model.config.text, model.config.vision]  # type: ignore[union-attr]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@torch.no_grad()
def encode(model: VideoLanguageModel, video: Tensor) -> Tensor:
    return model.encode(video)


def sample(
    model: VideoLanguageModel,
    prompt_ids: Sequence[Tensor],
    tokens: Sequence[Tensor],
    length: int,
    group: int,
    processor: Any = ENDLESS,
    backend: RolloutBackend = "engine",
) -> Rollout:
    """Completions of at most `length` tokens."""
    params, config = SamplingParams(length), RolloutConfig(backend=backend)
    rollout = sample_completions(
        model.eval(), processor, prompt_ids, tokens, params, num_generations=group, config=config
    )
    model.train()
    return rollout


@contextmanager
def ending_at(lengths: Sequence[int], group: int, end_id: int) -> Iterator[Any]:
    """A processor whose end token is drawn at these lengths, one for every row of a rollout, and nowhere else: by the
    eager loop and by the engine, if seed and keys are the default ones."""
    draw, sample_tokens = eager._draw, token_step.sample_tokens
    keys, ends = _forced_lengths(tuple(lengths), group, harness.device())

    def force(token: Tensor, row_keys: Tensor, positions: Tensor | int) -> Tensor:
        row = (row_keys[:, None] == keys.to(row_keys.device)).int().argmax(dim=1)
        is_last = ends.to(row.device)[row] == positions + 1
        return torch.where(is_last, end_id, torch.where(token == end_id, 0, token))

    def forced_draw(*given: Any) -> SampledTokens:
        drawn, (*_, row_keys, position) = draw(*given), given
        return drawn._replace(token_ids=force(drawn.token_ids, row_keys, position))

    def forced_tokens(logits: Tensor, row_keys: Tensor, positions: Tensor, **options: Any) -> SampledTokens:
        drawn = sample_tokens(logits, row_keys, positions, **options)
        return drawn._replace(token_ids=force(drawn.token_ids, row_keys, positions))

    eager._draw, token_step.sample_tokens = forced_draw, forced_tokens
    try:
        yield SimpleNamespace(end_token_ids=(end_id,), pad_token_id=0, decode=lambda ids: "")
    finally:
        eager._draw, token_step.sample_tokens = draw, sample_tokens


@lru_cache
def _forced_lengths(lengths: tuple[int, ...], group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys of the rows, and their lengths. Kept for good, because a captured step reads them where they are."""
    keys = completion_keys(0, range(len(lengths) // group), group)
    return keys.to(device), torch.tensor(lengths, device=device)


def step(work: Work, loss: float) -> float:
    assert work.optimizer is not None
    with work.phase("optimizer"):
        torch.nn.utils.clip_grad_norm_(work.trained.values(), 1e9)
        work.optimizer.step()
    return loss
