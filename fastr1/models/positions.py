"""Positions of prompts and of the completions behind them, from what a family says of its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from fastr1.models.packed_layout import PackedLayout

# `VideoLanguageModel.prompt_positions`: ids and number of tokens → (L,) or (3, L), and the first of a completion.
PromptPositions = Callable[[torch.Tensor, int], tuple[torch.Tensor, int]]


def packed_positions(
    prompt_positions: PromptPositions,
    prompt_ids: Sequence[torch.Tensor],  # B × (L_i,)
    layout: PackedLayout,  # of B prompts
    device: torch.device,
) -> torch.Tensor:
    """Positions of every token of the layout: (1, L), or (3, 1, L) where prompts have three axes."""
    pairs = zip(prompt_ids, layout.prompt_lengths, strict=True)
    found = [prompt_positions(ids, length) for ids, length in pairs]
    prompts = torch.cat([positions for positions, _ in found], dim=-1)
    behind = layout.positions(device)[0, layout.num_prompt_tokens :]  # counted on from the length of each prompt
    lengths = zip(found, layout.prompt_lengths, strict=True)
    shifts = [first - length for (_, first), length in lengths]
    if any(shifts):
        counts = torch.tensor([sum(group) for group in layout.completion_lengths])
        behind = behind + torch.tensor(shifts).repeat_interleave(counts).to(device)
    return torch.cat([prompts, behind.expand(*prompts.shape[:-1], -1)], dim=-1).unsqueeze(-2)


def padded_positions(
    prompt_positions: PromptPositions,
    prompt_ids: Sequence[torch.Tensor],  # B × (L_i,)
    prompt_mask: torch.Tensor,  # (B, P), left-padded
    num_new: int,
) -> torch.Tensor:
    """Positions of prompts and so many tokens behind each, 0 at the padding: (B, P + T), or (3, B, P + T)."""
    rows = []
    for ids, length in zip(prompt_ids, prompt_mask.sum(dim=1).tolist(), strict=True):
        positions, first = prompt_positions(ids, length)
        new = torch.arange(first, first + num_new, device=prompt_mask.device)
        row = torch.cat([positions, new.expand(*positions.shape[:-1], -1)], dim=-1)
        rows.append(F.pad(row, (prompt_mask.shape[1] - length, 0)))
    return torch.stack(rows, dim=-2)
