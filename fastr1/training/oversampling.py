"""Groups that nothing can be learned from, replaced by groups of further prompts. Source: DAPO, arXiv 2503.14476.

The further prompts are drawn at random from all samples, by seed, update and try: an update that is repeated after a
resume draws the same ones. They take no place in the order of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch.nn import functional as F

from fastr1.schema import Batch, Rollout, Scored

T = TypeVar("T")


def draw_places(
    num_samples: int, number: int, *, seed: int, step: int, attempt: int, prompts_per_update: int
) -> list[tuple[int, int]]:
    """(index of a sample, key of its draws) of `number` further prompts of all ranks, each sample at most once while
    there are enough. Keys are negative: those of the order are not."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + attempt) % 2**63)
    rounds = -(-number // num_samples)
    indices = torch.cat([torch.randperm(num_samples, generator=generator) for _ in range(rounds)])[:number].tolist()
    first = -1 - (step * 1_000 + attempt) * prompts_per_update
    return [(index, first - place) for place, index in enumerate(indices)]


def groups_with_signal(batch: Batch) -> list[bool]:
    """B; whether anything can be learned from a prompt's completions."""
    group = batch.num_generations
    return [any(batch.has_signal[i * group : (i + 1) * group]) for i in range(len(batch.samples))]


def choose_groups(has_signal: Sequence[bool], more_have: Sequence[bool]) -> list[int]:
    """Places among the prompts of both batches, one for each of the first: itself where it has a signal, else the next
    further one that has, else itself."""
    spare = [len(has_signal) + i for i, has in enumerate(more_have) if has]
    return [place if has or not spare else spare.pop(0) for place, has in enumerate(has_signal)]


def refill(batch: Batch, more: Batch, chosen: Sequence[int], pad_token_id: int) -> Batch:
    """The chosen groups of two batches, by their places among the prompts of both."""
    group = batch.num_generations
    rows = [place * group + g for place in chosen for g in range(group)]

    def prompts(name: str) -> list[T]:
        return pick([*getattr(batch, name), *getattr(more, name)], chosen)

    def completions(name: str) -> list[T]:
        return pick([*getattr(batch, name), *getattr(more, name)], rows)

    # The parts that a reward function returns may differ between calls; what has no value everywhere is left out.
    parts = {
        name: [*values, *more.scored.parts[name]]
        for name, values in batch.scored.parts.items()
        if name in more.scored.parts
    }
    return Batch(
        samples=prompts("samples"),
        prompt_ids=prompts("prompt_ids"),
        prompt_lengths=prompts("prompt_lengths"),
        pixel_shapes=prompts("pixel_shapes"),
        is_valid=prompts("is_valid"),
        rollout=_refill_rollout(batch.rollout, more.rollout, rows, pad_token_id),
        lengths=completions("lengths"),
        scored=Scored(
            pick([*batch.scored.rewards, *more.scored.rewards], rows),
            {name: pick(values, rows) for name, values in parts.items()},
        ),
        advantages=torch.cat([batch.advantages, more.advantages])[rows],
        is_counted=completions("is_counted"),
        has_signal=completions("has_signal"),
    )


def pick(values: Sequence[T], places: Sequence[int]) -> list[T]:
    return [values[place] for place in places]


def _refill_rollout(first: Rollout, second: Rollout, rows: list[int], pad_token_id: int) -> Rollout:
    width = max(first.completion_ids.shape[1], second.completion_ids.shape[1])

    def join(name: str, fill: float) -> torch.Tensor:
        both = [getattr(rollout, name) for rollout in (first, second)]
        return torch.cat([F.pad(x, (0, width - x.shape[1]), value=fill) for x in both])[rows]

    return Rollout(
        completion_ids=join("completion_ids", pad_token_id),
        completion_mask=join("completion_mask", False),
        sampler_logps=join("sampler_logps", 0.0),
        full_logps=join("full_logps", 0.0),
        is_truncated=torch.cat([first.is_truncated, second.is_truncated])[rows],
        texts=pick([*first.texts, *second.texts], rows),
    )
