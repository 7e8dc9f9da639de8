"""Packed attention with flash-attn 3: CUDA of compute capability 9.x, half precision.

Arguments go by position up to the last that its releases have in the same place.
"""

from __future__ import annotations

import torch

from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 8


def forward(
    query: torch.Tensor,  # (Tq, H, d)
    key: torch.Tensor,  # (Tk, Hkv, d)
    value: torch.Tensor,  # (Tk, Hkv, d)
    part: Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # (Tq, H, d), (H, Tq)
    """Output and log-sum-exp of one part."""
    from flash_attn_interface import _flash_attn_forward

    # New keys and values, a value-like query and an output to write into; then a third row of segments and two of used
    # lengths; then pages, cache rows, left padding, rotary tables and 8-bit scales.
    output, lse, *_ = _flash_attn_forward(
        *(query, key, value, None, None, None, None),
        *(*part.cu_seqlens(query.device), None, None, None, part.max_query_length, part.max_key_length),
        *[None] * 9,
        scale,
        part.is_causal,
    )
    return output, lse


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    part: Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This part's share of the gradients of query, key and value."""
    from flash_attn_interface import _flash_attn_backward

    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    _flash_attn_backward(
        *(grad_output.contiguous(), query, key, value, output, lse.contiguous()),
        *(*part.cu_seqlens(query.device), None, None, part.max_query_length, part.max_key_length),
        *grads,
        scale,
        part.is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads[0], grads[1], grads[2]
