"""Packed attention with the ragged flash kernels inside torch: CUDA, half precision, nothing to install."""

from __future__ import annotations

import torch

from fastr1.models.packed_backends.tensors import Inputs, Outputs
from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 8
_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def forward(inputs: Inputs, part: Part, scale: float) -> Outputs:
    output, lse, *_ = _forward(*inputs, *part.segments(inputs.query.device), 0.0, part.is_causal, False, scale=scale)
    return Outputs(output, lse)


def backward(grad_output: torch.Tensor, inputs: Inputs, outputs: Outputs, part: Part, scale: float) -> Inputs:
    seed = torch.zeros(2, dtype=torch.uint64, device=grad_output.device)  # of a dropout that is not there
    given = (grad_output.contiguous(), *inputs, outputs.output, outputs.lse.contiguous())
    return Inputs(
        *_backward(
            *given,
            *part.segments(inputs.query.device),
            0.0,
            part.is_causal,
            seed,
            grad_output.new_empty(0),
            scale=scale,
        )
    )
