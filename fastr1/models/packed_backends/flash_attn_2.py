"""Packed attention with flash-attn 2 (2.7 or later): CUDA of compute capability 8, 9, 10 and 12, half precision."""

from __future__ import annotations

import torch

from fastr1.models.packed_backends.tensors import Inputs, Outputs
from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 8


def forward(inputs: Inputs, part: Part, scale: float) -> Outputs:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    output, lse, *_ = _flash_attn_varlen_forward(
        *inputs, *part.segments(inputs.query.device), 0.0, scale, part.is_causal
    )
    return Outputs(output, lse)


def backward(grad_output: torch.Tensor, inputs: Inputs, outputs: Outputs, part: Part, scale: float) -> Inputs:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = inputs.empty_like()
    given = (grad_output.contiguous(), *inputs, outputs.output, outputs.lse.contiguous())
    _flash_attn_varlen_backward(
        *given,
        *grads,
        *part.segments(inputs.query.device),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=part.is_causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads
