"""Group-relative advantages: the public door, and its rule of dispatch for the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_advantages
from .checks import check_advantage_options, check_groups
from .dispatch import may_read_values, rewards_use_triton


def group_advantages(
    rewards: Tensor,  # (B,)
    num_generations: int | None = None,
    *,
    group_ids: Tensor | None = None,  # (B,) integers
    scale_rewards: str = "group",
    eps: float = 1e-4,
    leave_one_out: bool = False,
    noise_std: float = 0.0,
    generator: torch.Generator | None = None,
    check_values: bool = True,
) -> Tensor:
    """A = (r - mean) / (std + eps) among the completions of one prompt.

    Groups are consecutive runs of `num_generations` rewards, or, where they are uneven, equal values of `group_ids`.

    Args:
        scale_rewards: "group" divides by the unbiased deviation of the group, "batch" by that of all rewards; "none"
            does not divide.
        leave_one_out: the baseline is the mean of the other completions of the group.
        noise_std: adds N(0, noise_std²), drawn with `generator`, to every advantage; so a group of equal rewards gets
            noise alone.
        check_values: False leaves out the check for infinite rewards, which waits for the device; nothing else here
            does. Inside `torch.compile` it is left out always.

    Returns:
        (B,) float32 (float64 for float64 rewards), detached. Before noise it is exactly 0 in a group whose rewards are
        all equal and in a group of one. A NaN reward means "could not be scored": it takes no part in the statistics
        and its advantage is 0, with noise too.

    Raises:
        ValueError: an infinite reward, a group size that does not divide B, an unknown option.

    Source: arXiv 2402.03300 §4.1.2 (group mean and deviation); arXiv 2503.20783 (scale_rewards="none").
    """
    check_groups(rewards, num_generations, group_ids, may_read_values(check_values))
    check_advantage_options(scale_rewards, eps, noise_std)
    return dispatch_group_advantages(
        rewards,
        num_generations,
        group_ids=group_ids,
        scale_rewards=scale_rewards,
        eps=eps,
        leave_one_out=leave_one_out,
        noise_std=noise_std,
        generator=generator,
    )


def dispatch_group_advantages(
    rewards: Tensor,
    num_generations: int | None,
    *,
    group_ids: Tensor | None,
    scale_rewards: str,
    eps: float,
    leave_one_out: bool,
    noise_std: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`group_advantages` of checked arguments."""
    scale = {"scale_rewards": scale_rewards, "eps": eps, "leave_one_out": leave_one_out}
    if rewards_use_triton(rewards) and not noise_std:
        from .gpu.advantages import launch_group_advantages  # triton exists on Linux only

        return launch_group_advantages(rewards.detach(), num_generations, group_ids, **scale)
    noise = {"noise_std": noise_std, "generator": generator}
    return torch_advantages.group_advantages(rewards, num_generations, group_ids=group_ids, **scale, **noise)  # type: ignore[arg-type]
