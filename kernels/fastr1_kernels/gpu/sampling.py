"""One token per row of logits: softmax sums and the largest of z + noise in one reading of the row.

For a row x, temperature T, k = log2(e)/T, m = max xⱼ, S = Σ 2^((xⱼ - m)·k):
    token = argmax over kept j of (xⱼ/T - ln 2 · log2 Eⱼ)    log p = ((x - m)·k - log2 S)·ln 2
with log2 E from `noise`. Where a column may be left out (`allowed`, a bound of `bounds`) m and S are kept twice, of all
and of the kept columns. Never materialised: noise, softmax, masks. Of a row of e-byte logits V·e bytes are read. A
bound costs one launch before, which walks the row several times.

A few rows would leave most of a GPU idle: their columns are shared out to several programs, and a second launch merges
what they found. A score does not depend on where its column was computed and ties go to the lowest column, so that the
token is the same; the sums differ by rounding. How often a row is split depends on R and V alone.

No values are read on the host, no shape depends on one: the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import device_of
from ..rows import as_grid
from ..truncation import Truncation
from .bounds import launch_bounds
from .noise import log2_exponential, noise_bits, row_words
from .row_passes import LANE, LN_2, LOG2_E, LOWEST, add_block, lane_columns, row_base
from .rows import grid_arguments, row_kernel, row_width

NO_COLUMN = tl.constexpr(2**31 - 1)
# Numbers that a program leaves of its part of a row: m and S of all and of the kept columns, the best score.
STATE = tl.constexpr(5)
MAX_SPLITS = tl.constexpr(32)
PROGRAMS = 264  # two for each multiprocessor of an H100


def launch_config(num_rows: int, vocabulary: int, width: int) -> dict[str, int]:
    """Block, warps, parts of a row and columns of each. Not tuned on a GPU yet: 16 logits a thread."""
    block = min(max(triton.next_power_of_2(vocabulary), 512), 4096)
    blocks = triton.cdiv(vocabulary, block)
    splits = min(triton.cdiv(PROGRAMS, num_rows), blocks, MAX_SPLITS.value)
    part = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, part)  # none is empty
    return {"BLOCK": block, "num_warps": block // 512, "WIDTH": width, "splits": splits, "part": part * block}


@triton.jit
def score_columns(x, columns, kept, k0, k1, inverse, HAS_NOISE: tl.constexpr):
    """z + noise, -inf where a column is not kept. -inf and NaN count as `LOWEST`: some kept column always wins."""
    z = tl.maximum(x * inverse, LOWEST)
    if HAS_NOISE:
        z = tl.fma(log2_exponential(noise_bits(columns, k0, k1)), -LN_2, z)
    return tl.where(kept, z, float("-inf"))


@triton.jit
def merge_sums(top, b_sum, scale):
    """(m, S) of lanes or of parts of a row."""
    row_top = tl.max(top, 0)
    return row_top, tl.sum(tl.exp2((top - row_top) * scale) * b_sum, 0)


@triton.jit
def log_p(x, top, total, scale):
    """log 2^((x - m)·k)/S; NaN where the row is nothing but -inf, which has no distribution."""
    return ((x - top) * scale - tl.log2(tl.where(top > LOWEST, total, float("nan")))) * LN_2


@triton.jit
def store_token(
    x_ptr, stride_v, tokens_ptr, logps_ptr, full_logps_ptr, i_r, column, scale, top, total, kept_top, kept_total
):
    token = tl.where(column == NO_COLUMN, 0, column).to(tl.int64)
    x = tl.load(x_ptr + token * stride_v).to(tl.float32)
    logp, full_logp = log_p(x, kept_top, kept_total, scale), log_p(x, top, total, scale)
    known = (logp == logp) & (full_logp == full_logp)
    tl.store(tokens_ptr + i_r, token)
    tl.store(logps_ptr + i_r, tl.where(known, logp, float("nan")))
    tl.store(full_logps_ptr + i_r, tl.where(known, full_logp, float("nan")))


@row_kernel
def draw_rows_kernel(
    logits_ptr,  # (R, 1, V)
    keys_ptr,  # (R,) int64
    positions_ptr,  # (R,) int64
    bounds_ptr,  # (R,) or None: what a kept logit is at least
    allowed_ptr,  # (V,) uint8 or None
    tokens_ptr,  # (R,) int64 out, as the two below; where a row is not split
    logps_ptr,
    full_logps_ptr,
    states_ptr,  # (R, splits, STATE) out, as the one below, where it is; else None
    columns_ptr,  # (R, splits) int32
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,
    temperature,
    splits,  # programs of a row
    part,  # columns of each
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) // splits
    i_s = tl.program_id(0) % splits
    IS_RESTRICTED: tl.constexpr = (bounds_ptr is not None) | (allowed_ptr is not None)
    row_ptr = row_base(logits_ptr, i_r, T, stride_b, stride_t, WIDTH)
    k0, k1 = row_words(tl.load(keys_ptr + i_r), tl.load(positions_ptr + i_r))
    bound = LOWEST
    if bounds_ptr is not None:
        bound = tl.load(bounds_ptr + i_r)
    scale, inverse = LOG2_E / temperature, 1.0 / temperature
    LANES: tl.constexpr = BLOCK // LANE
    o_v = lane_columns(WIDTH, LANE, BLOCK)
    top = tl.full((LANES,), LOWEST, tl.float32)
    b_sum = tl.zeros((LANES,), tl.float32)
    kept_top, kept_sum = top, b_sum
    best = tl.full(o_v.shape, float("-inf"), tl.float32)
    column = tl.full(o_v.shape, NO_COLUMN, tl.int32)
    for start in range(i_s * part, tl.minimum((i_s + 1) * part, V), BLOCK):
        o_c = start + o_v
        m_c = o_c < V
        x = tl.load(row_ptr + o_c.to(tl.int64) * stride_v, mask=m_c, other=float("-inf")).to(tl.float32)
        top, b_sum, _ = add_block(x, top, b_sum, b_sum, scale, False)
        kept = m_c
        if IS_RESTRICTED:
            kept = kept & (tl.maximum(x, LOWEST) >= bound)
            if allowed_ptr is not None:
                kept = kept & (tl.load(allowed_ptr + o_c, mask=m_c, other=0) != 0)
            x_kept = tl.where(kept, x, float("-inf"))
            kept_top, kept_sum, _ = add_block(x_kept, kept_top, kept_sum, kept_sum, scale, False)
        score = score_columns(x, o_c, kept, k0, k1, inverse, HAS_NOISE)
        column = tl.where(score > best, o_c, column)
        best = tl.maximum(score, best)
    row_best = tl.max(tl.max(tl.max(best, 2), 0), 0)
    column = tl.where(best == row_best, column, NO_COLUMN)
    row_column = tl.min(tl.min(tl.min(column, 2), 0), 0)
    row_top, total = merge_sums(top, b_sum, scale)
    row_kept_top, kept_total = row_top, total
    if IS_RESTRICTED:
        row_kept_top, kept_total = merge_sums(kept_top, kept_sum, scale)
    if states_ptr is None:
        store_token(
            row_ptr,
            stride_v,
            tokens_ptr,
            logps_ptr,
            full_logps_ptr,
            i_r,
            row_column,
            scale,
            row_top,
            total,
            row_kept_top,
            kept_total,
        )
    else:
        i_p = tl.program_id(0).to(tl.int64)
        state_ptr = states_ptr + i_p * STATE
        tl.store(state_ptr, row_top)
        tl.store(state_ptr + 1, total)
        tl.store(state_ptr + 2, row_kept_top)
        tl.store(state_ptr + 3, kept_total)
        tl.store(state_ptr + 4, row_best)
        tl.store(columns_ptr + i_p, row_column)


@row_kernel
def merge_parts_kernel(
    logits_ptr,  # (R, 1, V)
    states_ptr,  # (R, splits, STATE)
    columns_ptr,  # (R, splits) int32
    tokens_ptr,  # (R,) int64 out, as the two below
    logps_ptr,
    full_logps_ptr,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,
    temperature,
    splits,
):
    i_r = tl.program_id(0).to(tl.int64)
    scale = LOG2_E / temperature
    # Parts that a row does not have repeat its last one, and add nothing to the sums.
    o_s = tl.arange(0, MAX_SPLITS)
    o_p = i_r * splits + tl.minimum(o_s, splits - 1)
    state_ptr = states_ptr + o_p * STATE
    is_part = o_s < splits
    top, total = merge_sums(tl.load(state_ptr), tl.where(is_part, tl.load(state_ptr + 1), 0.0), scale)
    kept_top, kept_total = merge_sums(tl.load(state_ptr + 2), tl.where(is_part, tl.load(state_ptr + 3), 0.0), scale)
    best = tl.load(state_ptr + 4)
    column = tl.min(tl.where(best == tl.max(best, 0), tl.load(columns_ptr + o_p), NO_COLUMN), 0)
    row_ptr = row_base(logits_ptr, i_r, T, stride_b, stride_t, 1)
    store_token(
        row_ptr,
        stride_v,
        tokens_ptr,
        logps_ptr,
        full_logps_ptr,
        i_r,
        column,
        scale,
        top,
        total,
        kept_top,
        kept_total,
    )


def launch_sampling(
    logits: Tensor,  # (R, V)
    keys: Tensor,  # (R,) int64
    positions: Tensor,  # (R,) int64
    temperature: float,
    truncation: Truncation,
    allowed: Tensor | None,  # (V,) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, logps, full_logps, each (R,)."""
    n, vocabulary = logits.shape
    device = logits.device
    tokens = torch.empty(n, dtype=torch.int64, device=device)
    logps, full_logps = (torch.empty(n, device=device) for _ in range(2))
    if n == 0:
        return tokens, logps, full_logps
    grid = as_grid(logits)
    config = launch_config(n, vocabulary, row_width(grid))
    splits = config["splits"]
    allowed = None if allowed is None else allowed.contiguous().view(torch.uint8)
    heat = temperature or 1.0  # greedy: z is the logit
    shared = {"tokens_ptr": tokens, "logps_ptr": logps, "full_logps_ptr": full_logps, "temperature": heat}
    parts: dict[str, Tensor | None] = {"states_ptr": None, "columns_ptr": None}
    if splits > 1:
        parts = {
            "states_ptr": torch.empty(n, splits, STATE.value, device=device),
            "columns_ptr": torch.empty(n, splits, dtype=torch.int32, device=device),
        }
    with device_of(logits):
        is_greedy, bounds = temperature == 0, None
        if not (is_greedy or truncation.keeps_all):
            bounds = launch_bounds(grid, heat, truncation, allowed)
        draw_rows_kernel[(n * splits,)](
            logits_ptr=grid,
            keys_ptr=keys.contiguous(),
            positions_ptr=positions.contiguous(),
            bounds_ptr=bounds,
            allowed_ptr=allowed,
            **shared,
            **parts,
            **grid_arguments(grid),
            HAS_NOISE=not is_greedy,
            **config,
        )
        if splits > 1:
            merge_parts_kernel[(n,)](
                logits_ptr=grid, **shared, **parts, **grid_arguments(grid), splits=splits, num_warps=1
            )
    return tokens, logps, full_logps
