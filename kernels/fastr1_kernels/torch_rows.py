"""Scores of rows of logits, and their gradient, in plain torch: what `gpu.rows` does where no kernel runs.

On a CPU a few rows at a time, so that all passes but one find them in the cache: logits come from memory once forward,
and once more backward, where their gradient goes there. With m = max xⱼ, eⱼ = exp((xⱼ - m)/τ), S = Σ eⱼ, pⱼ = eⱼ/S:
    log pⱼ = (xⱼ - m)/τ - log S      H = log S - Σ eⱼ (xⱼ - m)/τ / S
    ∂L/∂xⱼ = (g·(δⱼᵧ - pⱼ) - h·(pⱼ log pⱼ + pⱼ H)) / τ,   g = ∂L/∂logp, h = ∂L/∂H
m, S and H are kept between the two, 12 bytes a row. On a CPU rows that are masked, or have no gradient, are not read.
Elsewhere (float64 on a GPU) no value is read: they are computed and replaced by zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .head import sum_dtype

BLOCK_ELEMENTS = 2**20  # logits worked on at a time on a CPU: 4 MiB of float32
Pick = slice | Tensor  # of rows


def score(
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (N,)
    mask: Tensor | None,  # (N,) uint8
    temperature: float,
    compute_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logps (N,), entropy (N,), and m and S, (2, N); logps and entropy are 0 in masked rows."""
    n, dtype = token_ids.numel(), sum_dtype(logits.dtype)
    logps, entropy = logits.new_zeros(n, dtype=dtype), logits.new_zeros(n, dtype=dtype)
    state = torch.zeros(2, n, dtype=dtype, device=logits.device)
    live = None if mask is None else mask.bool()
    scratch = _scratch(logits, 2 if compute_entropy else 1)
    for first, (rows,) in _views(logits):
        for pick in _picks(rows, first, live):
            number = _shift(pick, first)
            x, ids = _read(rows[pick], number, live), token_ids[number, None].long()
            top = x.amax(1, keepdim=True).to(dtype)
            shifted = _shifted(x, top, temperature, scratch[0])
            token = shifted.gather(1, ids if live is None else torch.where(live[number, None], ids, 0))
            e = torch.exp(shifted, out=scratch[-1][: len(x)])
            total = e.sum(1, keepdim=True)
            log_total = total.log()
            logps[number] = (token - log_total).squeeze(1)
            state[0, number], state[1, number] = top.squeeze(1), total.squeeze(1)
            if compute_entropy:
                entropy[number] = (log_total - moment(shifted, e) / total).squeeze(1)
    if live is not None:
        logps, entropy = torch.where(live, logps, 0.0), torch.where(live, entropy, 0.0)
    return logps, entropy, state


def gradient(
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
    """Write the gradient of the logits; zeros in masked rows and where both upstream gradients are 0."""
    dtype = sum_dtype(logits.dtype)
    live = (d_logps != 0) | state[1].isnan()  # 0 · NaN is NaN
    live = live if d_entropy is None else live | (d_entropy != 0)
    unmasked = None if mask is None else mask.bool()
    live = live if unmasked is None else live & unmasked
    scratch = _scratch(logits, 1 if d_entropy is None else 2)
    for first, (rows, d_rows) in _views(logits, out):
        for pick in _picks(rows, first, live):
            number = _shift(pick, first)
            x, ids = _read(rows[pick], number, unmasked), token_ids[number, None].long()
            top, total = state[:, number, None]
            g = torch.where(live[number], d_logps[number].to(dtype), 0.0)[:, None]
            direct = isinstance(pick, slice) and out.dtype == dtype
            d = d_rows[pick] if direct else scratch[-1][: len(x)]
            into = d if d_entropy is None else scratch[0][: len(x)]
            shifted = _shifted(x, top, temperature, into)
            if d_entropy is None:
                d = shifted.exp_().mul_(-g / (temperature * total))
            else:
                h = torch.where(live[number], d_entropy[number].to(dtype), 0.0)[:, None]
                torch.exp(shifted.clamp_(min=-1e30), out=d)
                factor = -1 / (temperature * total)
                shifted.mul_(h * factor).add_((g + h * (entropy[number, None] - total.log())) * factor)
                d.mul_(shifted)
            d.scatter_add_(1, torch.where(live[number, None], ids, 0), g / temperature)
            if not direct:
                d_rows[pick] = d.to(out.dtype)
        if may_read(rows):
            d_rows.index_fill_(0, (~live[first : first + len(rows)]).nonzero().squeeze(1), 0.0)


def moment(shifted: Tensor, e: Tensor, log_total: Tensor | float = 0.0) -> Tensor:
    """Σ eⱼ·dⱼ of rows d (C, V), `shifted`, which are lost; a column of -inf adds 0, (C, 1).

    e is exp(d), or that divided by its sum, whose logarithm is `log_total` (C, 1).
    """
    if may_read(e):
        total = shifted.mul_(e).sum(1, keepdim=True)
        if not total.isnan().any():  # of 0 · (-inf), mostly
            return total
    return torch.special.xlogy(e, e).sum(1, keepdim=True) + log_total


def may_read(rows: Tensor) -> bool:
    """Whether reading a mask costs no wait; there a block has to fit into the cache, too."""
    return rows.device.type == "cpu"


def _views(*grids: Tensor) -> list[tuple[int, tuple[Tensor, ...]]]:
    """(B, T, V) as (rows, V) without a copy, all at once or by sequence, each with the number of its first row."""
    b, t, _ = grids[0].shape
    if b == 1 or t == 1 or all(x.stride(0) == t * x.stride(1) for x in grids):
        return [(0, tuple(x.flatten(0, 1) for x in grids))]
    return [(i * t, tuple(x[i] for x in grids)) for i in range(b)]


def _picks(rows: Tensor, first: int, live: Tensor | None) -> Iterator[Pick]:
    """Which of these rows are worked on together; on a CPU without those that are not live."""
    n, block = len(rows), _block(rows)
    if live is not None and may_read(rows):
        chosen = live[first : first + n].nonzero().squeeze(1)
        if len(chosen) < n:
            yield from chosen.split(block) if len(chosen) else ()
            return
    for start in range(0, n, block):
        yield slice(start, min(start + block, n))


def _shift(pick: Pick, first: int) -> Pick:
    return slice(pick.start + first, pick.stop + first) if isinstance(pick, slice) else pick + first


def _read(rows: Tensor, number: Pick, unmasked: Tensor | None) -> Tensor:
    """What stands in a masked row, NaN included, must not reach a sum."""
    return rows if unmasked is None or may_read(rows) else torch.where(unmasked[number, None], rows, 0.0)


def _shifted(x: Tensor, top: Tensor, temperature: float, out: Tensor) -> Tensor:
    """(x - top) / temperature, exactly 0 at the largest."""
    shifted = torch.sub(x, top, out=out[: len(x)])
    return shifted if temperature == 1 else shifted.mul_(1 / temperature)


def _block(logits: Tensor) -> int:
    """Rows at a time."""
    n = logits.numel() // logits.shape[-1]
    return max(1, min(n, BLOCK_ELEMENTS // logits.shape[-1]) if may_read(logits) else n)


def _scratch(logits: Tensor, number: int) -> list[Tensor]:
    shape = (_block(logits), logits.shape[-1])
    return [torch.empty(shape, dtype=sum_dtype(logits.dtype), device=logits.device) for _ in range(number)]
