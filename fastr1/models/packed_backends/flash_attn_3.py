"""Packed attention with flash-attn 3: CUDA of compute capability 9.x, half precision.

Arguments go by position up to the last that its releases have in the same place.
"""

from __future__ import annotations

import torch

from fastr1.models.packed_backends.tensors import Inputs, Outputs
from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 8


def forward(inputs: Inputs, part: Part, scale: float) -> Outputs:
    from flash_attn_interface import _flash_attn_forward

    # New keys and values, a value-like query and an output to write into; then a third row of segments and two of used
    # lengths; then pages, cache rows, left padding, rotary tables and 8-bit scales.
    output, lse, *_ = _flash_attn_forward(
        *(*inputs, None, None, None, None),
        *(*part.cu_seqlens(inputs.query.device), None, None, None, part.max_query_length, part.max_key_length),
        *[None] * 9,
        scale,
        part.is_causal,
    )
    return Outputs(output, lse)


def backward(grad_output: torch.Tensor, inputs: Inputs, outputs: Outputs, part: Part, scale: float) -> Inputs:
    from flash_attn_interface import _flash_attn_backward

    grads = inputs.empty_like()
    _flash_attn_backward(
        *(grad_output.contiguous(), *inputs, outputs.output, outputs.lse.contiguous()),
        *(*part.cu_seqlens(inputs.query.device), None, None, part.max_query_length, part.max_key_length),
        *grads,
        scale,
        part.is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads
