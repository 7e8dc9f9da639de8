"""Packed attention with torch's own fused kernels for dense batches: the flash kernel of the CPU, the memory-efficient
one of CUDA.

One call per run of neighbouring segments of equal lengths, on views. On the CPU keys and values are shared by their
query heads inside the kernel; the CUDA kernel knows no such sharing and is called once per query head of a group.
"""

from __future__ import annotations

import torch

from fastr1.models.packed_layout import Part, Run

_forward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    query: torch.Tensor,  # (Tq, H, d)
    key: torch.Tensor,  # (Tk, Hkv, d)
    value: torch.Tensor,  # (Tk, Hkv, d)
    part: Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # (Tq, H, d), (H, Tq)
    """Output and log-sum-exp of one part."""
    outputs, lses = [], []
    for run in part.runs:
        q, k, v = _batch(query, run, run.queries), _batch(key, run, run.keys), _batch(value, run, run.keys)
        output, lse = _forward_cpu(q, k, v, 0.0, part.is_causal, scale=scale)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    return _join(outputs), _join(lses).transpose(0, 1)


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
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for run in part.runs:
        spans = run.queries, run.keys, run.keys
        q, k, v = (_batch(x, run, span) for x, span in zip((query, key, value), spans, strict=True))
        g, o = _batch(grad_output, run, run.queries), _batch(output, run, run.queries)
        m = lse[:, run.queries].unflatten(1, (run.num_segments, -1)).transpose(0, 1)
        shares = _backward_cpu(g, q, k, v, o, m, 0.0, part.is_causal, scale=scale)
        for grad, share, span in zip(grads, shares, spans, strict=True):
            _batch(grad, run, span).copy_(share)
    return grads


def _batch(tokens: torch.Tensor, run: Run, span: slice) -> torch.Tensor:
    """(T, H, d) → the segments of a run: (num_segments, H, length, d), a view."""
    return tokens[span].unflatten(0, (run.num_segments, -1)).transpose(1, 2)


def _join(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
