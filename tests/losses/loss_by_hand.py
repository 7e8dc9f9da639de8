"""The definition of the losses with Python floats and loops; nothing shared with the package."""

from __future__ import annotations

import math
from typing import Any

from loss_cases import ADVANTAGES, LOGITS, MASK, TOKEN_IDS, B, T

INF = float("inf")


def rows_by_hand(b: int, temperature: float) -> tuple[list[int], list[float], list[float]]:
    """Loss tokens of sequence b, their log-probabilities and entropies."""
    kept = [t for t in range(T) if MASK[b, t]]
    rows = [[z / temperature for z in LOGITS[b, t].tolist()] for t in kept]
    lse = [math.log(math.fsum(math.exp(z) for z in row)) for row in rows]
    logps = [row[TOKEN_IDS[b, t]] - s for row, s, t in zip(rows, lse, kept, strict=True)]
    entropies = [math.fsum(-(z - s) * math.exp(z - s) for z in row) for row, s in zip(rows, lse, strict=True)]
    return kept, logps, entropies


def policy_by_hand(o: dict[str, Any], ratio: float, a: float, logp: float) -> float:
    """The loss of one token before masks, corrections and KL."""
    if o["loss_type"] == "tinyllava_video_r1":
        return -ratio * a
    if o["loss_type"] == "cispo":
        return -min(ratio, o["epsilon_high"]) * a * logp
    if o["loss_type"] == "sapo":
        tau = 1.0 if a > 0 else o.get("sapo_temperature_neg", 1.05)
        return -a * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    assert o["loss_type"] in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo"), f"define {o['loss_type']} by hand"
    clipped = max(1 - o["epsilon"], min(1 + o.get("epsilon_high", o["epsilon"]), ratio))
    return -min(min(ratio, o.get("delta", INF)) * a, clipped * a)


def sampler_weight_by_hand(o: dict[str, Any], gaps: list[float], i: int) -> float:
    """Trainer over sampler, of a token or of a sequence, after truncation or masking."""
    level, _, action = o.get("sampler_correction", "token_truncate").partition("_")
    w, cap = math.exp(math.fsum(gaps) if level == "sequence" else gaps[i]), o.get("sampler_cap", 3.0)
    if level == "icepop":
        return w * (o.get("sampler_floor", 0.5) <= w <= cap)
    return min(w, cap) if action == "truncate" else w * (w <= cap)


def entropy_threshold_by_hand(entropies: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered, place = sorted(entropies), (1 - share) * (len(entropies) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def reduce_by_hand(o: dict[str, Any], sequences: list[list[float]]) -> float:
    total = math.fsum(math.fsum(s) for s in sequences)
    return {
        "grpo": lambda: math.fsum(math.fsum(s) / max(len(s), 1) for s in sequences) / B,
        "sapo": lambda: math.fsum(math.fsum(s) / max(len(s), 1) for s in sequences) / B,
        "tinyllava_video_r1": lambda: math.fsum(math.fsum(s) / max(len(s), 1) for s in sequences) / B,
        "luspo": lambda: total / B,
        "dr_grpo": lambda: total / (B * o["max_completion_length"]),
        "bnpo": lambda: total / sum(len(s) for s in sequences),
        "dapo": lambda: total / o["normalizer"],
        "cispo": lambda: total / o["normalizer"],
    }[o["loss_type"]]()


def loss_by_hand(arguments: dict[str, Any]) -> float:
    o = {"epsilon": 0.2, "beta": 0.0, "entropy_coef": 0.0, "temperature": 1.0, "log_ratio_clamp": 20.0} | arguments
    clamp = o["log_ratio_clamp"] or INF
    rows = [rows_by_hand(b, o["temperature"]) for b in range(B)]
    threshold = entropy_threshold_by_hand([h for _, _, e in rows for h in e], o.get("top_entropy_quantile", 1.0))
    sequences: list[list[float]] = []
    for b, (kept, logps, entropies) in enumerate(rows):
        olds = o["old_logps"][b, kept].tolist() if "old_logps" in o else logps
        samplers = o["sampler_logps"][b, kept].tolist() if "sampler_logps" in o else None
        d = [p - q for p, q in zip(logps, olds, strict=True)]
        if o.get("importance_sampling_level") == "sequence":
            d = [math.fsum(d) / max(len(d), 1)] * len(d)
        drift = math.fsum(q - p for p, q in zip(logps, samplers or olds, strict=True)) / max(len(kept), 1)
        a, tokens = ADVANTAGES[b].item(), []
        for i in range(len(kept)):
            loss = policy_by_hand(o, math.exp(max(-clamp, min(clamp, d[i]))), a, logps[i])
            if drift > o.get("off_policy_threshold", INF) and a < 0:
                loss = 0.0
            if entropies[i] < threshold:
                loss = 0.0
            if samplers:
                loss *= sampler_weight_by_hand(o, [q - s for q, s in zip(olds, samplers, strict=True)], i)
            if o["beta"]:
                q = o["ref_logps"][b, kept[i]].item() - logps[i]
                bounded = max(-clamp, min(clamp, q))
                kl = {"k1": -q, "k2": q * q / 2, "k3": math.exp(bounded) - bounded - 1}
                loss += o["beta"] * kl[o.get("kl_estimator", "k3")]
            tokens.append(loss - o["entropy_coef"] * entropies[i])
        sequences.append(tokens)
    return reduce_by_hand(o, sequences)
