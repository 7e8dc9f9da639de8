"""Log-probability and entropy of one token per row of logits, and their gradient: the row kernels.

Forward. For a row x of V logits, temperature τ, token y: k = log2(e)/τ, m = max xⱼ, dⱼ = (xⱼ - m)·k and
    S = Σ 2^dⱼ    U = Σ 2^dⱼ·dⱼ    log pⱼ = (dⱼ - log2 S)·ln 2    H = (log2 S - U/S)·ln 2.
The row is read once, in blocks. Every lane of 8 columns keeps its own (m, S, U), so that no thread waits for another
within the row; if a lane's maximum rises by -c/k, then S ← 2ᶜ·S and U ← 2ᶜ·(U + c·S). At the end the lanes are
merged in the same way. The maximum is subtracted before the factor k, which makes a shift of the logits exact.

Backward. With g = ∂L/∂logp and h = ∂L/∂H of the row: ∂L/∂xⱼ = [g·(δⱼᵧ - pⱼ) - h·pⱼ·(log pⱼ + H)]/τ. m, log2 S and H are
kept from the forward pass, 12 bytes a row; p is computed again from x. The row is walked backwards, because its end is
what the cache still holds.

Never materialised: log-softmax, p, float32 copies of the logits. With e bytes a logit and N live rows,
- fewest bytes: N·V·e forward; 2·N·V·e backward (N·V·e of it the unavoidable result). A masked row is not read; its
  gradient is a written row of zeros;
- fewest FLOPs: about 8·N·V forward and 6·N·V backward, among them one exp2 per logit each: bound by memory, though at
  two bytes a logit the exp2 alone are a good part of the time on a GPU that computes 16 a clock and multiprocessor.

All sums are float32 in a fixed order without atomics: results are bit-identical from run to run. Columns past V count
as -inf. A token id outside the row is never read; its log-probability is -inf.

Sources: the online normaliser of arXiv 1805.02867; the entropy recurrence and both gradients are derived above.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import device_of

LANE = 8  # columns of a lane: one 16-byte load of half-precision logits


def row_launch_config(vocabulary: int) -> dict[str, int]:
    """Block and warps by vocabulary alone. Not tuned on a GPU yet: 16 logits a thread, far from spilling."""
    block = min(max(triton.next_power_of_2(vocabulary), 128), 8192)
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


@triton.jit
def row_base(pointer, i_n, T, stride_b, stride_t):
    """Address of row i_n of a (B, T, V) tensor, in 64 bits."""
    return pointer + (i_n // T) * stride_b + (i_n % T) * stride_t


@triton.jit
def block_columns(start, BLOCK: tl.constexpr):
    """Column numbers of a block, (BLOCK / 8, 8)."""
    return start + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def score_row(x_ptr, stride_v, token, V, scale, BLOCK: tl.constexpr):
    """(m, log2 S, logp, H) of the row at x_ptr; `scale` is log2(e)/τ."""
    top = tl.full((BLOCK // 8,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK // 8,), tl.float32)
    b_moment = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, V, BLOCK):
        o_v = block_columns(start, BLOCK)
        x = tl.load(x_ptr + o_v.to(tl.int64) * stride_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 1))
        # -inf - (-inf) would be NaN: an empty lane has nothing to rescale, a column of -inf no weight.
        shift = tl.where(top == float("-inf"), 0.0, (top - new_top) * scale)
        d = tl.where(x == float("-inf"), float("-inf"), (x - new_top[:, None]) * scale)
        e = tl.exp2(d)
        b_moment = tl.exp2(shift) * (b_moment + shift * b_sum) + tl.sum(tl.where(d == float("-inf"), 0.0, e * d), 1)
        b_sum = tl.exp2(shift) * b_sum + tl.sum(e, 1)
        top = new_top
    row_top = tl.max(top, 0)
    shift = tl.where(top == float("-inf"), 0.0, (top - row_top) * scale)
    moment = tl.sum(tl.exp2(shift) * (b_moment + shift * b_sum), 0)
    total = tl.sum(tl.exp2(shift) * b_sum, 0)
    log2_sum = tl.log2(total)
    inside = (token >= 0) & (token < V)
    x_token = tl.load(x_ptr + token * stride_v, mask=inside, other=float("-inf")).to(tl.float32)
    logp = ((x_token - row_top) * scale - log2_sum) * 0.6931471805599453
    return row_top, log2_sum, logp, (log2_sum - moment / total) * 0.6931471805599453


@triton.jit
def write_row_gradient(
    x_ptr,
    stride_v,
    d_ptr,
    d_stride_v,
    token,
    d_logp,
    d_entropy,
    row_top,
    log2_sum,
    entropy,
    V,
    temperature,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ∂L/∂x of one row to d_ptr, which may be x_ptr: each block is read before it is written."""
    scale = 1.4426950408889634 / temperature
    num_blocks = tl.cdiv(V, BLOCK)
    for i in range(0, num_blocks):
        o_v = block_columns((num_blocks - 1 - i) * BLOCK, BLOCK)
        m_v = o_v < V
        x = tl.load(x_ptr + o_v.to(tl.int64) * stride_v, mask=m_v, other=float("-inf")).to(tl.float32)
        log2_p = tl.where(x == float("-inf"), float("-inf"), (x - row_top) * scale - log2_sum)
        p = tl.exp2(log2_p)
        d = d_logp * (tl.where(o_v == token, 1.0, 0.0) - p)
        if HAS_ENTROPY:
            d -= d_entropy * tl.where(p == 0.0, 0.0, p * (log2_p * 0.6931471805599453 + entropy))
        tl.store(d_ptr + o_v.to(tl.int64) * d_stride_v, (d / temperature).to(d_ptr.dtype.element_ty), mask=m_v)


