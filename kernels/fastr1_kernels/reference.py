"""The specification: every operation on logits and log-probabilities once, in plain torch, without memory tricks.

It runs in float32 (half types are raised to it) and, given float64, in float64, which is the gold of the tests. Nothing
is validated here; the public functions of `losses` and `logps` do that. Which objective, reduction and
denominator a loss has is read from its row of `options.LOSSES`.

Symbols in shapes: B sequences, T completion length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import LossOptions

Metrics = dict[str, tuple[Tensor, Tensor]]


def upcast(x: Tensor) -> Tensor:
    """Half types, integers and booleans to float32; float32 and float64 unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...,)
    temperature: float | Tensor = 1.0,  # or (...,)
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, both (...,)."""
    logits = upcast(logits) / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    if top_k is not None or top_p is not None:
        logits = torch.where(kept_columns(logits.detach(), token_ids, top_k, top_p), logits, -math.inf)
    log_probs = F.log_softmax(logits, dim=-1)
    logps = log_probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    # A column of -inf has probability 0 and adds 0 to the entropy, not 0 · (-inf).
    finite = log_probs.masked_fill(log_probs == -math.inf, 0.0)
    return logps, -(log_probs.exp() * finite).sum(-1)


def kept_columns(
    logits: Tensor,  # (..., V), after the temperature
    token_ids: Tensor,  # (...,)
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """What a sampler keeps, (..., V) bool: the top_k largest logits, of these the fewest whose probabilities reach
    top_p, equal ones together, and the token itself, whatever a rounding of its logit does."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None:
        kept = logits >= logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    if top_p is not None:
        ordered = logits.masked_fill(~kept, -math.inf).sort(dim=-1, descending=True).values
        p = ordered.softmax(-1)
        count = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True).clamp(min=1)
        kept = kept & (logits >= ordered.gather(-1, count - 1))
    return kept.scatter(-1, token_ids.unsqueeze(-1), True)


