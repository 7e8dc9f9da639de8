"""Log-probability and entropy of one token per row of logits, and their gradient: the row kernels of `rows`.

One program per row. The forward pass is the first pass of `row_passes`, the backward pass the second; m, log2 S and H
are kept between them, 12 bytes a row. Never materialised: log-softmax, p, float32 copies of the logits. With e bytes a
logit and N live rows,
- fewest bytes: N·V·e forward; 2·N·V·e backward (N·V·e of it the unavoidable result). A masked row is not read; its
  gradient is a written row of zeros;
- fewest FLOPs: about 8·N·V forward and 5·N·V backward, among them one exp2 per logit each.

All sums are float32 in a fixed order without atomics: results are bit-identical from run to run. A kernel is compiled
once for every dtype, set of arguments and alignment of its rows, never for a length or a float.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import device_of
from .row_passes import LANE, NARROW_LANE, row_base, score_row, write_row_gradient, write_row_zeros

ROW_BYTES = 16  # of one load


def row_launch_config(*rows: Tensor) -> dict[str, int]:
    """Block, warps and WIDTH of a launch on rows of (B, T, V) tensors. Not tuned on a GPU yet: a lane to a thread.

    Where a load moves one logit the compiler would take more registers than it needs. With 48 nothing spills, with 64
    where every logit has an address of its own, because columns are not neighbours; both let two programs of 512
    threads share a multiprocessor.
    """
    width = row_width(*rows)
    lane = (LANE if width > 1 else NARROW_LANE).value
    block = min(max(triton.next_power_of_2(rows[0].shape[2]), 512), 512 * lane)
    config = {"BLOCK": block, "num_warps": block // (32 * lane), "WIDTH": width}
    if width > 1:
        return config
    return config | {"maxnreg": 48 if all(x.stride(2) == 1 for x in rows) else 64}


def row_width(*rows: Tensor) -> int:
    """Logits that one load may move: 16 bytes of them where every row of every (B, T, V) tensor starts at such."""
    sizes = [x.element_size() for x in rows]
    starts = [x.data_ptr() for x in rows]
    starts += [x.stride(i) * x.element_size() for x in rows for i in (0, 1)]
    aligned = all(x.stride(2) == 1 for x in rows) and all(start % ROW_BYTES == 0 for start in starts)
    return ROW_BYTES // max(sizes) if aligned else 1


def grid_arguments(logits: Tensor) -> dict[str, int]:
    """What every kernel is told about its (B, T, V) logits beside where they start."""
    b, t, v = logits.stride()
    return {"T": logits.shape[1], "V": logits.shape[2], "stride_b": b, "stride_t": t, "stride_v": v}


def gradient_arguments(d_logits: Tensor) -> dict[str, int]:
    """The same of their gradient, which has their shape."""
    b, t, v = d_logits.stride()
    return {"d_stride_b": b, "d_stride_t": t, "d_stride_v": v}


def row_kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` for kernels of rows: no variants for lengths, for strides of rows, or for where a tensor starts.

    Rows that start at multiples of 16 bytes are known by WIDTH. Of V, triton keeps whether 16 divides it.
    """
    names = list(inspect.signature(function).parameters)
    lengths = [
        name for name in names if name in ("N", "T", "R", "G", "splits") or name.endswith(("stride_b", "stride_t"))
    ]
    starts = [name for name in names if name.endswith(("_ptr", "stride_v"))]
    return triton.jit(do_not_specialize=lengths, do_not_specialize_on_alignment=starts)(function)


@row_kernel
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
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,
    temperature,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr = 1,
    HAS_ENTROPY: tl.constexpr = True,
):
    i_n = tl.program_id(0).to(tl.int64)
    row_top, log2_sum, logp, entropy = 0.0, 0.0, 0.0, 0.0
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + i_n) != 0
    if live:
        x_ptr = row_base(logits_ptr, i_n, T, stride_b, stride_t, WIDTH)
        token = tl.load(token_ids_ptr + i_n).to(tl.int64)
        row_top, log2_sum, logp, entropy, _ = score_row(
            x_ptr, stride_v, token, V, temperature, HAS_ENTROPY, WIDTH, BLOCK
        )
    tl.store(top_ptr + i_n, row_top)
    tl.store(log2_sum_ptr + i_n, log2_sum)
    tl.store(logps_ptr + i_n, logp)
    tl.store(entropy_ptr + i_n, entropy)


