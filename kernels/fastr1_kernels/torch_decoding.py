"""The doors of `decoding` in plain torch, for CPUs: few operations over views of the caches, lengths read on the host.

A token step of a small model is bound by the number of operations, not by their arithmetic. So lengths are read (free
on a CPU), equal lengths need no mask, full groups no gather, and what follows from lengths alone is kept from call to
call: all layers of a step share it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .head import sum_dtype


def attend(
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
    max_suffix_length: int,
) -> Tensor:
    """`decode_attention` of checked arguments."""
    bounds, places, steps = tuple(cu_rows.tolist()), tuple(prefix_lengths.tolist()), suffix_lengths.tolist()
    num_rows = bounds[-1]
    if num_rows < len(q):  # rows of padding
        out = q.new_zeros(q.shape)
        if num_rows:
            rows = (q[:num_rows], prefix_k, prefix_v, prefix_lengths, cu_rows, suffix_k, suffix_v)
            own = (suffix_lengths[:num_rows], suffix_rows if suffix_rows is None else suffix_rows[:num_rows])
            out[:num_rows] = attend(*rows, *own, scale, max_group, max_suffix_length)
        return out
    if num_rows == 0:
        return q.new_empty(q.shape)
    P, T, dtype = max(places), max(steps), q.dtype
    largest = max(end - start for start, end in pairwise(bounds))
    if max(largest - max_group, T - max_suffix_length) > 0:
        raise ValueError(
            f"a group of {largest} rows with max_group={max_group}, a suffix of {T} with "
            f"max_suffix_length={max_suffix_length}: give bounds that hold"
        )
    prefix = Part(prefix_k[:, :, :P], prefix_v[:, :, :P], _bias(places, P, q.device))
    if suffix_rows is None:
        suffix_k, suffix_v = suffix_k[:num_rows, :, :T], suffix_v[:num_rows, :, :T]
    else:
        suffix_k, suffix_v = (x[:, :, :T].index_select(0, suffix_rows) for x in (suffix_k, suffix_v))
    suffix = Part(suffix_k, suffix_v, _bias(tuple(steps), T, q.device))
    if dtype != torch.float32:
        q, prefix, suffix = q.to(sum_dtype(dtype)), prefix.to(sum_dtype(dtype)), suffix.to(sum_dtype(dtype))
    out = _attend(q, bounds, prefix, suffix, scale)
    is_masked = prefix.bias is not None or suffix.bias is not None
    if is_masked and not math.isfinite(out.sum().item()):
        # NaN or infinity beyond a length: rare enough to be found out afterwards. Numbers there have weight 0 already.
        parts = prefix.without_tails(prefix_lengths), suffix.without_tails(suffix_lengths)
        out = _attend(q, bounds, *parts, scale)
    if min(steps) == 0 == min(places):
        is_empty = (suffix_lengths == 0) & (prefix_lengths.repeat_interleave(cu_rows.diff()) == 0)
        out.masked_fill_(is_empty[:, None, None], 0)
    return out.to(dtype)


class Part(NamedTuple):
    """The prefixes of all prompts or the suffixes of all rows, n of them, cut at the longest."""

    k: Tensor  # (n, Hkv, L, d)
    v: Tensor  # (n, Hkv, L, d)
    bias: Tensor | None  # (n, L), 0 up to each length and -inf from there on; None: all are as long

    def to(self, dtype: torch.dtype) -> Part:
        return Part(*(x if x is None else x.to(dtype) for x in self))  # type: ignore[arg-type]

    def without_tails(self, lengths: Tensor) -> Part:
        """Copies with zeros beyond the lengths (n,)."""
        is_beyond = torch.arange(self.k.shape[2], device=lengths.device) >= lengths[:, None]
        k, v = (x.masked_fill(is_beyond[:, None, :, None], 0) for x in (self.k, self.v))
        return Part(k, v, self.bias)

    def scores(self, q: Tensor, scale: float) -> Tensor:
        """scale · q kᵀ + bias for q (n · Hkv, m, d); (n · Hkv, m, L)."""
        n, Hkv, L, _ = self.k.shape
        keys = self.k.flatten(0, 1).transpose(1, 2)
        if self.bias is None:
            return torch.baddbmm(q.new_empty(1), q, keys, beta=0, alpha=scale)
        return torch.baddbmm(self.bias[:, None].expand(n, Hkv, L).reshape(n * Hkv, 1, L), q, keys, alpha=scale)


def _attend(
    q: Tensor,  # (R, H, d)
    bounds: tuple[int, ...],  # of the rows of each prompt, from 0 to R
    prefix: Part,  # of B prompts
    suffix: Part,  # of R rows
    scale: float,
) -> Tensor:
    """Scores of both parts side by side, one softmax; (R, H, d)."""
    (R, H, d), (B, Hkv, P, _), T = q.shape, prefix.k.shape, suffix.k.shape[2]
    g, gather = H // Hkv, _gather(bounds, q.device)
    grouped = q if gather is None else q.index_select(0, gather[0])  # (B · G, H, d)
    G = len(grouped) // B
    grouped = grouped.view(B, G, Hkv, g, d).transpose(1, 2).reshape(B * Hkv, G * g, d)
    by_prefix = prefix.scores(grouped, scale).view(B, Hkv, G, g, P).transpose(1, 2)
    by_suffix = suffix.scores(q.reshape(R * Hkv, g, d), scale).view(R, Hkv, g, T)
    by_row = by_prefix if gather is None else by_prefix.reshape(B * G, Hkv, g, P).index_select(0, gather[1])
    weights = torch.cat([by_row.reshape(R, Hkv, g, P), by_suffix], -1).softmax(-1)
    grouped = weights[..., :P]
    grouped = grouped if gather is None else grouped.index_select(0, gather[0])
    grouped = grouped.view(B, G, Hkv, g, P).transpose(1, 2).reshape(B * Hkv, G * g, P)
    out = torch.bmm(grouped, prefix.v.flatten(0, 1)).view(B, Hkv, G, g, d).transpose(1, 2)
    out = out if gather is None else out.reshape(B * G, Hkv, g, d).index_select(0, gather[1])
    own = torch.bmm(weights[..., P:].view(R * Hkv, g, T), suffix.v.flatten(0, 1))
    return own.view(out.shape).add_(out).view(R, H, d)


@lru_cache(maxsize=16)
def _gather(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Row of each place (B · G,) and place of each row (R,), groups padded to the largest; None: all are as large."""
    sizes = [end - start for start, end in pairwise(bounds)]
    G = max(sizes)
    if min(sizes) == G:
        return None
    rows = [start + min(i, max(size - 1, 0)) for start, size in zip(bounds, sizes, strict=False) for i in range(G)]
    places = [b * G + i for b, size in enumerate(sizes) for i in range(size)]
    last = bounds[-1] - 1
    return torch.tensor([min(row, last) for row in rows], device=device), torch.tensor(places, device=device)


