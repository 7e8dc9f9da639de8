"""Packed attention with flash-attn 4: CUDA of compute capability 9.0 and later, half precision."""

from __future__ import annotations

from typing import Any

import torch

from fastr1.models.packed_backends.tensors import Inputs, Outputs
from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 8


def forward(inputs: Inputs, part: Part, scale: float) -> Outputs:
    from flash_attn.cute.interface import _flash_attn_fwd

    output, lse, *_ = _flash_attn_fwd(*inputs, return_lse=True, **_options(inputs.query, part, scale))
    return Outputs(output, lse)


def backward(grad_output: torch.Tensor, inputs: Inputs, outputs: Outputs, part: Part, scale: float) -> Inputs:
    from flash_attn.cute.interface import _flash_attn_bwd

    grad_query, grad_key, grad_value, *_ = _flash_attn_bwd(
        *(*inputs, outputs.output, grad_output.contiguous(), outputs.lse.contiguous()),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_options(inputs.query, part, scale),
    )
    return Inputs(grad_query, grad_key, grad_value)


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