@triton.jit
def write_row_zeros(d_ptr, d_stride_v, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        o_v = block_columns(start, BLOCK)
        zeros = tl.zeros((BLOCK // 8, 8), d_ptr.dtype.element_ty)
        tl.store(d_ptr + o_v.to(tl.int64) * d_stride_v, zeros, mask=o_v < V)


@triton.jit(do_not_specialize=["T"])
def score_rows_kernel(
    logits_ptr,  # (B, T, V)
    token_ids_ptr,  # (N,), N = B·T
    mask_ptr,  # (N,) uint8 or None
    logps_ptr,  # (N,) out, as the three below; 0 in masked rows
    entropy_ptr,
    top_ptr,
    log2_sum_ptr,
    T,
    V,
    stride_b,
    stride_t,
    stride_v,
    temperature,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    row_top, log2_sum, logp, entropy = 0.0, 0.0, 0.0, 0.0
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + i_n) != 0
    if live:
        x_ptr = row_base(logits_ptr, i_n, T, stride_b, stride_t)
        token = tl.load(token_ids_ptr + i_n).to(tl.int64)
        row_top, log2_sum, logp, entropy = score_row(x_ptr, stride_v, token, V, 1.4426950408889634 / temperature, BLOCK)
    tl.store(top_ptr + i_n, row_top)
    tl.store(log2_sum_ptr + i_n, log2_sum)
    tl.store(logps_ptr + i_n, logp)
    tl.store(entropy_ptr + i_n, entropy)


@triton.jit(do_not_specialize=["T"])
def gradient_rows_kernel(
    logits_ptr,  # (B, T, V)
    d_logits_ptr,  # (B, T, V) out, may be logits_ptr
    token_ids_ptr,  # (N,)
    mask_ptr,  # (N,) uint8 or None
    d_logps_ptr,  # (N,)
    d_entropy_ptr,  # (N,) or None
    entropy_ptr,  # (N,)
    top_ptr,  # (N,)
    log2_sum_ptr,  # (N,)
    T,
    V,
    stride_b,
    stride_t,
    stride_v,
    d_stride_b,
    d_stride_t,
    d_stride_v,
    temperature,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    d_ptr = row_base(d_logits_ptr, i_n, T, d_stride_b, d_stride_t)
    d_logp = tl.load(d_logps_ptr + i_n)
    d_entropy = 0.0
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + i_n)
    # A NaN gradient is not zero: it must reach the result.
    live = (d_logp != 0.0) | (d_entropy != 0.0)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + i_n) != 0)
    if live:
        x_ptr = row_base(logits_ptr, i_n, T, stride_b, stride_t)
        token = tl.load(token_ids_ptr + i_n).to(tl.int64)
        row_top = tl.load(top_ptr + i_n)
        log2_sum = tl.load(log2_sum_ptr + i_n)
        entropy = tl.load(entropy_ptr + i_n)
        write_row_gradient(
            x_ptr,
            stride_v,
            d_ptr,
            d_stride_v,
            token,
            d_logp,
            d_entropy,
            row_top,
            log2_sum,
            entropy,
            V,
            temperature,
            d_entropy_ptr is not None,
            BLOCK,
        )
    else:
        write_row_zeros(d_ptr, d_stride_v, V, BLOCK)


@triton.jit(do_not_specialize=["T"])
def scale_rows_kernel(d_logits_ptr, d_loss_ptr, T, V, stride_b, stride_t, stride_v, BLOCK: tl.constexpr):
    """d_logits *= d_loss, without touching them where d_loss is 1."""
    scale = tl.load(d_loss_ptr).to(tl.float32)
    if scale != 1.0:
        d_ptr = row_base(d_logits_ptr, tl.program_id(0).to(tl.int64), T, stride_b, stride_t)
        for start in range(0, V, BLOCK):
            o_v = block_columns(start, BLOCK)
            b_ptr = d_ptr + o_v.to(tl.int64) * stride_v
            d = tl.load(b_ptr, mask=o_v < V).to(tl.float32)
            tl.store(b_ptr, (d * scale).to(d_ptr.dtype.element_ty), mask=o_v < V)


class _ScoreRows(torch.autograd.Function):
    """Logits (B, T, V) to logps and entropy (N,). With `inplace` the gradient takes the place of the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        logps, entropy, top, log2_sum = torch.empty(4, token_ids.numel(), device=logits.device).unbind()
        if token_ids.numel():
            with device_of(logits):
                score_rows_kernel[(token_ids.numel(),)](
                    logits_ptr=logits,
                    token_ids_ptr=token_ids,
                    mask_ptr=mask,
                    logps_ptr=logps,
                    entropy_ptr=entropy,
                    top_ptr=top,
                    log2_sum_ptr=log2_sum,
                    T=logits.shape[1],
                    V=logits.shape[2],
                    stride_b=logits.stride(0),
                    stride_t=logits.stride(1),
                    stride_v=logits.stride(2),
                    temperature=temperature,
                    **row_launch_config(logits.shape[2]),
                )
        ctx.save_for_backward(logits, token_ids, mask, entropy, top, log2_sum)
        ctx.temperature, ctx.inplace = temperature, inplace
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("log-probabilities of a kernel are differentiable once: leave create_graph=True out")
        logits, token_ids, mask, entropy, top, log2_sum = ctx.saved_tensors
        if d_logps is None and d_entropy is None:
            return None, None, None, None, None
        d_logps = torch.zeros_like(entropy) if d_logps is None else d_logps.contiguous()
        d_logits = logits if ctx.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if token_ids.numel():
            with device_of(logits):
                gradient_rows_kernel[(token_ids.numel(),)](
                    logits_ptr=logits,
                    d_logits_ptr=d_logits,
                    token_ids_ptr=token_ids,
                    mask_ptr=mask,
                    d_logps_ptr=d_logps,
                    d_entropy_ptr=None if d_entropy is None else d_entropy.contiguous(),
                    entropy_ptr=entropy,
                    top_ptr=top,
                    log2_sum_ptr=log2_sum,
                    T=logits.shape[1],
                    V=logits.shape[2],
                    stride_b=logits.stride(0),
                    stride_t=logits.stride(1),
                    stride_v=logits.stride(2),
                    d_stride_b=d_logits.stride(0),
                    d_stride_t=d_logits.stride(1),
                    d_stride_v=d_logits.stride(2),
                    temperature=ctx.temperature,
                    **row_launch_config(logits.shape[2]),
                )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return d_logits, None, None, None, None


def score_rows(
    logits: Tensor,  # (..., V), any strides
    token_ids: Tensor,  # (...,) integers
    mask: Tensor | None = None,  # (...,) bool; masked rows are not read and score 0
    *,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """logps and entropy, both (N,) float32, of checked arguments; differentiable once.

    With `inplace` the backward pass overwrites the logits with their gradient.
    """
    mask = None if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)
    ids = token_ids.reshape(-1).contiguous()
    return _ScoreRows.apply(as_grid(logits), ids, mask, float(temperature), inplace)


def as_grid(logits: Tensor) -> Tensor:
    """(..., V) as (B, T, V): a view of up to three axes, beyond that wherever the strides allow."""
    if logits.dim() > 3:
        return logits.reshape(-1, *logits.shape[-2:])
    return logits[None, None] if logits.dim() == 1 else logits[:, None] if logits.dim() == 2 else logits
