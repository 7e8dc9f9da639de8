"""Packed attention with the ragged flash kernels inside torch: CUDA, half precision, nothing to install."""

from __future__ import annotations

import torch

from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 8
_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def forward(
    query: torch.Tensor,  # (Tq, H, d)
    key: torch.Tensor,  # (Tk, Hkv, d)
    value: torch.Tensor,  # (Tk, Hkv, d)
    part: Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # (Tq, H, d), (H, Tq)
    """Output and log-sum-exp of one part."""
    segments = (*part.cu_seqlens(query.device), part.max_query_length, part.max_key_length)
    output, lse, *_ = _forward(query, key, value, *segments, 0.0, part.is_causal, False, scale=scale)
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
    segments = (*part.cu_seqlens(query.device), part.max_query_length, part.max_key_length)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that is not there
    given = (grad_output.contiguous(), query, key, value, output, lse.contiguous())
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _backward(
        *given, *segments, 0.0, part.is_causal, seed, query.new_empty(0), scale=scale
    )
    return grads
