"""verl's policy losses (0.9) and its head, under verl's signatures; nothing of verl is imported but to register.

Loss modes: vanilla (dual clip), gspo, sapo, cispo. Denominators follow `config.global_batch_info`; a sequence without
loss tokens counts in none of them. Different on purpose:
- `clip_ratio_c` must exceed 1 + the upper clip ratio: below it the dual clip would cut inside the trust region;
- sapo is the mean of sequence means, as in verl, which reads no `loss_agg_mode` there: another one is refused;
- gspo clamps its log ratio to ±10, verl to at most 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import check_shape
from ..logps import linear_logps
from ..options import LossOptions, check_choice, require

MODES = ("vanilla", "gspo", "sapo", "cispo")
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def policy_loss(
    old_log_prob: Tensor,  # (B, T)
    log_prob: Tensor,  # (B, T)
    advantages: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T), 0 or 1
    loss_agg_mode: str = "token-mean",
    config: Any = None,  # has clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos, tau_neg, …
    rollout_is_weights: Tensor | None = None,  # (B, T) or (B, 1), ≥ 0
    *,
    loss_mode: str | None = None,  # one of MODES; None: config.policy_loss.loss_mode
) -> tuple[Tensor, dict[str, float]]:
    """The policy loss and verl's three metrics as floats, which waits for the device once, as verl does.

    KL and entropy are verl's own business, after this function.
    """
    mode = _mode(config, loss_mode)
    shape, mask = tuple(log_prob.shape), response_mask.bool()
    for name, x in (("old_log_prob", old_log_prob), ("advantages", advantages), ("response_mask", response_mask)):
        check_shape(name, x, shape, log_prob.device)
    low, high = _clip_ratios(config)
    log_ratio = torch.where(mask, log_prob.detach() - old_log_prob.detach(), 0.0)
    weights = 1.0 if rollout_is_weights is None else rollout_is_weights
    # The policy term is linear in the advantage: a weight ≥ 0 of the term is one of the advantage.
    weighted = torch.where(mask, advantages.detach() * weights, 0.0)
    clamp, old = 20.0, old_log_prob.detach()
    if mode == "gspo":  # the value is the sequence's ratio, the gradient that of the token
        clamp, old = 10.0, log_prob.detach() - log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (log_prob.detach() - old).clamp(-clamp, clamp).exp()
    loss_type, normalizer = _aggregate(loss_agg_mode, mask, config, mode)
    if mode == "cispo":  # the cut ratio is a constant: a weight too, and so is the mean over a sequence
        weighted = weighted * ratio.clamp(1 - low, 1 + high)
        weighted = weighted / mask.sum(1, keepdim=True).clamp(min=1) if loss_type == "grpo" else weighted
    options = _options(mode, loss_type, low, high, clamp, config)
    loss, _ = reference.policy_loss_from_logps(
        log_prob,
        mask,
        weighted,
        options,
        old_logps=None if mode == "cispo" else old,
        normalizer=normalizer,
    )
    if mode != "gspo":
        log_ratio = log_ratio.clamp(-clamp, clamp)
    return loss, _metrics(mode, log_ratio, ratio, advantages, mask, (low, high, options.delta))


def register_policy_losses(prefix: str = "fastr1_") -> list[str]:
    """Register all modes with an installed verl, as `actor.policy_loss.loss_mode=fastr1_vanilla` and so on."""
    register = import_module("verl.trainer.ppo.core_algos").register_policy_loss
    names = [prefix + mode for mode in MODES]
    for name, mode in zip(names, MODES, strict=True):
        register(name)(partial(policy_loss, loss_mode=mode))
    return names


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, (N,) or their sum or mean, and the entropy (N,) of a linear head; float32, differentiable."""
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    require(dist_process_group is None, "dist_process_group: a head sharded over its vocabulary is not supported")
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    logps, entropy = linear_logps(rows, weight, ids, temperature=temperature, return_entropy=True)
    if reduction != "none":
        logps = logps.sum() if reduction == "sum" else logps.mean()
    return logps, entropy


def _read(config: Any, name: str, default: Any = None) -> Any:
    value = config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)
    return default if value is None else value


def _mode(config: Any, loss_mode: str | None) -> str:
    require(config is not None, "config=None: give verl's actor configuration")
    mode = loss_mode or _read(_read(config, "policy_loss", {}), "loss_mode", "vanilla")
    check_choice("loss_mode", mode, MODES)
    return mode


def _clip_ratios(config: Any) -> tuple[float, float]:
    both = _read(config, "clip_ratio", 0.2)
    low, high = (_read(config, f"clip_ratio_{side}", both) for side in ("low", "high"))
    return float(low), float(high)


def _aggregate(mode: str, mask: Tensor, config: Any, loss_mode: str) -> tuple[str, float | Tensor]:
    """The loss of `LOSSES` that adds up in this way, and its denominator; gradients are averaged over processes."""
    check_choice("loss_agg_mode", mode, AGGREGATIONS)
    batch = dict(_read(config, "global_batch_info", {}))
    num_processes = batch.pop("dp_size", None) or 1
    num_tokens, num_sequences = batch.pop("batch_num_tokens", None), batch.pop("global_batch_size", None)
    scale = batch.pop("loss_scale_factor", None)
    require(not batch, f"global_batch_info has {', '.join(batch)}: not known here")
    needed, given = ("batch_num_tokens", num_tokens) if mode == "token-mean" else ("global_batch_size", num_sequences)
    local = num_processes == 1 or mode == "token-sum" or given is not None
    require(local, f"dp_size={num_processes} with loss_agg_mode={mode!r} needs {needed} in global_batch_info")
    if loss_mode == "sapo":
        require(mode == "seq-mean-token-mean", f"loss_agg_mode={mode!r}: sapo is 'seq-mean-token-mean' always")
    if mode == "token-sum":
        return "bnpo", 1 / num_processes
    if mode == "token-mean":
        return "bnpo", (mask.sum() if num_tokens is None else num_tokens) / num_processes
    sequences = (mask.any(1).sum() if num_sequences is None else num_sequences) / num_processes
    if mode == "seq-mean-token-mean":
        return "grpo", sequences
    return "bnpo", sequences * ((scale or mask.shape[1]) if mode.endswith("norm") else 1)


def _options(mode: str, loss_type: str, low: float, high: float, clamp: float, config: Any) -> LossOptions:
    if mode == "sapo":
        options = LossOptions(
            loss_type="sapo",
            sapo_temperature_pos=float(_read(config, "tau_pos", 1.0)),
            sapo_temperature_neg=float(_read(config, "tau_neg", 1.05)),
            log_ratio_clamp=clamp,
        )
    elif mode == "cispo":
        options = LossOptions(loss_type="cispo", epsilon_high=1.0, log_ratio_clamp=clamp)  # of a ratio of 1
    else:
        delta = float(_read(config, "clip_ratio_c", 3.0)) if mode == "vanilla" else None
        options = LossOptions(loss_type=loss_type, epsilon=low, epsilon_high=high, delta=delta, log_ratio_clamp=clamp)
    options.check()
    return options


def _metrics(
    mode: str,
    log_ratio: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bounds: tuple[float, float, float | None],  # low, high, dual clip
) -> dict[str, float]:
    low, high, dual = bounds
    outside_low, outside_high = ratio < 1 - low, ratio > 1 + high
    clipped = outside_low | outside_high
    if mode == "sapo":
        clipped = torch.zeros_like(mask)
    elif mode != "cispo":
        clipped = (outside_low & (advantages < 0)) | (outside_high & (advantages > 0))
    dually = (ratio > dual) & (advantages < 0) if mode == "vanilla" and dual is not None else torch.zeros_like(mask)
    sums = [torch.where(mask, x.to(log_ratio.dtype), 0.0).sum() for x in (clipped, -log_ratio, dually)]
    clip, kl, clip_lower = (torch.stack(sums) / mask.sum().clamp(min=1)).tolist()
    return {"actor/pg_clipfrac": clip, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": clip_lower}
