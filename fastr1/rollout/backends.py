"""What samples: the engine, with speculation or without, or the plain loop that is its oracle. All give the same
completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from fastr1.config import RolloutConfig
from fastr1.models import Processor, VideoLanguageModel
from fastr1.rollout.eager import sample_eagerly
from fastr1.rollout.engine import RolloutEngine
from fastr1.rollout.params import SamplingParams
from fastr1.rollout.speculation import SpeculativeEngine
from fastr1.schema import Rollout


class Sampler(Protocol):
    """Completions of one model, drawn in one way."""

    def __call__(
        self,
        prompt_ids: Sequence[torch.Tensor],  # B × (L_i,) int64 on the device of the model
        visual_tokens: Sequence[torch.Tensor],  # B × (Q, D), of `model.visual_tokens`
        *,
        num_generations: int = 1,
        seed: int = 0,
        prompt_keys: Sequence[int] | None = None,  # B ids that make draws independent of batching; default 0…B−1
    ) -> Rollout:
        """G completions for each prompt, rows in prompt-major order."""


def build_sampler(
    model: VideoLanguageModel,
    processor: Processor,
    params: SamplingParams,
    config: RolloutConfig = RolloutConfig(),  # noqa: B008 (frozen)
) -> Sampler:
    """What `rollout.backend` names. Raises UnknownDecoderError for a decoder that the engine does not compute."""
    if config.backend == "eager":
        return partial(sample_eagerly, model, processor, params=params)
    if config.num_speculative_tokens:
        number = config.num_speculative_tokens
        return SpeculativeEngine(model, processor, params, number, keeps_arenas=config.keep_arenas).sample
    return RolloutEngine(model, processor, params, keeps_arenas=config.keep_arenas).sample


def sample_completions(
    model: VideoLanguageModel,
    processor: Processor,
    prompt_ids: Sequence[torch.Tensor],
    visual_tokens: Sequence[torch.Tensor],
    params: SamplingParams,
    *,
    num_generations: int = 1,
    seed: int = 0,
    prompt_keys: Sequence[int] | None = None,
    config: RolloutConfig = RolloutConfig(),  # noqa: B008 (frozen)
) -> Rollout:
    """One rollout, as of `build_sampler`."""
    sampler = build_sampler(model, processor, params, config)
    return sampler(prompt_ids, visual_tokens, num_generations=num_generations, seed=seed, prompt_keys=prompt_keys)
