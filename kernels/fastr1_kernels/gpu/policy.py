"""The scalar work of one token in the loss kernel: objective, KL and sampler weight, each with its derivative.

Ratio r = exp(d), d = clamp(logp - logp_old, ±L) or 0 on-policy; r' = ∂r/∂logp, that is r inside the clamp, else 0:
    clipped   f = -min(min(r, δ)·A, clip(r, 1-ε, 1+ε_high)·A)   f' = -A·r' where the first is the smaller and r ≤ δ
    ratio     f = -r·A                                          f' = -A·r'
    capped    f = -min(r, cap)·A·logp                           f' = -min(r, cap)·A
    sigmoid   f = -A·(4/τ)·s, s = σ(τ(r - 1))                   f' = -4A·s·(1 - s)·r'
With q = logp_ref - logp:
    k1 = -q, k1' = 1      k2 = q²/2, k2' = -q      k3 = eᵠ - q - 1, k3' = 1 - eᵠ (input clamped to ±L)
About 30 operations on a few numbers per token, nothing beside its row of logits.

Sources: those of `options.LOSSES`, whose columns `objective` and `kl` are the first words above; the derivatives follow
from the formulas. Where a bound is met exactly, autograd splits the derivative and this does not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..options import LossOptions
from ..reference import clip_range, exponent_limit


def policy_arguments(options: LossOptions) -> dict[str, Any]:
    """What the loss kernel is told about the objective: numbers at run time, choices as constants."""
    low, high = clip_range(options)
    return {
        "beta": float(options.beta),
        "low": float(low),
        "high": float(high),
        "delta": float("inf") if options.delta is None else float(options.delta),
        "limit": float(exponent_limit(torch.float32, options.log_ratio_clamp)),
        "sampler_floor": float(options.sampler_floor),
        "sampler_cap": float(options.sampler_cap),
        "tau_pos": float(options.sapo_temperature_pos),
        "tau_neg": float(options.sapo_temperature_neg),
        "entropy_coef": float(options.entropy_coef),
        "OBJECTIVE": options.loss.objective,
        "KL": options.loss.kl or options.kl_estimator,
        "CORRECTION": options.sampler_correction,
    }


@triton.jit
def clamp(x, low, high):
    """min(max(x, low), high), where NaN stays NaN."""
    return cut(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high)


@triton.jit
def cut(x, high):
    """min(x, high), where NaN stays NaN."""
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def policy_term(ratio, slope, advantage, logp, low, high, delta, tau_pos, tau_neg, OBJECTIVE: tl.constexpr):
    """f and f' of the table above."""
    if OBJECTIVE == "ratio":
        return -ratio * advantage, -slope * advantage
    elif OBJECTIVE == "capped":
        capped = cut(ratio, high)
        return -capped * advantage * logp, -capped * advantage
    elif OBJECTIVE == "sigmoid":
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        sigmoid = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        return -advantage * (4.0 / tau) * sigmoid, -4.0 * advantage * sigmoid * (1.0 - sigmoid) * slope
    else:
        unclipped = cut(ratio, delta) * advantage
        clipped = clamp(ratio, low, high) * advantage
        is_flat = (unclipped > clipped) | (ratio > delta)
        return -cut(unclipped, clipped), tl.where(is_flat, 0.0, -slope * advantage)


@triton.jit
def k3_term(q):
    """eᵠ - q - 1; near 0 as its series, because exp(q) - q - 1 cancels in float32."""
    small = clamp(q, -0.5, 0.5)
    series = 1.0 + small / 8.0
    series = 1.0 + small / 7.0 * series
    series = 1.0 + small / 6.0 * series
    series = 1.0 + small / 5.0 * series
    series = 1.0 + small / 4.0 * series
    series = 1.0 + small / 3.0 * series
    return tl.where(tl.abs(q) < 0.5, small * small / 2.0 * series, tl.exp(q) - q - 1.0)


@triton.jit
def kl_term(q, limit, KL: tl.constexpr):
    """kl and ∂kl/∂logp for q = logp_ref - logp."""
    if KL == "k1":
        return -q, 1.0  # also for an infinite q
    elif KL == "k2":
        return q * q / 2.0, -q
    elif KL == "k3":
        kl = k3_term(clamp(q, -limit, limit))
        # 1 - eᵠ without cancellation
        return kl, tl.where((q < -limit) | (q > limit), 0.0, -(kl + q))
    else:  # "k3_output": k3 is cut at 100, as the original does; above q = 20 it is larger than that
        kl = k3_term(cut(q, 20.0))
        return cut(kl, 100.0), tl.where((kl > 100.0) | (q > 20.0), 0.0, -(kl + q))


@triton.jit
def sampler_term(log_weight, limit, floor, cap, CORRECTION: tl.constexpr):
    """The weight exp(logp_old - logp_sampler) after truncation or masking."""
    weight = tl.exp(clamp(log_weight, -limit, limit))
    if CORRECTION == "token_truncate":
        return cut(weight, cap)
    elif CORRECTION == "icepop":
        return tl.where((weight < floor) | (weight > cap), 0.0, weight)
    else:  # "token_mask"
        return tl.where(weight > cap, 0.0, weight)