@lru_cache(maxsize=16)
def _bias(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor | None:
    """`Part.bias` of these lengths."""
    if min(lengths) == width:
        return None
    is_beyond = torch.arange(width) >= torch.tensor(lengths)[:, None]
    return torch.zeros(is_beyond.shape).masked_fill_(is_beyond, -math.inf).to(device)


def rotate(
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
    R, H, d = q.shape
    if q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm, eps), _rms_norm(k, k_norm, eps)
    cos, sin = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]
    if q.stride() == k.stride() and q.data_ptr() + H * d * q.element_size() == k.data_ptr():
        both = _rotate(q.as_strided((R, H + k.shape[1], d), q.stride()), cos, sin)  # two slices of one buffer
        q, k = both[:, :H], both[:, H:]
    else:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    steps = lengths.tolist()
    T = k_cache.shape[2]
    if suffix_rows is None and R and 0 <= steps[0] < T and steps.count(steps[0]) == R:
        k_cache[:R, :, steps[0]].copy_(k)
        v_cache[:R, :, steps[0]].copy_(v)
        return q
    rows = torch.tensor([r for r, step in enumerate(steps) if 0 <= step < T], dtype=torch.long, device=q.device)
    step = lengths.index_select(0, rows).long()
    place = (rows if suffix_rows is None else suffix_rows.index_select(0, rows).long(), step)
    k_cache.transpose(1, 2).index_put_(place, k.index_select(0, rows))
    v_cache.transpose(1, 2).index_put_(place, v.index_select(0, rows))
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin, a new tensor; x (R, n, d), cos and sin (R, 1, d)."""
    half, dtype = x.shape[-1] // 2, x.dtype
    if dtype in (torch.bfloat16, torch.float16) or cos.dtype != dtype:
        return _rotate(x.double(), cos.double(), sin.double()).to(dtype)
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def add_and_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of checked arguments."""
    summed = x if residual is None else x + residual
    return _rms_norm(summed, weight, eps), summed


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` of checked arguments."""
    return F.silu(gate).mul_(up)
