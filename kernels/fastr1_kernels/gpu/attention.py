"""Attention of one query per row over the prefix of its prompt and a suffix of its own: o = softmax(s · q kᵀ) v.

Two launches. `prefix_kernel`: the rows of a prompt, times the H / Hkv heads that share a head of keys, make a tile, so
that a prefix is read once per tile; its places are split, so that few prompts fill a GPU. Each split gives its sum,
normalised, and the base-2 logarithm of its normaliser. `suffix_kernel`: a program per row and head of keys reads the
suffix, then adds the splits by their logarithms and writes the row.

Never materialised: scores, weights, repeated heads or prefixes. With e bytes an element, n_b and t_r the lengths:
- fewest bytes: 2·e·d·Hkv·(Σ_b n_b + Σ_r t_r) of keys and values, and 2·e·R·H·d of queries and results; the splits
  write and read 4·R·H·(d + 1) bytes each, which stay in the cache of a GPU;
- fewest FLOPs: 4·d·H·Σ_r (n_b(r) + t_r).

float32 products are three of tensor cores each, which keeps float32's error.

Scores are masked before the exponential; a part without places has the logarithm -inf, and its sum is never read. No
atomics: results are the same bits in every run. Lengths are read on the device. Grid and compile-time constants follow
from shapes, dtypes and `max_group` alone.

Sources: the online normaliser of arXiv 1805.02867; prefixes shared by a batch, arXiv 2402.05099; split keys,
https://pytorch.org/blog/flash-decoding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import device_of

LOG2_E = 1.4426950408889634
PROGRAMS = 264  # two for each multiprocessor of the largest GPUs
MAX_SPLITS = 32
MIN_ROWS = 16  # of a tile, for tensor cores


def attention_launch_config(group_rows: int, d: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles by rows of a group, size of a head and dtype. Not tuned on a GPU yet: the largest that spill nowhere."""
    block_d = max(triton.next_power_of_2(d), 16)
    rows = max(triton.next_power_of_2(group_rows), MIN_ROWS)
    if dtype == torch.float32:  # three products of tensor cores for one
        return {"BLOCK_M": MIN_ROWS, "BLOCK_N": 16, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}
    block_m, block_n = (min(rows, 64), 64) if block_d <= 128 else (min(rows, 32), 32)
    warps = 4 if block_m <= 32 and block_d <= 128 else 8
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def num_splits(programs: int, places: int, block: int) -> int:
    """Parts of a prefix: enough to fill a GPU with `programs` each, of two blocks at least."""
    return max(1, min(triton.cdiv(PROGRAMS, max(programs, 1)), triton.cdiv(places, 2 * block), MAX_SPLITS))


