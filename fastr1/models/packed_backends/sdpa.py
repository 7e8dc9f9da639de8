"""Packed attention on a CPU: torch's flash kernel for dense batches, which shares keys among query heads by itself."""

from __future__ import annotations

import torch

from fastr1.models.packed_backends.batches import batches
from fastr1.models.packed_backends.tensors import Inputs, Outputs
from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 1
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(inputs: Inputs, part: Part, scale: float) -> Outputs:
    query, key, value = inputs
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    for batch in batches(part, query.device):
        q, k, v = (x.transpose(1, 2) for x in (batch.queries(query), batch.keys(key), batch.keys(value)))
        seen, seen_lse = _forward(q, k, v, 0.0, part.is_causal, scale=scale)
        batch.put_queries(output, seen.transpose(1, 2))
        batch.put_queries(lse, seen_lse.transpose(1, 2))
    return Outputs(output, lse.t())


def backward(grad_output: torch.Tensor, inputs: Inputs, outputs: Outputs, part: Part, scale: float) -> Inputs:
    grads = inputs.empty_like()
    for batch in batches(part, grad_output.device):
        given = (grad_output, *inputs, outputs.output, outputs.lse.t())
        takes = (batch.queries, batch.queries, batch.keys, batch.keys, batch.queries, batch.queries)
        g, q, k, v, o, m = (take(x).transpose(1, 2) for take, x in zip(takes, given, strict=True))
        shares = _backward(g, q, k, v, o, m, 0.0, part.is_causal, scale=scale)
        for put, grad, share in zip((batch.put_queries, batch.put_keys, batch.put_keys), grads, shares, strict=True):
            put(grad, share.transpose(1, 2))
    return grads
