"""The group resampler: 16 chunks of patch tokens, each read by the same few learned latents.

z ← z + Attention(LN(z), [LN(chunk); LN(z)]);  z ← z + MLP(LN(z));  three such layers, a final LN, then a fixed
sinusoidal table over the concatenated outputs, the only carrier of order. The chunks are independent, so they run as
one batch. Parameter names are those of the released checkpoints. Source: TinyLLaVA-Video, arXiv 2501.15513.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NUM_HEADS = 8
HEAD_DIM = 64
FEED_FORWARD_MULTIPLIER = 4


class ResamplerAttention(nn.Module):
    """Latents attend to the media tokens and to themselves; 8 heads of 64."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = NUM_HEADS * HEAD_DIM
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        media: torch.Tensor,  # (C, N, D)
        latents: torch.Tensor,  # (C, K, D)
        mask: torch.Tensor | None,  # (C, 1, 1, N + K) bool, True = attend; None: every token is real
    ) -> torch.Tensor:  # (C, K, D)
        latents = self.norm_latents(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([self.norm_media(media), latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GroupResampler(nn.Module):
    """Patch features (V, N, vision_dim) → visual tokens (V, num_queries, dim)."""

    latents: nn.Parameter

    def __init__(self, vision_dim: int, dim: int, *, num_queries: int, group: int, num_layers: int) -> None:
        super().__init__()
        if num_queries % group:
            raise ValueError(f"num_queries={num_queries} must be a multiple of group={group}")
        self.group = group
        self.latents = nn.Parameter(torch.randn(num_queries // group, dim) * dim**-0.5)
        self.linear = nn.Linear(vision_dim, dim)
        hidden = dim * FEED_FORWARD_MULTIPLIER
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    ResamplerAttention(dim),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(hidden, dim, bias=False),
                    ),
                ]
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        num_videos = features.shape[0]
        media, mask = split_into_chunks(self.linear(features), self.group, num_latents=self.latents.shape[0])
        latents = self.latents.expand(media.shape[0], -1, -1)
        layers: list[Any] = list(self.layers)
        for attention, feed_forward in layers:
            latents = latents + attention(media, latents, mask)
            latents = latents + feed_forward(latents)
        tokens = self.norm(latents).reshape(num_videos, -1, latents.shape[-1])
        table = sinusoidal_table(tokens.shape[1], tokens.shape[2], device=tokens.device)
        return tokens + table.to(tokens.dtype)


def chunk_sizes(num_tokens: int, group: int) -> list[int]:
    """⌊N/g⌋ tokens per chunk, the first N mod g chunks one more."""
    base, extra = divmod(num_tokens, group)
    return [base + 1] * extra + [base] * (group - extra)


def split_into_chunks(
    tokens: torch.Tensor,  # (V, N, D)
    group: int,
    *,
    num_latents: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Contiguous chunks as one batch (V·group, ⌈N/group⌉, D), with a mask over chunk + latents where sizes differ."""
    num_videos, num_tokens, dim = tokens.shape
    sizes = chunk_sizes(num_tokens, group)
    if sizes[-1] == 0:
        raise ValueError(f"{num_tokens} patch tokens cannot fill {group} groups; use more frames")
    if sizes[0] == sizes[-1]:
        return tokens.reshape(num_videos * group, sizes[0], dim), None
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    padded = tokens.new_zeros(num_videos, group, sizes[0], dim)
    mask = torch.ones(group, sizes[0] + num_latents, dtype=torch.bool, device=tokens.device)
    for i, (start, end) in enumerate(pairwise(starts)):
        padded[:, i, : end - start] = tokens[:, start:end]
        mask[i, end - start : sizes[0]] = False
    return padded.flatten(0, 1), mask.repeat(num_videos, 1)[:, None, None, :]


def sinusoidal_table(num_positions: int, dim: int, *, device: torch.device | None = None) -> torch.Tensor:
    """(num_positions, dim): even columns sin, odd cos, frequency 10000^(−2i/dim); computed in fp32, stored in fp16."""
    position = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10000.0) / dim))
    table = torch.empty(num_positions, dim, dtype=torch.float32, device=device)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table.half()
