"""What a kept logit is at least, for top_k, top_p and min_p: one number per row, found without sorting.

Both searches ask for the largest v with weight({x >= v}) >= target, where a column weighs 1 (top_k) or 2^((x - m)·k)
(top_p). float32 numbers have the order of integers, so v is found by halving an interval of them twice per reading of
the row: three pivots at a time, 16 readings, 8 where the logits have 16 bits; from the second on the row is in the
cache. top_p starts where top_k ended. Sums are float32 in a fixed order, and a rounded sum of more terms is never
smaller, so the search cannot contradict itself.

One program per row, whatever R. `reference_sampling.kept_columns` is the specification.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..truncation import Truncation
from .row_passes import LANE, LOG2_E, LOWEST, lane_columns, row_base
from .rows import grid_arguments, row_kernel, row_width

NO_GAP = 3e38  # finite: of an infinite logit infinity must stay
ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # of a float32 that holds such a number


def launch_config(vocabulary: int, width: int) -> dict[str, int]:
    """Block and warps; a row has one program. Not tuned on a GPU yet: 16 logits a thread."""
    block = min(max(triton.next_power_of_2(vocabulary), 512), 8192)
    return {"BLOCK": block, "num_warps": block // 512, "WIDTH": width}


@triton.jit
def order_of(x, ZEROS: tl.constexpr):
    """Integers, int32, in the order of float32 numbers whose ZEROS last bits are 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> ZEROS


@triton.jit
def number_of(order, ZEROS: tl.constexpr):
    """The least float32 number of this order."""
    order = order << ZEROS
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_allowed(x_ptr, stride_v, allowed_ptr, o_v, V):
    """Logits of some columns, float32; `LOWEST` where they are -inf, NaN, not allowed or outside the row."""
    m_v = o_v < V
    x = tl.load(x_ptr + o_v.to(tl.int64) * stride_v, mask=m_v, other=float("-inf")).to(tl.float32)
    if allowed_ptr is not None:
        x = tl.where(tl.load(allowed_ptr + o_v, mask=m_v, other=0) != 0, x, float("-inf"))
    return tl.maximum(x, LOWEST)


@triton.jit
def weight_of(x, row_top, scale, BY_MASS: tl.constexpr):
    weight = tl.full(x.shape, 1.0, tl.float32)
    if BY_MASS:
        weight = tl.exp2((x - row_top) * scale)
    return weight


@triton.jit
def add_weights(b_sum, weight, m_x):
    return b_sum + tl.sum(tl.sum(tl.where(m_x, weight, 0.0), 2), 0)


