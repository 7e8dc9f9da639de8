"""Packed attention on any CUDA device and in float32: torch's memory-efficient kernel for dense batches.

The kernel wants as many heads of keys as of queries: it is called once for every query head of a group, on views.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastr1.models.packed_backends.batches import batches
from fastr1.models.packed_backends.tensors import Inputs, Outputs
from fastr1.models.packed_layout import Part

HEAD_DIM_MULTIPLE = 8
_LSE_MULTIPLE = 32  # the kernel reads rows of log-sum-exps padded to this length
_forward = torch.ops.aten._efficient_attention_forward
_backward = torch.ops.aten._efficient_attention_backward


def forward(inputs: Inputs, part: Part, scale: float) -> Outputs:
    query, key, value = inputs
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    group = query.shape[1] // key.shape[1]
    for batch in batches(part, query.device):
        k, v = batch.keys(key), batch.keys(value)
        for head in range(group):
            q = batch.queries(query[:, head::group])
            seen, seen_lse, *_ = _forward(
                q, k, v, None, None, None, None, None, 0.0, int(part.is_causal), True, scale=scale
            )
            batch.put_queries(output[:, head::group], seen)
            batch.put_queries(lse[:, head::group], seen_lse[..., : q.shape[1]].transpose(1, 2))
    return Outputs(output, lse.t())


def backward(grad_output: torch.Tensor, inputs: Inputs, outputs: Outputs, part: Part, scale: float) -> Inputs:
    query, key, value = inputs
    output, lse = outputs
    grads = inputs.empty_like()
    group = query.shape[1] // key.shape[1]
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # the seed of a dropout that is not there
    for batch in batches(part, query.device):
        k, v = batch.keys(key), batch.keys(value)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for head in range(group):
            g, q, o = (batch.queries(x[:, head::group]) for x in (grad_output, query, output))
            m = batch.queries(lse.t()[:, head::group]).transpose(1, 2)
            m = F.pad(m, (0, -m.shape[-1] % _LSE_MULTIPLE), value=float("inf")).contiguous()
            lengths = q.shape[1], k.shape[1]
            shares = _backward(
                g,
                q,
                k,
                v,
                None,
                o,
                None,
                None,
                *lengths,
                m,
                0.0,
                unused,
                unused,
                int(part.is_causal),
                False,
                scale=scale,
            )
            batch.put_queries(grads.query[:, head::group], shares[0])
            grad_k += shares[1]
            grad_v += shares[2]
        batch.put_keys(grads.key, grad_k)
        batch.put_keys(grads.value, grad_v)
    return grads