def linear_logits(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    *,
    lora_a: Tensor | None = None,  # (r, D)
    lora_b: Tensor | None = None,  # (V, r)
    lora_scale: float = 1.0,
) -> Tensor:
    """z = logit_scale · (hidden @ (weight + lora_scale · lora_b @ lora_a)ᵀ + bias), then softcap · tanh(z / softcap)
    where there is a cap, (..., V). Products are taken in the dtype of the inputs."""
    logits = F.linear(hidden, weight, bias)
    if lora_a is not None and lora_b is not None:
        logits = logits + lora_scale * F.linear(F.linear(hidden, lora_a), lora_b)
    logits = upcast(logits) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_logps(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (...,)
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    **head: Any,  # as linear_logits
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` of the logits of a linear head."""
    logits = linear_logits(hidden, weight, **head)
    return selective_log_softmax(logits, token_ids, temperature, top_k=top_k, top_p=top_p)


def kl_divergence(logps: Tensor, ref_logps: Tensor, estimator: str = "k3", clamp: float | None = 20.0) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) with q = ref_logps - logps: k1 = -q, k2 = q²/2, k3 = eᵠ - q - 1.

    `clamp` bounds the input of k3. "k3_output" bounds its output by 100 instead.
    """
    q = ref_logps - logps
    if estimator == "k1":
        return -q
    if estimator == "k2":
        return q.square() / 2
    if estimator == "k3_output":  # above 20 it is 100 with gradient 0 either way
        return _k3(q.clamp(max=20.0)).clamp(-100.0, 100.0)
    limit = exponent_limit(q.dtype, clamp)
    return _k3(q.clamp(-limit, limit))


def _k3(q: Tensor) -> Tensor:
    """eᵠ - q - 1 without cancellation: near 0 its Taylor series, which autograd differentiates as accurately."""
    small = q.clamp(-0.03, 0.03)
    series = torch.ones_like(q)
    for n in (8, 7, 6, 5, 4, 3):
        series = 1 + small / n * series
    return torch.where(q.abs() < 0.03, small.square() / 2 * series, torch.expm1(q) - q)


def exponent_limit(dtype: torch.dtype, clamp: float | None) -> float:
    """Largest |x| handed to exp. Beyond it exp overflows, and the gradient of an unselected inf is NaN."""
    overflow = float(math.floor(math.log(torch.finfo(dtype).max)))
    return overflow if clamp is None else min(clamp, overflow)


def policy_loss_from_logps(
    logps: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool, True = loss token
    advantages: Tensor,  # (B,) or (B, T)
    options: LossOptions,
    *,
    normalizer: float | Tensor | None = None,  # loss tokens or sequences of the whole update
    **given: Tensor | None,  # as token_losses
) -> tuple[Tensor, Metrics]:
    """Reduce log-probabilities to the loss (0-d) and to metrics: name → (sum, count) over the loss tokens."""
    per_token, metrics = token_losses(logps, mask, advantages, options, **given)
    return (per_token * sequence_weights(mask.sum(1), options, normalizer, per_token.dtype)[:, None]).sum(), metrics


def token_losses(
    logps: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    advantages: Tensor,  # (B,) or (B, T)
    options: LossOptions,
    *,
    old_logps: Tensor | None = None,  # (B, T); None: on-policy
    ref_logps: Tensor | None = None,  # (B, T)
    sampler_logps: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Metrics]:
    """The loss of every token before any weight, (B, T), 0 where masked; and the metrics."""
    # Masking comes before every exp: exp(200) · 0 is NaN, in the value or in the gradient.
    logps = torch.where(mask, upcast(logps), 0.0)
    old = logps.detach() if old_logps is None else _constant(old_logps, mask, logps.dtype)
    advantages = advantages.detach().to(logps.dtype)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    limit = exponent_limit(logps.dtype, options.log_ratio_clamp)
    count = mask.sum()
    metrics: Metrics = {}

    def record(name: str, value: Tensor) -> None:
        metrics[name] = (torch.where(mask, value.detach().to(logps.dtype), 0.0).sum(), count)

    log_ratio = logps - old
    if options.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.clamp(-limit, limit).exp()
    record("ratio", ratio)
    per_token = policy_term(ratio, logps, advantages, options)
    low, high = clip_range(options)
    if "clip_low" in options.loss.clip_metrics:
        record("clip_low", (ratio < low) & (advantages < 0))
    if "clip_high" in options.loss.clip_metrics:
        record("clip_high", (ratio > high) & (advantages > 0))

    sampler = None if sampler_logps is None else _constant(sampler_logps, mask, logps.dtype)
    if options.off_policy_threshold is not None:
        drift = torch.where(mask, (old if sampler is None else sampler) - logps.detach(), 0.0).sum(1, keepdim=True)
        drift = drift / mask.sum(1, keepdim=True).clamp(min=1)
        kept = (advantages >= 0) | (drift <= options.off_policy_threshold)
        record("on_policy", kept)
        per_token = torch.where(kept, per_token, 0.0)
    if options.top_entropy_quantile < 1:
        assert entropy is not None
        kept = _highest(entropy.detach(), mask, options.top_entropy_quantile)
        record("high_entropy", kept)
        per_token = torch.where(kept, per_token, 0.0)
    if sampler is not None:
        sampler_weight = _sampler_weight(old - sampler, options, limit)
        per_token = per_token * sampler_weight
        record("sampler_weight", sampler_weight)
    if ref_logps is not None:
        ref = _constant(ref_logps, mask, logps.dtype)
        kl = kl_divergence(logps, ref, options.loss.kl or options.kl_estimator, options.log_ratio_clamp)
        record("kl", kl)
        per_token = per_token + options.beta * kl if options.beta else per_token

    if entropy is not None:
        record("entropy", entropy)
        per_token = per_token - options.entropy_coef * entropy if options.entropy_coef else per_token
    return torch.where(mask, per_token, 0.0), metrics


def _constant(x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask, x.detach().to(dtype), 0.0)


def clip_range(options: LossOptions) -> tuple[float, float]:
    """Smallest and largest ratio that is not clipped."""
    if options.loss.objective == "capped":
        assert options.epsilon_high is not None
        return 0.0, options.epsilon_high
    return 1 - options.epsilon, 1 + (options.epsilon if options.epsilon_high is None else options.epsilon_high)


def policy_term(ratio: Tensor, logps: Tensor, advantages: Tensor, options: LossOptions) -> Tensor:
    """The loss of each token, (B, T) or (B, 1), before masks, corrections and KL."""
    low, high = clip_range(options)
    objective = options.loss.objective
    if objective == "ratio":
        return -ratio * advantages
    if objective == "capped":
        return -ratio.detach().clamp(max=high) * advantages * logps
    if objective == "sigmoid":
        # Two Python numbers in `where` would make float32.
        temperature = torch.full_like(advantages, options.sapo_temperature_neg)
        temperature = temperature.masked_fill(advantages > 0, options.sapo_temperature_pos)
        return -advantages * (4 / temperature) * torch.sigmoid(temperature * (ratio - 1))
    assert objective == "clipped", objective
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
    return -torch.min(bounded * advantages, ratio.clamp(low, high) * advantages)


def _highest(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Which tokens belong to the `share` of loss tokens of highest entropy, (B, T) bool.

    The threshold lies between two order statistics, as in torch.quantile.
    """
    if not entropy.numel():
        return mask
    ordered = torch.where(mask, entropy, math.inf).flatten().sort().values
    place = ((1 - share) * (mask.sum() - 1).to(torch.float64)).clamp(min=0).view(1)
    low, high = (ordered.gather(0, x.long()) for x in (place.floor(), place.ceil()))
    threshold = torch.lerp(low, high, (place - place.floor()).to(low.dtype))
    return entropy >= torch.where((entropy.isnan() & mask).any(), math.nan, threshold)


def _sampler_weight(log_ratio: Tensor, options: LossOptions, limit: float) -> Tensor:
    """Trainer/sampler ratio of a token or of its whole sequence, cut to the cap or dropped beyond it."""
    level, _, action = options.sampler_correction.partition("_")
    log_ratio = log_ratio.sum(1, keepdim=True) if level == "sequence" else log_ratio
    weight = log_ratio.clamp(-limit, limit).exp()
    if options.sampler_correction == "icepop":
        return torch.where((weight < options.sampler_floor) | (weight > options.sampler_cap), 0.0, weight)
    if action == "truncate":
        return weight.clamp(max=options.sampler_cap)
    return torch.where(weight > options.sampler_cap, 0.0, weight)


def sequence_weights(
    num_tokens: Tensor,  # (B,) loss tokens of each sequence
    options: LossOptions,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(B,): the loss is the sum of all tokens' losses, each times the weight of its sequence."""
    denominator = loss_denominator(num_tokens.sum(), len(num_tokens), options, normalizer)
    if options.loss.reduction == "sequence_means":
        denominator = denominator * num_tokens.clamp(min=1)
    return (1 / denominator).to(dtype).expand(len(num_tokens))


def loss_denominator(
    num_tokens: Tensor, num_sequences: int, options: LossOptions, normalizer: float | Tensor | None
) -> Tensor:
    """0-d float64: the count given as `normalizer`, or else that of this call."""
    if normalizer is None:
        normalizer = num_tokens if options.loss.counts == "tokens" else num_sequences
    if isinstance(normalizer, Tensor):
        denominator = normalizer.to(num_tokens.device, torch.float64)
    else:
        denominator = torch.full((), normalizer, dtype=torch.float64, device=num_tokens.device)
    if options.loss.denominator == "sequences_times_length":
        assert options.max_completion_length is not None
        denominator = denominator * options.max_completion_length
    # A denominator of 0 means that there is no loss token anywhere: loss 0 and gradients 0.
    return torch.where(denominator == 0, math.inf, denominator)


def grpo_loss(
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    advantages: Tensor,  # (B,) or (B, T)
    options: LossOptions,
    *,
    normalizer: float | Tensor | None = None,
    **given: Tensor | None,  # old_logps, ref_logps, sampler_logps, (B, T)
) -> tuple[Tensor, Metrics]:
    """`policy_loss_from_logps` of padded logits."""
    logits = torch.where(mask[..., None], logits, 0.0)
    logps, entropy = selective_log_softmax(logits, torch.where(mask, token_ids, 0), options.temperature)
    return policy_loss_from_logps(logps, mask, advantages, options, normalizer=normalizer, entropy=entropy, **given)