@triton.jit
def attend_places(
    b_q,  # (BLOCK_M, BLOCK_D)
    k_ptr,  # (L, D), place after place
    v_ptr,  # (L, D)
    start,
    stop,
    log2_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(m, S, sum) of places start to stop: m the largest score s in base 2, S = Σ exp2(s - m), Σ exp2(s - m)·v."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        m_n = n + o_n < stop
        o_kv = (n + o_n)[:, None] * D + o_d[None, :]
        b_k = tl.load(k_ptr + o_kv, mask=m_n[:, None] & m_d, other=0.0)
        s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * log2_scale
        s = tl.where(m_n[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        b_v = tl.load(v_ptr + o_kv, mask=m_n[:, None] & m_d, other=0.0)
        b_sum = tl.dot(p.to(b_v.dtype), b_v, b_sum * shrink[:, None], input_precision="tf32x3")
        top = new_top
    return top, total, b_sum


@triton.jit(do_not_specialize=["R", "P", "SPLITS", "TILES"])
def prefix_kernel(
    q_ptr,  # (R, H, D)
    k_ptr,  # (B, KV_HEADS, P, D)
    v_ptr,  # (B, KV_HEADS, P, D)
    lengths_ptr,  # (B,)
    cu_rows_ptr,  # (B + 1,)
    sums_ptr,  # (SPLITS, R, H, D) out, float32: the result of each split alone
    logs_ptr,  # (SPLITS, R, H) out, float32: log2 of its normaliser, -inf for an empty one, whose sum is not written
    stride_qr,
    R,
    P,
    SPLITS,
    TILES,
    log2_scale,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_split, i_tile = i_program % SPLITS, (i_program // SPLITS) % TILES
    i_head, i_b = (i_program // SPLITS // TILES) % KV_HEADS, i_program // SPLITS // TILES // KV_HEADS
    first = tl.load(cu_rows_ptr + i_b).to(tl.int64)
    last = tl.minimum(tl.load(cu_rows_ptr + i_b + 1).to(tl.int64), R)
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row, o_head = first + o_m // RATIO, i_head * RATIO + o_m % RATIO
    if first + i_tile * BLOCK_M // RATIO < last:
        m_m = o_row < last
        length = tl.minimum(tl.load(lengths_ptr + i_b), P)
        size = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
        start = i_split.to(tl.int32) * size
        stop = tl.minimum(start + size, length)
        o_out = (i_split * R + o_row) * (KV_HEADS * RATIO) + o_head
        logs = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if start < stop:
            o_d = tl.arange(0, BLOCK_D)
            m_q = m_m[:, None] & (o_d < D)[None, :]
            b_q = tl.load(q_ptr + (o_row * stride_qr + o_head * D)[:, None] + o_d[None, :], mask=m_q, other=0.0)
            cache = (i_b * KV_HEADS + i_head) * P * D
            top, total, b_sum = attend_places(
                b_q, k_ptr + cache, v_ptr + cache, start, stop, log2_scale, D, BLOCK_M, BLOCK_N, BLOCK_D
            )
            logs = top + tl.log2(total)
            tl.store(sums_ptr + o_out[:, None] * D + o_d[None, :], b_sum / total[:, None], mask=m_q)
        tl.store(logs_ptr + o_out, logs, mask=m_m)


@triton.jit(do_not_specialize=["R", "T", "SPLITS", "B"])
def suffix_kernel(
    q_ptr,  # (R, H, D)
    k_ptr,  # (S, KV_HEADS, T, D)
    v_ptr,  # (S, KV_HEADS, T, D)
    lengths_ptr,  # (R,)
    suffix_rows_ptr,  # (R,) or None: row r has suffix r
    cu_rows_ptr,  # (B + 1,)
    sums_ptr,  # (SPLITS, R, H, D) float32
    logs_ptr,  # (SPLITS, R, H) float32
    out_ptr,  # (R, H, D) out
    stride_qr,
    R,
    T,
    SPLITS,
    B,
    log2_scale,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_program // KV_HEADS, i_program % KV_HEADS
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < RATIO
    m_q = m_m[:, None] & (o_d < D)[None, :]
    o_head = i_head * RATIO + o_m
    b_out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if i_row < tl.load(cu_rows_ptr + B):
        b_q = tl.load(q_ptr + i_row * stride_qr + o_head[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
        i_suffix = i_row
        if suffix_rows_ptr is not None:
            i_suffix = tl.load(suffix_rows_ptr + i_row).to(tl.int64)
        cache = (i_suffix * KV_HEADS + i_head) * T * D
        length = tl.minimum(tl.load(lengths_ptr + i_row), T)
        top, total, b_sum = attend_places(
            b_q, k_ptr + cache, v_ptr + cache, 0, length, log2_scale, D, BLOCK_M, BLOCK_N, BLOCK_D
        )
        o_part = i_row * (KV_HEADS * RATIO) + o_head
        for _ in range(SPLITS):
            log = tl.load(logs_ptr + o_part, mask=m_m, other=float("-inf"))
            is_part = log > float("-inf")
            b_part = tl.load(sums_ptr + o_part[:, None] * D + o_d[None, :], mask=m_q & is_part[:, None], other=0.0)
            new_top = tl.maximum(top, log)
            base = tl.where(new_top > float("-inf"), new_top, 0.0)  # of no places at all
            shrink, weight = tl.exp2(top - base), tl.exp2(log - base)
            total = total * shrink + weight
            b_sum = b_sum * shrink[:, None] + b_part * weight[:, None]
            top = new_top
            o_part += R * (KV_HEADS * RATIO)
        b_out = b_sum / tl.where(total > 0, total, 1.0)[:, None]
    o_out = (i_row * (KV_HEADS * RATIO) + o_head)[:, None] * D + o_d[None, :]
    tl.store(out_ptr + o_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q)


def launch_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    cu_rows: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    suffix_rows: Tensor | None,
    scale: float,
    max_group: int,
) -> Tensor:
    """`decode_attention` of checked arguments."""
    (R, H, d), (B, Hkv, P, _), T = q.shape, prefix_k.shape, suffix_k.shape[2]
    out = q.new_empty(q.shape)
    if R == 0:
        return out
    config = attention_launch_config(max_group * (H // Hkv), d, q.dtype)
    tiles = triton.cdiv(max_group * (H // Hkv), config["BLOCK_M"])
    splits = num_splits(B * Hkv * tiles, P, config["BLOCK_N"])
    sums = torch.empty(splits, R, H, d, dtype=torch.float32, device=q.device)
    logs = torch.empty(splits, R, H, dtype=torch.float32, device=q.device)
    shared = {"stride_qr": q.stride(0), "R": R, "SPLITS": splits, "log2_scale": scale * LOG2_E}
    sizes = {"KV_HEADS": Hkv, "RATIO": H // Hkv, "D": d}
    with device_of(q):
        if B * tiles > 0:
            prefix_kernel[(B * Hkv * tiles * splits,)](
                q,
                prefix_k,
                prefix_v,
                prefix_lengths,
                cu_rows,
                sums,
                logs,
                P=P,
                TILES=tiles,
                **shared,
                **sizes,
                **config,
            )
        config = attention_launch_config(H // Hkv, d, q.dtype)
        tensors = (q, suffix_k, suffix_v, suffix_lengths, suffix_rows, cu_rows, sums, logs, out)
        suffix_kernel[(R * Hkv,)](*tensors, T=T, B=B, **shared, **sizes, **config)
    return out
