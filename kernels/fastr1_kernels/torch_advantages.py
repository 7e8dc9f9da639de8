"""Group advantages in plain torch: what `gpu.advantages` does where no kernel runs, and what it is tested against.

A = (r - mean) / (std + eps) over the scored rewards of the group, in two passes: Σr² - n·mean² would cancel. Nothing
waits for the device. Source: arXiv 2402.03300 §4.1.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .reference import upcast


def group_advantages(
    rewards: Tensor,  # (B,), NaN = unscorable
    num_generations: int | None = None,  # groups are consecutive runs of so many
    *,
    group_ids: Tensor | None = None,  # (B,) integers, any values; instead
    scale_rewards: str = "group",
    eps: float = 1e-4,
    leave_one_out: bool = False,
    noise_std: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(r - mean) / (std + eps) within each group, std unbiased; 0 where a group has fewer than two distinct rewards."""
    rewards = upcast(rewards.detach())
    scored = ~rewards.isnan()
    add, largest = _over_groups(len(rewards), num_generations, group_ids)
    known, count = torch.where(scored, rewards, 0.0), add(scored.to(rewards.dtype))
    highest, lowest = largest(known.masked_fill(~scored, -math.inf)), -largest((-known).masked_fill(~scored, -math.inf))
    centred = torch.where(scored, rewards - add(known) / count.clamp(min=1), 0.0)
    if scale_rewards == "group":
        deviation = (add(centred.square()) / (count - 1).clamp(min=1)).sqrt()
    elif scale_rewards == "batch":
        total = scored.sum()
        square = torch.where(scored, rewards - known.sum() / total.clamp(min=1), 0.0).square().sum()
        deviation = (square / (total - 1).clamp(min=1)).sqrt()
    if leave_one_out:  # r minus the mean of the others
        centred = centred * count / (count - 1).clamp(min=1)
    if scale_rewards != "none":
        centred = centred / (deviation + eps)
    # Equal rewards have a rounding residue for a deviation; divided by eps it would train on noise.
    advantages = torch.where(highest > lowest, centred, 0.0)
    if noise_std:
        noise = torch.randn(rewards.shape, generator=generator, dtype=rewards.dtype, device=rewards.device)
        advantages = advantages + noise_std * noise
    return torch.where(scored, advantages, 0.0)


def _over_groups(
    number: int, num_generations: int | None, group_ids: Tensor | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Sum and maximum of (B,) values over the group of each."""
    if group_ids is None:
        assert num_generations is not None
        grid = (-1, num_generations)

        def spread(x: Tensor) -> Tensor:
            return x.expand(grid).reshape(number)

        return lambda x: spread(x.view(grid).sum(1, keepdim=True)), lambda x: spread(x.view(grid).amax(1, keepdim=True))
    ordered, order = group_ids.sort(stable=True)
    change = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(ordered.dtype)])
    group = torch.empty_like(order).scatter(0, order, change.long().cumsum(0))  # 0, 1, ... in the place of any integers
    return (
        lambda x: x.new_zeros(number).index_add(0, group, x).gather(0, group),
        lambda x: x.new_full((number,), -math.inf).scatter_reduce(0, group, x, "amax").gather(0, group),
    )
