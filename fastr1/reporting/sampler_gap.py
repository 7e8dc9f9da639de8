"""How far the probabilities of the sampler are from those of the trainer, on the sampled tokens.

Both are of the softmax of the whole vocabulary at the same temperature, so that what is left is rounding, or a sampler
that computes another model. That top_k, top_p and min_p draw from a part of it is no part of the distance.

With Δ = log p_trainer − log p_sampler of a token and w = exp(Δ): the mean of |Δ|; k3 = w − 1 − Δ, an estimate of
KL(sampler ‖ trainer) that is never negative; the largest w; the effective sample size (Σw)² / (n·Σw²), 1 where both
agree: how many samples would be left, in effect, if they were weighed by w, as a share of all.
"""

from __future__ import annotations

import torch

from fastr1.reporting.statistics import Metrics, Ranks, TokenSums, maxima


class SamplerGap:
    """Adds up over micro-batches, in float64."""

    def __init__(self, device: torch.device) -> None:
        self._sums = TokenSums()
        self._largest = torch.full((), -torch.inf, dtype=torch.float64, device=device)

    def add(self, trainer_logps: torch.Tensor, full_logps: torch.Tensor) -> None:
        """Adds tokens; both (N,), of the whole vocabulary, N may be 0. Every rank calls it at least once."""
        gap = trainer_logps.detach().double() - full_logps.double()
        ratio = gap.exp()
        count = torch.tensor(float(len(gap)), device=gap.device)
        parts = {"gap": gap.abs(), "k3": ratio - 1 - gap, "ratio": ratio, "squares": ratio.square()}
        self._sums.add({name: (values.sum(), count) for name, values in parts.items()})
        if len(gap):
            self._largest = torch.maximum(self._largest, gap.amax())

    def metrics(self, ranks: Ranks) -> Metrics:
        """sampler_gap, sampler_k3, sampler_ratio_max, sampler_ess over all ranks; zeros and ones where no token was
        added. All ranks call it."""
        means = self._sums.means(ranks)
        largest = maxima(ranks, {"gap": self._largest.item()})["gap"]
        has_tokens = largest > -torch.inf
        return {
            "sampler_gap": means["gap"],
            "sampler_k3": means["k3"],
            "sampler_ratio_max": torch.tensor(largest, dtype=torch.float64).exp().item() if has_tokens else 1.0,
            "sampler_ess": means["ratio"] ** 2 / means["squares"] if has_tokens else 1.0,
        }
