"""Packed attention with flash-attn 4: CUDA of compute capability 9.0 and later, half precision."""

from __future__ import annotations

from typing import Any

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
    from flash_attn.cute.interface import _flash_attn_fwd

    output, lse, *_ = _flash_attn_fwd(query, key, value, return_lse=True, **_options(query, part, scale))
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
    from flash_attn.cute.interface import _flash_attn_bwd

    grad_query, grad_key, grad_value, *_ = _flash_attn_bwd(
        *(query, key, value, output, grad_output.contiguous(), lse.contiguous()),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_options(query, part, scale),
    )
    return grad_query, grad_key, grad_value


def _options(query: torch.Tensor, part: Part, scale: float) -> dict[str, Any]:
    cu_seqlens_q, cu_seqlens_k = part.cu_seqlens(query.device)
    return {
        "softmax_scale": scale,
        "causal": part.is_causal,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": part.max_query_length,
        "max_seqlen_k": part.max_key_length,
    }
