"""Group advantages in Triton. On a GPU, or on a CPU with TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_accuracy import assert_as_accurate, rand
from torch import Tensor

from fastr1_kernels import group_advantages, reference

NAN = float("nan")
# With blocks of 16, groups of 18 need two; the other groups are interleaved and uneven.
LAYOUTS: dict[str, dict[str, Any]] = {
    "runs": {"num_generations": 18},
    "labels": {"group_ids": (torch.arange(36) * 7 % 5 - 2) * 10**12},
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
by_scale = pytest.mark.parametrize("scale", ["group", "batch", "none"])
by_baseline = pytest.mark.parametrize("leave_one_out", [False, True])


def on(device: str, layout: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in layout.items()}


@by_baseline
@by_scale
@by_layout
def test_advantages_match_the_reference(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], scale: str, leave_one_out: bool
) -> None:
    monkeypatch.setattr("fastr1_kernels.gpu.advantages.BLOCK_REWARDS", 16)
    rewards = rand(36).float()
    rewards[7::13] = NAN
    ids = layout.get("group_ids", torch.arange(36) // 18)
    options = {"scale_rewards": scale, "leave_one_out": leave_one_out, "eps": 1e-4}
    got = group_advantages(rewards.to(kernel_device), **on(kernel_device, layout), **options)
    gold = reference.group_advantages(rewards.double(), ids, **options)
    assert_as_accurate(got, reference.group_advantages(rewards, ids, **options), gold)
    assert got[rewards.isnan()].eq(0).all()
    assert got.dtype == torch.float32


@by_baseline
@by_scale
@pytest.mark.parametrize("value", [0.7, 1 / 3, 1e-8, -123.456])
def test_equal_rewards_give_exactly_zero(kernel_device: str, value: float, scale: str, leave_one_out: bool) -> None:
    rewards = torch.tensor([value] * 7 + [0.0, 1.0, NAN] + [0.3] * 4, device=kernel_device)
    got = group_advantages(rewards, 7, scale_rewards=scale, eps=1e-8, leave_one_out=leave_one_out)
    assert got[:7].eq(0).all()
    assert got[[7, 8, 10, 11, 12, 13]].ne(0).all()


@by_scale
def test_groups_of_one_and_unscored_groups_are_zero(kernel_device: str, scale: str) -> None:
    rewards = torch.tensor([1.0, NAN, 0.0, NAN, 5.0], device=kernel_device)
    assert group_advantages(rewards, 1, scale_rewards=scale).eq(0).all()
    ids = torch.tensor([0, 1, 2, 1, 3], device=kernel_device)
    assert group_advantages(rewards, group_ids=ids, scale_rewards=scale).eq(0).all()
    assert group_advantages(rewards * NAN, 5, scale_rewards=scale).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_rewards_of_any_real_dtype(kernel_device: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([1, 0, 0, 1], device=kernel_device)
    assert torch.equal(group_advantages(rewards.to(dtype), 4), group_advantages(rewards.float(), 4))


def test_strided_rewards_equal_their_copy_and_stay_unchanged(kernel_device: str) -> None:
    whole = rand(24).float().to(kernel_device)
    before = whole.clone()
    assert torch.equal(group_advantages(whole[::2], 4), group_advantages(whole[::2].clone(), 4))
    assert torch.equal(whole, before)
