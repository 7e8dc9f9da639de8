"""Log-probabilities of a linear head, a chunk of rows at a time, in plain torch on every device.

The logits of one chunk exist at a time; the backward pass computes them again. With C rows per chunk the extra memory
is a few C·V buffers, plus V·D in float32 where the head is trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

# One float32 buffer of 1,024 rows and 151,936 columns is 0.6 GB; scoring a chunk holds a handful of them.
DEFAULT_CHUNK_SIZE = 1024


def chunked_linear_logps(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    token_ids: Tensor,  # (N,) int64
    head: tuple[float | None, float, float],  # softcap, logit_scale, temperature
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """`linear_logps` of checked arguments: logps and entropy, both (N,)."""
    return _LinearLogps.apply(hidden, weight, bias, token_ids, head, chunk_size or DEFAULT_CHUNK_SIZE)


class _LinearLogps(torch.autograd.Function):
    """Rows (N, D) to logps and entropy (N,), one chunk of logits at a time in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        head: tuple[float | None, float, float],
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logps)
        for rows in _chunks(len(hidden), chunk):
            logits = _product(hidden[rows], weight, bias)
            logps[rows], entropy[rows] = _score(logits, token_ids[rows], *head)
        ctx.save_for_backward(hidden, weight, bias, token_ids)
        ctx.head, ctx.chunk = head, chunk
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # torch's own guard drops the second derivative silently where the upstream gradient is a constant.
            raise RuntimeError("linear_logps and linear_grpo_loss are differentiable once: leave create_graph=True out")
        hidden, weight, bias, token_ids = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sum_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=sum_dtype) if needs_bias else None
        for rows in _chunks(len(hidden), ctx.chunk):
            logits = _product(hidden[rows], weight, bias).requires_grad_()
            with torch.enable_grad():
                outputs = _score(logits, token_ids[rows], *ctx.head)
            upstream = [(y, d[rows]) for y, d in zip(outputs, (d_logps, d_entropy), strict=True) if d is not None]
            if not upstream:
                break
            values, d_values = zip(*upstream, strict=True)
            (d_logits,) = torch.autograd.grad(values, logits, d_values)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight.addmm_(d_logits.T.to(sum_dtype), hidden[rows].to(sum_dtype))
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=sum_dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Autocast is switched off so that the backward pass, which runs outside it, repeats the same product.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden, weight, bias)


def _score(
    logits: Tensor, token_ids: Tensor, softcap: float | None, logit_scale: float, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = reference.shape_logits(logits, softcap, logit_scale)
    return reference.selective_log_softmax(logits, token_ids, temperature)
