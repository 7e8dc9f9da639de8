"""From the log-probabilities of loss tokens to the loss, in torch: the end of every path but the one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .advantages import dispatch_group_advantages
from .checks import LossArguments
from .reference import Metrics


def loss_of_tokens(
    logps: Tensor,  # (n,), of the n loss tokens in their order
    entropy: Tensor,  # (n,)
    token_ids: Tensor,  # (B, T) padded, (N,) packed
    mask: Tensor,  # as token_ids, bool
    arguments: LossArguments,
) -> tuple[Tensor, Metrics, Tensor, Tensor, Tensor]:
    """The fields of `GRPOOutput` for checked arguments."""
    options = arguments.options
    entropy = entropy if options.entropy_coef else entropy.detach()
    advantages = advantages_of(arguments)
    grid = _Grid(token_ids, mask, arguments.cu_seqlens)
    per_sequence = advantages.shape == (grid.shape[0],)

    def place_given(x: Tensor | None) -> Tensor | None:
        return None if x is None else grid.place(x[mask])

    loss, metrics = reference.policy_loss_from_logps(
        grid.place(logps),
        grid.place(torch.ones_like(logps, dtype=torch.bool)),
        advantages if per_sequence else grid.place(advantages[mask]),
        options,
        normalizer=arguments.normalizer,
        old_logps=place_given(arguments.old_logps),
        ref_logps=place_given(arguments.ref_logps),
        sampler_logps=place_given(arguments.sampler_logps),
        entropy=grid.place(entropy),
    )
    return loss, metrics, _scatter(logps, mask), _scatter(entropy, mask), advantages


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
    return advantages if arguments.sequence_index is None else advantages[arguments.sequence_index.long()]


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Detached values (n,) at the True places of `mask`, 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    out[mask] = values.detach()
    return out


class _Grid:
    """Places values of loss tokens (n,) in a (B, T) grid of zeros, a row per sequence, padded or packed input alike."""

    def __init__(self, token_ids: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> None:
        position = mask.reshape(-1).nonzero().squeeze(1)
        if cu_seqlens is None:
            self.shape = tuple(token_ids.shape)
            self.index = (position // max(self.shape[1], 1), position % max(self.shape[1], 1))
            return
        cu_seqlens = cu_seqlens.long()
        sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1
        lengths = cu_seqlens.diff().tolist()
        self.shape = (len(lengths), max(lengths, default=0))
        self.index = (sequence, position - cu_seqlens[sequence])

    def place(self, values: Tensor) -> Tensor:
        return torch.zeros(self.shape, dtype=values.dtype, device=values.device).index_put(self.index, values)