@row_kernel
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
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,
    d_stride_b: tl.int64,
    d_stride_t: tl.int64,
    d_stride_v,
    temperature,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr = 1,
):
    i_n = tl.program_id(0).to(tl.int64)
    d_ptr = row_base(d_logits_ptr, i_n, T, d_stride_b, d_stride_t, WIDTH)
    d_logp = tl.load(d_logps_ptr + i_n)
    d_entropy = 0.0
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + i_n)
    # A NaN gradient is not zero: it must reach the result.
    live = (d_logp != 0.0) | (d_entropy != 0.0)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + i_n) != 0)
    if live:
        x_ptr = row_base(logits_ptr, i_n, T, stride_b, stride_t, WIDTH)
        token = tl.load(token_ids_ptr + i_n).to(tl.int64)
        row_top = tl.load(top_ptr + i_n)
        log2_sum = tl.load(log2_sum_ptr + i_n)
        entropy = tl.load(entropy_ptr + i_n)
        inside = (token >= 0) & (token < V)
        x_token = tl.load(x_ptr + token * stride_v, mask=inside, other=float("-inf")).to(tl.float32)
        tl.debug_barrier()  # in place: no warp writes this logit before every warp has read it
        write_row_gradient(
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
            d_entropy_ptr is not None,
            WIDTH,
            BLOCK,
        )
    else:
        write_row_zeros(d_ptr, d_stride_v, V, BLOCK)


@row_kernel
def scale_rows_kernel(
    d_logits_ptr,  # (B, T, V), in and out
    d_loss_ptr,  # 0-d
    grad_scale_ptr,  # 0-d float32: what d_logits are multiplied by already; or None, for 1
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr = 1,
):
    """d_logits *= d_loss / grad_scale, without touching them where that is 1."""
    scale = tl.load(d_loss_ptr).to(tl.float32)
    if grad_scale_ptr is not None:
        written = tl.load(grad_scale_ptr)
        scale = tl.where(scale == written, 1.0, scale / written)  # 0 / 0 is 1 here: zeros stay zeros
    if scale != 1.0:
        d_ptr = row_base(d_logits_ptr, tl.program_id(0).to(tl.int64), T, stride_b, stride_t, WIDTH)
        for start in range(0, V, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            b_ptr = d_ptr + o_v.to(tl.int64) * stride_v
            d = tl.load(b_ptr, mask=o_v < V).to(tl.float32)
            tl.store(b_ptr, (d * scale).to(d_ptr.dtype.element_ty), mask=o_v < V)


def launch_scores(
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (N,), N = B·T
    mask: Tensor | None,  # (N,) uint8
    temperature: float,
    compute_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logps (N,), entropy (N,), and m and log2 S, (2, N)."""
    n = token_ids.numel()
    logps, entropy, state = (torch.empty(shape, device=logits.device) for shape in ((n,), (n,), (2, n)))
    if n:
        with device_of(logits):
            score_rows_kernel[(n,)](
                logits_ptr=logits,
                token_ids_ptr=token_ids,
                mask_ptr=mask,
                logps_ptr=logps,
                entropy_ptr=entropy,
                top_ptr=state[0],
                log2_sum_ptr=state[1],
                **grid_arguments(logits),
                temperature=temperature,
                HAS_ENTROPY=compute_entropy,
                **row_launch_config(logits),
            )
    return logps, entropy, state


def launch_gradient(
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (N,)
    mask: Tensor | None,  # (N,) uint8
    d_logps: Tensor,  # (N,)
    d_entropy: Tensor | None,  # (N,)
    entropy: Tensor,  # (N,)
    state: Tensor,  # (2, N)
    temperature: float,
    out: Tensor,  # (B, T, V), may be the logits
) -> None:
    if token_ids.numel():
        with device_of(logits):
            gradient_rows_kernel[(token_ids.numel(),)](
                logits_ptr=logits,
                d_logits_ptr=out,
                token_ids_ptr=token_ids,
                mask_ptr=mask,
                d_logps_ptr=d_logps,
                d_entropy_ptr=d_entropy,
                entropy_ptr=entropy,
                top_ptr=state[0],
                log2_sum_ptr=state[1],
                **grid_arguments(logits),
                **gradient_arguments(out),
                temperature=temperature,
                **row_launch_config(logits, out),
            )
