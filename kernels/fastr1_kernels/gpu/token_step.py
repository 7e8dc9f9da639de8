"""What lies between the products of a token step: RoPE with the write into the cache, norm, SwiGLU. Inference only.

Each is one launch that reads every input once and writes every output once, which is the fewest bytes; the floating
point work is a few operations a number. All arithmetic is float32, rounded to the tensors' dtype where the formula of
the doors says so. Positions and lengths are read on the device; grids follow from shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import device_of

COLUMNS = 1024  # of a program of SwiGLU


def norm_launch_config(columns: int) -> dict[str, int]:
    """A whole row per program, 16 numbers a thread. Not tuned on a GPU yet."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@triton.jit
def rotate_kernel(
    q_ptr,  # (R, HEADS, D)
    k_ptr,  # (R, KV_HEADS, D)
    v_ptr,  # (R, KV_HEADS, D)
    cos_ptr,  # (M, D)
    sin_ptr,  # (M, D)
    positions_ptr,  # (R,) int64
    lengths_ptr,  # (R,) int32
    suffix_rows_ptr,  # (R,) int32 or None: row r has row r of the caches
    q_norm_ptr,  # (D,) or None
    k_norm_ptr,  # (D,) or None
    out_ptr,  # (R, HEADS, D) out
    k_cache_ptr,  # (S, KV_HEADS, T, D) out, at [suffix_rows[r], :, lengths[r]]
    v_cache_ptr,  # (S, KV_HEADS, T, D) out
    stride_qr,
    stride_kr,
    stride_vr,
    M,
    T,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per row and head: HEADS of q, then KV_HEADS of k, then of v; the halves of a head are two blocks."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_program // (HEADS + 2 * KV_HEADS), i_program % (HEADS + 2 * KV_HEADS)
    HALF: tl.constexpr = D // 2
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < HALF
    length = tl.load(lengths_ptr + i_row).to(tl.int64)
    m_cache = m_d & (length >= 0) & (length < T)
    i_kv = (i_head - HEADS) % KV_HEADS
    i_suffix = i_row
    if suffix_rows_ptr is not None:
        i_suffix = tl.load(suffix_rows_ptr + i_row).to(tl.int64)
    o_cache = ((i_suffix * KV_HEADS + i_kv) * T + length) * D + o_d
    if i_head >= HEADS + KV_HEADS:
        x_ptr = v_ptr + i_row * stride_vr + i_kv * D + o_d
        tl.store(v_cache_ptr + o_cache, tl.load(x_ptr, mask=m_d), mask=m_cache)
        tl.store(v_cache_ptr + o_cache + HALF, tl.load(x_ptr + HALF, mask=m_d), mask=m_cache)
    else:
        position = tl.load(positions_ptr + i_row)
        m_table = m_d & (position >= 0) & (position < M)
        o_table = position * D + o_d
        cos_1 = tl.load(cos_ptr + o_table, mask=m_table, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos_ptr + o_table + HALF, mask=m_table, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin_ptr + o_table, mask=m_table, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin_ptr + o_table + HALF, mask=m_table, other=0.0).to(tl.float32)
        if i_head < HEADS:
            x_ptr = q_ptr + i_row * stride_qr + i_head * D + o_d
            x_1, x_2 = load_head(x_ptr, q_norm_ptr, o_d, m_d, eps, D)
            o_out = (i_row * HEADS + i_head) * D + o_d
            tl.store(out_ptr + o_out, x_1 * cos_1 - x_2 * sin_1, mask=m_d)
            tl.store(out_ptr + o_out + HALF, x_2 * cos_2 + x_1 * sin_2, mask=m_d)
        else:
            x_ptr = k_ptr + i_row * stride_kr + i_kv * D + o_d
            x_1, x_2 = load_head(x_ptr, k_norm_ptr, o_d, m_d, eps, D)
            tl.store(k_cache_ptr + o_cache, x_1 * cos_1 - x_2 * sin_1, mask=m_cache)
            tl.store(k_cache_ptr + o_cache + HALF, x_2 * cos_2 + x_1 * sin_2, mask=m_cache)


@triton.jit
def load_head(x_ptr, norm_ptr, o_d, m_d, eps, D: tl.constexpr):
    """The halves of a head in float32, after its RMSNorm where norm_ptr is given."""
    x_1, x_2 = tl.load(x_ptr, mask=m_d, other=0.0), tl.load(x_ptr + D // 2, mask=m_d, other=0.0)
    y_1, y_2 = x_1.to(tl.float32), x_2.to(tl.float32)
    if norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(y_1 * y_1 + y_2 * y_2, 0) / D + eps)
        w_1 = tl.load(norm_ptr + o_d, mask=m_d, other=0.0)
        w_2 = tl.load(norm_ptr + D // 2 + o_d, mask=m_d, other=0.0)
        y_1 = ((y_1 * inverse).to(x_1.dtype) * w_1).to(tl.float32)
        y_2 = ((y_2 * inverse).to(x_2.dtype) * w_2).to(tl.float32)
    return y_1, y_2


@triton.jit
def norm_kernel(
    x_ptr,  # (R, N)
    residual_ptr,  # (R, N) or None
    weight_ptr,  # (N,)
    normed_ptr,  # (R, N) out
    summed_ptr,  # (R, N) out, with a residual
    stride_xr,
    stride_sr,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, o_n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    m_n = o_n < N
    x = tl.load(x_ptr + i_row * stride_xr + o_n, mask=m_n, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + i_row * stride_sr + o_n, mask=m_n, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(summed_ptr + i_row * N + o_n, x, mask=m_n)
    y = x.to(tl.float32)
    y = (y * tl.rsqrt(tl.sum(y * y, 0) / N + eps)).to(x.dtype)
    tl.store(normed_ptr + i_row * N + o_n, y * tl.load(weight_ptr + o_n, mask=m_n, other=0.0), mask=m_n)


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, stride_gr, stride_ur, N: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a row of gate, up and out, all (R, N), per program."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    i_program = tl.program_id(0).to(tl.int64)
    i_row, o_n = i_program // BLOCKS, i_program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    gate = tl.load(gate_ptr + i_row * stride_gr + o_n, mask=m_n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i_row * stride_ur + o_n, mask=m_n, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + i_row * N + o_n, out.to(out_ptr.dtype.element_ty), mask=m_n)


def launch_rotate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    suffix_rows: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`rope_and_store` of checked arguments."""
    (R, H, d), Hkv = q.shape, k.shape[1]
    out = torch.empty(R, H, d, dtype=q.dtype, device=q.device)
    tensors = (q, k, v, cos, sin, positions, lengths, suffix_rows, q_norm, k_norm, out, k_cache, v_cache)
    strides = {"stride_qr": q.stride(0), "stride_kr": k.stride(0), "stride_vr": v.stride(0)}
    sizes = {"M": len(cos), "T": k_cache.shape[2], "HEADS": H, "KV_HEADS": Hkv, "D": d}
    if R:
        with device_of(q):
            block = triton.next_power_of_2(d // 2)
            rotate_kernel[(R * (H + 2 * Hkv),)](*tensors, **strides, **sizes, eps=eps, BLOCK=block, num_warps=1)
    return out


def launch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of checked arguments."""
    R, N = x.shape
    normed = torch.empty(R, N, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(normed)
    strides = {"stride_xr": x.stride(0), "stride_sr": x.stride(0) if residual is None else residual.stride(0)}
    if R:
        with device_of(x):
            config = norm_launch_config(N)
            norm_kernel[(R,)](x, residual, weight, normed, summed, **strides, eps=eps, N=N, **config)
    return normed, summed


def launch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` of checked arguments."""
    R, N = gate.shape
    out = torch.empty(R, N, dtype=gate.dtype, device=gate.device)
    if R:
        strides = {"stride_gr": gate.stride(0), "stride_ur": up.stride(0)}
        with device_of(gate):
            swiglu_kernel[(R * triton.cdiv(N, COLUMNS),)](gate, up, out, **strides, N=N, BLOCK=COLUMNS, num_warps=4)
    return out
