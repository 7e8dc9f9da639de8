"""One token step of a decoder, for inference: attention over a shared prefix, RoPE with the cache write, norm, SwiGLU.

The doors check shapes, dtypes and devices and dispatch: Triton kernels in `gpu` or `torch_decoding`; `dispatch` has the
rule. Nothing here is differentiable: a tensor that requires grad while grad is enabled is refused. The kernels read
lengths on the device alone: no call waits for it, and what shapes a launch is an argument or a tensor's shape, so that
a CUDA graph that was captured once may be replayed after any change of the lengths.

Symbols: R rows (tokens that are forwarded, and rows of padding), B prompts, H query heads and Hkv heads of keys and
values, d their size, P and T places of the prefix and suffix caches, S rows of the suffix cache, one a sequence, M
positions of a table. A row belongs to the sequence of its own number, R <= S, or to that of `suffix_rows`, where one
step forwards several tokens of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_decoding
from .dispatch import uses_triton


def decode_attention(
    q: Tensor,  # (R, H, d)
    prefix_k: Tensor,  # (B, Hkv, P, d)
    prefix_v: Tensor,  # (B, Hkv, P, d)
    prefix_lengths: Tensor,  # (B,) int32, 0 to P
    cu_rows: Tensor,  # (B + 1,) int32, rising from 0 to at most R
    suffix_k: Tensor,  # (S, Hkv, T, d)
    suffix_v: Tensor,  # (S, Hkv, T, d)
    suffix_lengths: Tensor,  # (R,) int32, 0 to max_suffix_length
    *,
    scale: float,
    max_group: int,  # bounds the rows of every prompt
    max_suffix_length: int,  # bounds suffix_lengths, at most T
    suffix_rows: Tensor | None = None,  # (R,) int32, 0 to S - 1; None: 0 to R - 1
) -> Tensor:
    """softmax(scale · q [prefix; suffix]ᵀ) [prefix; suffix] of one query per row; the prefix of a prompt is read once.

    Row r of prompt b, cu_rows[b] <= r < cu_rows[b + 1], attends to prefix_k[b, :, :prefix_lengths[b]] and to
    suffix_k[suffix_rows[r], :, :suffix_lengths[r]]; head h of q uses head h // (H // Hkv) of them. Groups may be
    ragged or empty. What lies in the caches beyond the lengths reaches nothing, NaN included.

    Returns:
        (R, H, d) in q's dtype; zeros for rows from cu_rows[B] on, and for a row with nothing to attend to.

    Raises:
        ValueError: wrong shapes, dtypes or devices, caches that are not contiguous, a bound that is too large, inputs
            that require grad. Lengths are not checked by value.

    Numerics: scores, softmax and sums are float32 (float64 for float64), probabilities in the dtype of the caches.
    Plain torch reads the lengths, which on a GPU (float64) waits for it.
    """
    tensors = (q, prefix_k, prefix_v, prefix_lengths, cu_rows, suffix_k, suffix_v, suffix_lengths, suffix_rows)
    _check_attention(*tensors, max_group, max_suffix_length)
    if uses_triton(q):
        if (d := q.shape[2]) > (128 if q.dtype == torch.float32 else 256):
            raise ValueError(f"d={d} of {q.dtype} does not fit the registers of a GPU: at most 256, float32 128")
        from .gpu.attention import launch_attention  # triton exists on Linux only

        return launch_attention(*tensors, scale, max_group)
    return torch_decoding.attend(*tensors, scale, max_group, max_suffix_length)


def rope_and_store(
    q: Tensor,  # (R, H, d)
    k: Tensor,  # (R, Hkv, d)
    v: Tensor,  # (R, Hkv, d)
    cos: Tensor,  # (M, d)
    sin: Tensor,  # (M, d)
    positions: Tensor,  # (R,) int64, 0 to M - 1
    k_cache: Tensor,  # (S, Hkv, T, d), written
    v_cache: Tensor,  # (S, Hkv, T, d), written
    lengths: Tensor,  # (R,) int32
    *,
    q_norm: Tensor | None = None,  # (d,)
    k_norm: Tensor | None = None,  # (d,)
    eps: float = 1e-6,
    suffix_rows: Tensor | None = None,  # (R,) int32, 0 to S - 1; None: 0 to R - 1
) -> Tensor:
    """x·cos + rotate_half(x)·sin of q and k, after an RMSNorm of every head if given; k and v go into the caches.

    Row r is written at [suffix_rows[r], :, lengths[r]] of both caches; one with lengths[r] < 0 or >= T (padding) writes
    nothing. No two rows are written at one place.
    q, k and v may be slices of one buffer: the last axis has stride 1, the heads lie side by side.

    Returns:
        q rotated, (R, H, d); on a CPU it may be a slice of a buffer that holds k too.

    Raises:
        ValueError: wrong shapes, dtypes, strides or devices, one norm without the other, inputs that require grad.

    Numerics: the norm in float32, rounded, times its weight, as transformers does it; RoPE is rounded once.
    """
    tensors = (q, k, v, cos, sin, positions, k_cache, v_cache, lengths, suffix_rows, q_norm, k_norm)
    _check_rotation(*tensors)
    if uses_triton(q):
        from .gpu.token_step import launch_rotate  # triton exists on Linux only

        return launch_rotate(*tensors, eps)
    return torch_decoding.rotate(*tensors, eps)


def add_rms_norm(
    x: Tensor,  # (R, D)
    residual: Tensor | None,  # (R, D)
    weight: Tensor,  # (D,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """s = x + residual in x's dtype, and s / sqrt(mean(s²) + eps) in float32, rounded, times weight.

    Returns:
        (normed, s), both (R, D). Without a residual s is x itself.

    Raises:
        ValueError: wrong shapes, dtypes, strides or devices, inputs that require grad.
    """
    _require_inference(x, weight, x if residual is None else residual)
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x has shape {tuple(x.shape)} and strides {x.stride()}: give (R, D) with rows of stride 1")
    if residual is not None:
        _require("residual", residual, tuple(x.shape), x.dtype, x.device)
        if residual.stride(1) != 1:
            raise ValueError(f"residual has strides {residual.stride()}: give rows of stride 1")
    _require("weight", weight, (x.shape[1],), x.dtype, x.device, True)
    if uses_triton(x):
        if x.shape[1] > 16384:
            raise ValueError(f"x has {x.shape[1]} columns: a row of at most 16,384 fits a program on a GPU")
        from .gpu.token_step import launch_norm  # triton exists on Linux only

        return launch_norm(x, residual, weight, eps)
    return torch_decoding.add_and_norm(x, residual, weight, eps)


def swiglu(
    gate: Tensor,  # (R, I)
    up: Tensor,  # (R, I)
) -> Tensor:
    """gate · sigmoid(gate) · up, (R, I); the two may be slices of one buffer, with rows of stride 1.

    Raises:
        ValueError: wrong shapes, dtypes, strides or devices, inputs that require grad.
    """
    _require_inference(gate, up, gate)
    if gate.dim() != 2 or gate.stride(1) != 1 or up.stride(-1) != 1:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and strides {gate.stride()}, up has strides {up.stride()}: "
            "give (R, I) with rows of stride 1"
        )
    _require("up", up, tuple(gate.shape), gate.dtype, gate.device)
    if uses_triton(gate):
        from .gpu.token_step import launch_swiglu  # triton exists on Linux only

        return launch_swiglu(gate, up)
    return torch_decoding.gated(gate, up)


def _check_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    cu_rows: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    suffix_rows: Tensor | None,
    max_group: int,
    max_suffix_length: int,
) -> None:
    """Raises ValueError as `decode_attention`, which has the shapes."""
    _require_inference(q, prefix_k, suffix_k)
    if q.dim() != 3 or prefix_k.dim() != 4 or suffix_k.dim() != 4:
        raise ValueError(
            f"q {tuple(q.shape)}, prefix_k {tuple(prefix_k.shape)}, suffix_k {tuple(suffix_k.shape)}: "
            "give (R, H, d), (B, Hkv, P, d) and (S, Hkv, T, d)"
        )
    (R, H, d), (B, Hkv, P, _), (S, _, T, _) = q.shape, prefix_k.shape, suffix_k.shape
    if (S < R and suffix_rows is None) or Hkv == 0 or H % Hkv or d == 0:
        raise ValueError(f"R={R}, H={H}, d={d}, Hkv={Hkv}, S={S}: S >= R, and H a multiple of Hkv, are needed")
    if q.stride(2) != 1 or q.stride(1) != d:
        raise ValueError(f"q has strides {q.stride()}: give (any, {d}, 1)")
    for name, x, shape in (
        ("prefix_k", prefix_k, (B, Hkv, P, d)),
        ("prefix_v", prefix_v, (B, Hkv, P, d)),
        ("suffix_k", suffix_k, (S, Hkv, T, d)),
        ("suffix_v", suffix_v, (S, Hkv, T, d)),
    ):
        _require(name, x, shape, q.dtype, q.device)
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}: give a contiguous cache")
    for name, x, n in (("prefix_lengths", prefix_lengths, B), ("cu_rows", cu_rows, B + 1)):
        _require(name, x, (n,), torch.int32, q.device, True)
    _require("suffix_lengths", suffix_lengths, (R,), torch.int32, q.device, True)
    if suffix_rows is not None:
        _require("suffix_rows", suffix_rows, (R,), torch.int32, q.device, True)
    if not 0 <= max_suffix_length <= T or not 0 <= max_group <= max(R, 1):
        raise ValueError(
            f"max_suffix_length={max_suffix_length}, max_group={max_group}: at most T={T} and R={R} are possible"
        )


def _check_rotation(
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
) -> None:
    """Raises ValueError as `rope_and_store`, which has the shapes."""
    _require_inference(q, k, v)
    if q.dim() != 3 or k.dim() != 3 or k_cache.dim() != 4 or cos.dim() != 2:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, k_cache {tuple(k_cache.shape)}, cos {tuple(cos.shape)}: "
            "give (R, H, d), (R, Hkv, d), (S, Hkv, T, d) and (M, d)"
        )
    (R, H, d), Hkv, (S, _, T, _) = q.shape, k.shape[1], k_cache.shape
    if (S < R and suffix_rows is None) or d % 2:
        raise ValueError(f"R={R}, S={S}, d={d}: S >= R and an even d are needed")
    for name, x, n in (("q", q, H), ("k", k, Hkv), ("v", v, Hkv)):
        _require(name, x, (R, n, d), q.dtype, q.device)
        if x.stride(2) != 1 or x.stride(1) != d:
            raise ValueError(f"{name} has strides {x.stride()}: give (any, {d}, 1)")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        _require(name, x, (S, Hkv, T, d), q.dtype, q.device, True)
    for name, x in (("cos", cos), ("sin", sin)):
        _require(name, x, (len(cos), d), cos.dtype, q.device, True)
    _require("positions", positions, (R,), torch.int64, q.device, True)
    _require("lengths", lengths, (R,), torch.int32, q.device, True)
    if suffix_rows is not None:
        _require("suffix_rows", suffix_rows, (R,), torch.int32, q.device, True)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: give both or none")
    if q_norm is not None and k_norm is not None:
        _require("q_norm", q_norm, (d,), q.dtype, q.device, True)
        _require("k_norm", k_norm, (d,), q.dtype, q.device, True)


def _require_inference(x: Tensor, y: Tensor, z: Tensor) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or z.requires_grad):
        raise ValueError("inputs require grad, and decoding has no gradient: call it under torch.no_grad()")


def _require(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    needs_contiguous: bool = False,
) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, {x.dtype}, on {x.device}: give {shape}, {dtype}, on {device}"
        )
    if needs_contiguous and not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}: give a contiguous tensor")
