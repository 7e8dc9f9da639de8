"""The two passes over one row of logits: device functions of `gpu.rows` and `gpu.loss_kernel`.

Pass 1. For a row x of V logits, temperature τ, token y: k = log2(e)/τ, m = max xⱼ, dⱼ = (xⱼ - m)·k and
    S = Σ 2^dⱼ    U = Σ 2^dⱼ·dⱼ    log pⱼ = (dⱼ - log2 S)·ln 2    H = (log2 S - U/S)·ln 2.
The row is read once, in blocks. Every lane, the logits of a block that one thread holds, keeps its own (m, S, U), so
that no thread waits for another within the row; if a lane's maximum rises by -c/k, then S ← 2ᶜ·S and U ← 2ᶜ·(U + c·S).
At the end the lanes are merged in the same way. The maximum is subtracted before the factor k, which makes a shift of
the logits exact.

Pass 2. With g = ∂L/∂logp and h = ∂L/∂H of the row: ∂L/∂xⱼ = [g·(δⱼᵧ - pⱼ) - h·pⱼ·(log pⱼ + H)]/τ. m, log2 S and H are
kept from the first pass; p is computed again from x. The row is walked backwards, because its end is what the cache
still holds.

Both are bound by instructions as much as by memory, so a logit costs few: it is widened, bounded from below where its
entropy is summed (-1e30 instead of -inf: 0·(-1e30) is 0, nothing has to be tested for -inf, and NaN stays), compared
with its lane's maximum, and goes through one exp2; the ragged last block is apart from the loop, the token's column
apart from the others. tests/losses/test_aot_rows.py holds the counts. A thread loads 16 bytes at a time where rows
start at multiples of 16 bytes (WIDTH), one logit at a time elsewhere.

A row without a logit above -1e30 has no distribution: its scores and gradients are NaN. A token id outside the row is
never read; its log-probability is -inf.

Sources: the online normaliser of arXiv 1805.02867; the entropy recurrence and both gradients are derived above.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Logits below count as -inf: with a finite value 0·x is 0, and no row needs a test for -inf.
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LANE = tl.constexpr(16)  # logits of a block that share a running maximum: those of one thread
NARROW_LANE = tl.constexpr(8)  # where a load moves one logit, and 16 of them would take too many registers


@triton.jit
def row_base(pointer, i_n, T, stride_b, stride_t, WIDTH: tl.constexpr):
    """Address of row i_n of a (B, T, V) tensor; i_n and the strides have 64 bits."""
    address = pointer + ((i_n // T) * stride_b + (i_n % T) * stride_t)
    return tl.multiple_of(address, 16) if WIDTH > 1 else address


@triton.jit
def lane_columns(WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a block, (·, lanes, ·): the SIZE of a lane lie side by side as far as one load reaches, then apart."""
    LANES: tl.constexpr = BLOCK // SIZE
    o_v = tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return o_v + tl.arange(0, SIZE // WIDTH)[:, None, None] * (LANES * WIDTH)


@triton.jit
def add_block(x, top, b_sum, b_moment, scale, HAS_ENTROPY: tl.constexpr):
    """(m, S, U) of the lanes after one more block x of logits, (·, lanes, ·) float32."""
    if HAS_ENTROPY:
        x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    new_top = tl.maximum(top, tl.max(tl.max(x, 2), 0))
    shift = (top - new_top) * scale
    weight = tl.exp2(shift)
    d = (x - new_top[None, :, None]) * scale
    e = tl.exp2(d)
    if HAS_ENTROPY:
        b_moment = weight * (b_moment + shift * b_sum) + tl.sum(tl.sum(e * d, 2), 0)
    return new_top, weight * b_sum + tl.sum(tl.sum(e, 2), 0), b_moment


@triton.jit
def score_row(
    x_ptr, stride_v, token, V, temperature, HAS_ENTROPY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """(m, log2 S, logp, H, logit of the token) of the row at x_ptr. H is 0 without HAS_ENTROPY."""
    scale = LOG2_E / temperature
    # Before the barriers of the sums below: in place, other warps overwrite this logit once they have passed them.
    x_token = tl.load(x_ptr + token * stride_v, mask=(token >= 0) & (token < V), other=float("-inf")).to(tl.float32)
    SIZE: tl.constexpr = LANE if WIDTH > 1 else NARROW_LANE
    LANES: tl.constexpr = BLOCK // SIZE
    o_v = lane_columns(WIDTH, SIZE, BLOCK)
    o_x = o_v.to(tl.int64) * stride_v
    top = tl.full((LANES,), LOWEST, tl.float32)
    b_sum = tl.zeros((LANES,), tl.float32)
    b_moment = tl.zeros((LANES,), tl.float32)
    whole = V // BLOCK * BLOCK
    step = tl.cast(BLOCK, tl.int64) * stride_v
    for _ in range(0, whole, BLOCK):
        x = tl.load(x_ptr + o_x).to(tl.float32)
        top, b_sum, b_moment = add_block(x, top, b_sum, b_moment, scale, HAS_ENTROPY)
        x_ptr += step
    if whole < V:
        x = tl.load(x_ptr + o_x, mask=o_v < V - whole, other=float("-inf")).to(tl.float32)
        top, b_sum, b_moment = add_block(x, top, b_sum, b_moment, scale, HAS_ENTROPY)
    row_top = tl.max(top, 0)
    shift = (top - row_top) * scale
    weight = tl.exp2(shift)
    total = tl.sum(weight * b_sum, 0)
    total = tl.where(row_top > LOWEST, total, float("nan"))  # of -inf alone: no distribution
    log2_sum = tl.log2(total)
    logp = ((x_token - row_top) * scale - log2_sum) * LN_2
    entropy = 0.0
    if HAS_ENTROPY:
        entropy = (log2_sum - tl.sum(weight * (b_moment + shift * b_sum), 0) / total) * LN_2
    return row_top, log2_sum, logp, entropy, x_token


@triton.jit
def column_gradient(x, d_logp, d_entropy, row_top, log2_sum, entropy, scale, HAS_ENTROPY: tl.constexpr):
    """-(g + h·(log p + H))·p of logits x, float32; g = d_logp and h = d_entropy are divided by τ already."""
    if HAS_ENTROPY:
        x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    log2_p = (x - row_top) * scale - log2_sum
    factor = 0.0 - d_logp
    if HAS_ENTROPY:
        factor = (factor - d_entropy * entropy) - d_entropy * LN_2 * log2_p
    return factor * tl.exp2(log2_p)


@triton.jit
def write_row_gradient(
    x_ptr,
    stride_v,
    d_ptr,
    d_stride_v,
    token,
    x_token,
    d_logp,
    d_entropy,
    row_top,
    log2_sum,
    entropy,
    V,
    temperature,
    HAS_ENTROPY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ∂L/∂x of one row to d_ptr, which may be x_ptr: each block is read before it is written.

    The token's column is written again at the end, so that no other column has to be compared with it.
    """
    scale = LOG2_E / temperature
    d_logp, d_entropy = d_logp / temperature, d_entropy / temperature
    token_ptr = d_ptr + token * d_stride_v
    SIZE: tl.constexpr = LANE if WIDTH > 1 else NARROW_LANE
    LANES: tl.constexpr = BLOCK // SIZE
    lane_entropy = d_entropy
    if HAS_ENTROPY:
        # A number of every lane stays in a register of its own; an operation takes one that all threads share, not two.
        lane_entropy = tl.where(tl.arange(0, LANES) < V, d_entropy, 0.0)[None, :, None]
    whole = V // BLOCK * BLOCK
    x_row, d_row = x_ptr, d_ptr
    x_ptr += tl.cast(whole, tl.int64) * stride_v
    d_ptr += tl.cast(whole, tl.int64) * d_stride_v
    if WIDTH > 1:
        x_ptr, d_ptr = tl.multiple_of(x_ptr, 16), tl.multiple_of(d_ptr, 16)
    o_v = lane_columns(WIDTH, SIZE, BLOCK)
    o_x, o_d = o_v.to(tl.int64) * stride_v, o_v.to(tl.int64) * d_stride_v
    if whole < V:
        m_v = o_v < V - whole
        x = tl.load(x_ptr + o_x, mask=m_v, other=float("-inf")).to(tl.float32)
        d = column_gradient(x, d_logp, lane_entropy, row_top, log2_sum, entropy, scale, HAS_ENTROPY)
        tl.store(d_ptr + o_d, d.to(d_ptr.dtype.element_ty), mask=m_v)
    step = tl.cast(BLOCK, tl.int64)
    for start in range(0, whole, BLOCK):
        if WIDTH > 1:
            x_ptr -= step * stride_v
            d_ptr -= step * d_stride_v
        else:  # the compiler keeps fewer addresses this way
            back = tl.cast(whole - BLOCK - start, tl.int64)
            x_ptr, d_ptr = x_row + back * stride_v, d_row + back * d_stride_v
        x = tl.load(x_ptr + o_x).to(tl.float32)
        d = column_gradient(x, d_logp, lane_entropy, row_top, log2_sum, entropy, scale, HAS_ENTROPY)
        tl.store(d_ptr + o_d, d.to(d_ptr.dtype.element_ty))
    tl.debug_barrier()  # the thread that wrote this column need not be the one that writes it now
    d = d_logp + column_gradient(x_token, d_logp, d_entropy, row_top, log2_sum, entropy, scale, HAS_ENTROPY)
    tl.store(token_ptr, d.to(d_ptr.dtype.element_ty), mask=(token >= 0) & (token < V))


@triton.jit
def write_row_zeros(d_ptr, d_stride_v, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), d_ptr.dtype.element_ty)
        tl.store(d_ptr + o_v.to(tl.int64) * d_stride_v, zeros, mask=o_v < V)
