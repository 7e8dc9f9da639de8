"""From the log-probabilities of loss tokens to the loss, in torch: the end of every path but the one launch.

Everything here has the shape of the tokens, with `where` for the mask: nothing waits for the device. Where a token's
loss depends on its own row alone, every token stands for itself, (N, 1); else tokens are placed in a (B, T) grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .advantages import dispatch_group_advantages
from .checks import LossArguments
from .dispatch import is_per_token
from .reference import Metrics

LossOutput = tuple[Tensor, Metrics, Tensor, Tensor | None, Tensor]  # the fields of GRPOOutput


class Sequences:
    """Which sequence every token belongs to, padded or packed input alike."""

    def __init__(self, token_ids: Tensor, cu_seqlens: Tensor | None, read_values: bool = True) -> None:
        rows = torch.arange(token_ids.numel(), device=token_ids.device)
        if cu_seqlens is None:
            self.is_padded = True
            self.number, self.longest = token_ids.shape
            self.index, self.position = rows // max(self.longest, 1), rows % max(self.longest, 1)
            return
        self.is_padded = False
        bounds = cu_seqlens.long()
        self.number = len(bounds) - 1
        self.index = torch.searchsorted(bounds, rows, right=True) - 1  # (N,)
        self.position = rows - bounds.gather(0, self.index)  # (N,)
        # The longest sequence is known to the device only; without reading it any may be as long as all together.
        self.longest = max(bounds.diff().tolist(), default=0) if read_values else len(rows)

    def place(self, values: Tensor) -> Tensor:
        """Values of tokens (N,) in a (B, T) grid of zeros."""
        grid = torch.zeros(self.number, self.longest, dtype=values.dtype, device=values.device)
        return grid.index_put((self.index, self.position), values)

    def sum(self, values: Tensor) -> Tensor:
        """(B,) sums over the tokens of each sequence, as integers, so that no order matters."""
        return torch.zeros(self.number, dtype=torch.long, device=values.device).index_add(0, self.index, values.long())

    def spread(self, values: Tensor) -> Tensor:
        """Values of sequences (B,) for every token, (N,)."""
        return values.gather(0, self.index)


class TokenLoss:
    """The loss of checked arguments as a function of log-probabilities and entropies of all tokens, (N,) each.

    Without `has_entropy` entropies are not read.
    """

    def __init__(self, token_ids: Tensor, mask: Tensor, arguments: LossArguments, is_narrow: bool = False) -> None:
        """With `is_narrow` gradients are kept in float16, where those of the order of a weight would be lost."""
        self.options, self.shape, self.has_entropy = arguments.options, token_ids.shape, arguments.has_entropy
        self.mask = mask.reshape(-1)
        self.is_per_token = is_per_token(self.options, has_sampler=arguments.sampler_logps is not None)
        read_values = arguments.check_values and not self.is_per_token
        self.sequences = Sequences(token_ids, arguments.cu_seqlens, read_values)
        self.advantages = advantages_of(arguments)
        per_sequence = self.advantages.shape == (self.sequences.number,)
        self.token_advantages = (
            self.sequences.spread(self.advantages) if per_sequence else self.advantages.reshape(-1)
        )  # (N,)
        names = ("old_logps", "ref_logps", "sampler_logps")
        given = {name: getattr(arguments, name) for name in names}
        self.given = {name: self._place(x.reshape(-1)) for name, x in given.items() if x is not None}
        counts = self.sequences.sum(self.mask)
        self.weights = reference.sequence_weights(counts, self.options, arguments.normalizer, torch.float64)  # (B,)
        self.unit = torch.ones((), dtype=torch.float64, device=token_ids.device)
        if is_narrow and len(self.weights):  # a power of two near the largest weight
            largest = self.weights.amax()
            self.unit = torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)

    def __call__(self, logps: Tensor, entropy: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """The part of the loss (0-d), and of the metrics, that the tokens of `mask` have; None: of all."""
        mask = self.mask if mask is None else mask
        entropy = entropy if self.options.entropy_coef else entropy.detach()
        per_token, metrics = reference.token_losses(
            self._place(torch.where(mask, logps, 0.0)),
            self._place(mask),
            self._place(self.token_advantages),
            self.options,
            entropy=self._place(torch.where(mask, entropy, 0.0)) if self.has_entropy else None,
            **self.given,
        )
        weights = self.sequences.spread(self.weights) if self.is_per_token else self.weights
        return (per_token * weights.to(per_token.dtype)[:, None]).sum(), metrics

    def gradients(self, logps: Tensor, entropy: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """∂loss/∂logp, ∂loss/∂entropy over `unit` of the tokens `rows`, whole sequences where the loss needs them."""
        zeros = torch.zeros(len(self.mask), dtype=logps.dtype, device=logps.device)
        mask = self.mask & torch.zeros_like(self.mask).index_fill(0, rows, True)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (logps, entropy)]
            loss, _ = self(zeros.index_copy(0, rows, leaves[0]), zeros.index_copy(0, rows, leaves[1]), mask)
        used = leaves if self.options.entropy_coef else leaves[:1]
        d_logps, *d_entropy = torch.autograd.grad(loss, used, (1 / self.unit).to(loss.dtype))
        return d_logps, d_entropy[0] if d_entropy else None

    def has_signal(self) -> Tensor:
        """Which loss tokens can have a gradient, (N,) bool: without KL and bonus none where the advantage is 0.

        Every objective is a multiple of the advantage. Where tokens depend on one another, their sequence decides.
        """
        if self.options.entropy_coef or (self.options.beta and "ref_logps" in self.given):
            return self.mask
        signal = self.mask & (self.token_advantages != 0)
        return signal if self.is_per_token else self.mask & (self.sequences.spread(self.sequences.sum(signal)) > 0)

    def output(self, logps: Tensor, entropy: Tensor) -> LossOutput:
        """The fields of `GRPOOutput`; logps and entropy are (N,), of any value where masked."""
        loss, metrics = self(logps, entropy)
        logps, entropy = (torch.where(self.mask, x.detach(), 0.0).view(self.shape) for x in (logps, entropy))
        return loss, metrics, logps, entropy if self.has_entropy else None, self.advantages

    def _place(self, values: Tensor) -> Tensor:
        return values[:, None] if self.is_per_token else self.sequences.place(values)


def metric_names(arguments: LossArguments) -> tuple[str, ...]:
    """The metrics of a loss, known without computing it."""
    options = arguments.options
    wanted = {
        "on_policy": options.off_policy_threshold is not None,
        "high_entropy": options.top_entropy_quantile < 1,
        "sampler_weight": arguments.sampler_logps is not None,
        "kl": arguments.ref_logps is not None,
        "entropy": arguments.has_entropy,
    }
    return "ratio", *options.loss.clip_metrics, *(name for name, is_wanted in wanted.items() if is_wanted)


def advantages_of(arguments: LossArguments) -> Tensor:
    """(B,) from rewards, or the given ones."""
    if arguments.rewards is None:
        assert arguments.advantages is not None
        return reference.upcast(arguments.advantages.detach())
    advantages = dispatch_group_advantages(
        arguments.rewards,
        arguments.num_generations,
        group_ids=arguments.group_ids,
        scale_rewards=arguments.options.scale_rewards,
        eps=arguments.options.advantage_eps,
        leave_one_out=arguments.options.leave_one_out,
    )
    return advantages if arguments.sequence_index is None else advantages.gather(0, arguments.sequence_index.long())
