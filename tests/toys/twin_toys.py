"""Logits of completions, packed and padded, in one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastr1.models import VideoLanguageModel
from fastr1.training.packing import MicroBatch, pack_groups
from fastr1.training.passes import completion_states

Forward = Callable[
    [VideoLanguageModel, Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor
]


def padded_logits(
    model: VideoLanguageModel,
    prompts: Sequence[torch.Tensor],  # B × (L_i,)
    videos: Sequence[torch.Tensor],  # B × features or pixels
    completion_ids: torch.Tensor,  # (B·G, T)
    mask: torch.Tensor,  # (B·G, T)
) -> torch.Tensor:
    """The oracle: every completion a row of its own, (B·G, T, V)."""
    return model.padded_logits(prompts, model.visual_tokens(videos), completion_ids, mask)


def packed_logits(
    model: VideoLanguageModel,
    prompts: Sequence[torch.Tensor],
    videos: Sequence[torch.Tensor],
    completion_ids: torch.Tensor,
    mask: torch.Tensor,
    max_tokens: int = 10**6,
) -> torch.Tensor:
    """The same of the packed forward; zeros where the mask is False."""
    tokens = model.visual_tokens(videos)
    rows, width = completion_ids.shape
    out = torch.zeros(rows * width, model.layout.vocab_size, dtype=model.dtype, device=model.device)
    for micro_batch in pack(model, prompts, tokens, mask, max_tokens):
        places = micro_batch.places(width, completion_ids.device)
        states = completion_states(model, micro_batch, prompts, tokens, completion_ids)
        out = out.index_put((places,), model.project(states))
    return out.view(rows, width, -1)


def pack(
    model: VideoLanguageModel,
    prompts: Sequence[torch.Tensor],
    tokens: Sequence[torch.Tensor],  # B × (Q, D)
    mask: torch.Tensor,  # (B·G, T)
    max_tokens: int = 10**6,
) -> list[MicroBatch]:
    """Every completion in micro-batches."""
    lengths = mask.sum(dim=1).tolist()
    group = len(lengths) // len(prompts)
    groups = {i: range(i * group, (i + 1) * group) for i in range(len(prompts))}
    return pack_groups(model.prompt_lengths(prompts, tokens), groups, lengths, max_tokens)