@triton.jit
def weight_above(
    x_ptr,
    stride_v,
    allowed_ptr,
    V,
    pivot,
    row_top,
    scale,
    ZEROS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ 2^((x - m)·k) of the columns of order `pivot` and above."""
    b_sum = tl.zeros((BLOCK // LANE,), tl.float32)
    for start in range(0, V, BLOCK):
        o_v = start + lane_columns(WIDTH, LANE, BLOCK)
        x = load_allowed(x_ptr, stride_v, allowed_ptr, o_v, V)
        b_sum = add_weights(b_sum, weight_of(x, row_top, scale, True), (order_of(x, ZEROS) >= pivot) & (o_v < V))
    return tl.sum(b_sum, 0)


@triton.jit
def search(
    x_ptr,
    stride_v,
    allowed_ptr,
    V,
    low,  # int64: weighs at least the target
    high,  # int64: weighs less
    target,
    row_top,
    scale,
    BY_MASS: tl.constexpr,
    ZEROS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest order from `low` on, at which {x >= v} weighs at least `target`."""
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        p1, p2, p3 = low + step, low + 2 * step, low + 3 * step
        s1 = tl.zeros((BLOCK // LANE,), tl.float32)
        s2, s3 = s1, s1
        for start in range(0, V, BLOCK):
            o_v = start + lane_columns(WIDTH, LANE, BLOCK)
            x = load_allowed(x_ptr, stride_v, allowed_ptr, o_v, V)
            order, weight = order_of(x, ZEROS), weight_of(x, row_top, scale, BY_MASS)
            s1 = add_weights(s1, weight, (order >= p1.to(tl.int32)) & (o_v < V))
            s2 = add_weights(s2, weight, (order >= p2.to(tl.int32)) & (o_v < V))
            s3 = add_weights(s3, weight, (order >= p3.to(tl.int32)) & (o_v < V))
        # With an interval of two or three, pivots reach its end or beyond, where nothing is left to weigh enough.
        reach = (tl.sum(s1, 0) >= target).to(tl.int64)
        reach += (reach == 1) & (p2 < high) & (tl.sum(s2, 0) >= target)
        reach += (reach == 2) & (p3 < high) & (tl.sum(s3, 0) >= target)
        high = tl.where(reach < 3, tl.minimum(low + (reach + 1) * step, high), high)
        low = low + reach * step
    return low


@row_kernel
def bound_rows_kernel(
    logits_ptr,  # (R, 1, V)
    allowed_ptr,  # (V,) uint8 or None
    bounds_ptr,  # (R,) out
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,
    temperature,
    top_k,  # as a float
    top_p,
    min_p_gap,  # -T·log min_p, or NO_GAP
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    x_ptr = row_base(logits_ptr, i_r, T, stride_b, stride_t, WIDTH)
    scale = LOG2_E / temperature
    top = tl.full((BLOCK // LANE,), LOWEST, tl.float32)
    for start in range(0, V, BLOCK):
        x = load_allowed(x_ptr, stride_v, allowed_ptr, start + lane_columns(WIDTH, LANE, BLOCK), V)
        top = tl.maximum(top, tl.max(tl.max(x, 2), 0))
    row_top = tl.max(top, 0)
    low = order_of(tl.full((), LOWEST, tl.float32), ZEROS).to(tl.int64)
    end = order_of(row_top, ZEROS).to(tl.int64) + 1
    if HAS_TOP_K:
        low = search(x_ptr, stride_v, allowed_ptr, V, low, end, top_k, row_top, scale, False, ZEROS, WIDTH, BLOCK)
    if HAS_TOP_P:
        mass = weight_above(x_ptr, stride_v, allowed_ptr, V, low.to(tl.int32), row_top, scale, ZEROS, WIDTH, BLOCK)
        low = search(x_ptr, stride_v, allowed_ptr, V, low, end, top_p * mass, row_top, scale, True, ZEROS, WIDTH, BLOCK)
    bound = tl.maximum(number_of(low.to(tl.int32), ZEROS), row_top - min_p_gap)
    tl.store(bounds_ptr + i_r, tl.minimum(tl.maximum(bound, LOWEST), row_top))


def launch_bounds(
    grid: Tensor,  # (R, 1, V) logits
    temperature: float,
    truncation: Truncation,
    allowed: Tensor | None,  # (V,) uint8
) -> Tensor:
    """The bound of each row, (R,) float32; the GPU of `grid` is current."""
    bounds = torch.empty(len(grid), device=grid.device)
    bound_rows_kernel[(len(grid),)](
        logits_ptr=grid,
        allowed_ptr=allowed,
        bounds_ptr=bounds,
        **grid_arguments(grid),
        temperature=temperature,
        top_k=float(min(truncation.top_k, grid.shape[2])),
        top_p=float(truncation.top_p),
        min_p_gap=-temperature * math.log(truncation.min_p) if truncation.min_p > 0 else NO_GAP,
        HAS_TOP_K=truncation.top_k > 0,
        HAS_TOP_P=truncation.top_p < 1,
        ZEROS=ZERO_BITS[grid.dtype],
        **launch_config(grid.shape[2], row_width(grid)),
    )
    return bounds
