"""Packed attention with flash-attn 2 (2.7 or later): CUDA of compute capability 8, 9, 10 and 12, half precision."""

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
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    segments = (*part.cu_seqlens(query.device), part.max_query_length, part.max_key_length)
    output, lse, *_ = _flash_attn_varlen_forward(query, key, value, *segments, 0.0, scale, part.is_causal)
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
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    given = (grad_output.contiguous(), query, key, value, output, lse.contiguous())
    segments = (*part.cu_seqlens(query.device), part.max_query_length, part.max_key_length)
    _flash_attn_varlen_backward(
        *given,
        *grads,
        *segments,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=part.is_causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads[0], grads[1], grads[2]
