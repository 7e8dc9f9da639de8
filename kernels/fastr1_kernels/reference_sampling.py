"""The specification of `sample_tokens` in plain torch, dense and without shortcuts: float64-capable, reads no value.

With x the logits, T the temperature, m the largest allowed x, a column is kept if it is allowed and x >= each of
    top_k   the top_k-th largest x
    top_p   of what top_k keeps, the largest v with Σ_{x >= v} exp((x - m)/T) >= top_p · Σ exp((x - m)/T)
    min_p   m + T·log(min_p).
Every rule is a bound on x, so that equal logits are kept or left out together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor,  # (R, V)
    noise: Tensor | None,  # (R, V); None with temperature 0
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: Tensor | None = None,  # (V,) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, logps, full_logps, each (R,)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    x_allowed = x if allowed is None else x.masked_fill(~allowed, -math.inf)
    if temperature == 0:
        z, kept, score = x, x_allowed, x_allowed
    else:
        z = x / temperature
        kept = torch.where(kept_columns(x_allowed, temperature, top_k, top_p, min_p), z, -math.inf)
        assert noise is not None
        score = kept + noise
    # A row without a kept column still names an allowed one.
    score = score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp(min=-1e30)
    score = score if allowed is None else score.masked_fill(~allowed, -math.inf)
    token = score.argmax(-1)  # the first of equals
    full, drawn = z.log_softmax(-1), kept.log_softmax(-1)
    bad = full.isnan().any(-1) | drawn.isnan().any(-1)
    logps, full_logps = (p.gather(-1, token[:, None])[:, 0].masked_fill(bad, math.nan) for p in (drawn, full))
    return token, logps, full_logps


def kept_columns(
    logits: Tensor,  # (R, V), -inf where not allowed
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """What truncation keeps, (R, V) bool."""
    bound = torch.full_like(logits[:, :1], -math.inf)
    if top_k > 0:
        bound = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
    if top_p < 1:
        left = logits.masked_fill(logits < bound, -math.inf)
        ordered = left.sort(-1, descending=True).values
        mass = (ordered / temperature).softmax(-1).cumsum(-1)
        larger = torch.cat([torch.zeros_like(bound), mass[:, :-1]], -1)  # of the columns before
        bound = ordered.gather(-1, ((larger < top_p).sum(-1, keepdim=True) - 1).clamp(min=0))
    if min_p > 0:
        bound = bound.maximum(logits.amax(-1, keepdim=True) + temperature * math.log(min_p))
    return (logits >= bound) & (logits > -math.inf)
