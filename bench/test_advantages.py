"""How long do group advantages take? (Microseconds: what a separate step before the loss costs.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Call, Group
from providers import load
from shapes import Case
from torch import Tensor

from fastr1_kernels import group_advantages

GROUP_SIZE, EPS = 8, 1e-4


@dataclass
class Rewards:
    rewards: Tensor  # (B,), rows of the case


def standardised(rewards: Tensor) -> Tensor:
    grouped = rewards.view(-1, GROUP_SIZE)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + EPS)).view(-1)


def ours(inputs: Rewards) -> Call:
    return lambda: {"advantages": group_advantages(inputs.rewards, GROUP_SIZE, eps=EPS)}


def eager(inputs: Rewards) -> Call:
    return lambda: {"advantages": standardised(inputs.rewards)}


def verl(inputs: Rewards) -> Call:
    """Its outcome advantage, of sequences of one token."""
    function = load("verl.trainer.ppo.core_algos").compute_grpo_vectorized_outcome_advantage
    index = (torch.arange(len(inputs.rewards)) // GROUP_SIZE).numpy()
    scores, mask = inputs.rewards[:, None], torch.ones_like(inputs.rewards)[:, None]
    return lambda: {"advantages": function(scores, mask, index, epsilon=EPS)[0].squeeze(1)}


OPS = {"group_advantages": {"ours": ours, "torch eager": eager, "verl grpo_vectorized": verl}}


def set_up(case: Case) -> Group:
    generator = torch.Generator().manual_seed(harness.SEED)
    rewards = torch.rand(case.rows, generator=generator).to(harness.device())
    gold = {"advantages": standardised(rewards.double())}
    return Group(case, Rewards(rewards), gold, {"advantages": float(gold["advantages"].norm())}, None, None)


def test_advantages(case: Case, provider: str, make: Any, run: Any) -> None:
    run(provider, make, rounds=50)
