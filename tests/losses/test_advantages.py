"""Group advantages: the formula by hand, and every case in which the formula would lie."""

from __future__ import annotations

import statistics
from itertools import product
from typing import Any

import pytest
import torch
from conftest import Backend
from kernel_accuracy import assert_as_accurate, rand
from safetensors.torch import load_file
from shared_data import shared_path

from fastr1_kernels import group_advantages, torch_advantages

NAN, INF = float("nan"), float("inf")


by_scale = pytest.mark.parametrize("scale", ["group", "batch", "none"])
by_baseline = pytest.mark.parametrize("leave_one_out", [False, True])


def advantages_by_hand(groups: list[list[float]], scale: str, eps: float, leave_one_out: bool) -> list[float]:
    """The definition, in Python floats, with the standard library's statistics."""
    everything = [r for group in groups for r in group]
    out = []
    for group in groups:
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :] if leave_one_out else group
            centred = reward - statistics.mean(others)
            std = {"group": group, "batch": everything}.get(scale)
            out.append(centred / (statistics.stdev(std) + eps) if std else centred)
    return out


@by_scale
@by_baseline
def test_advantages_match_the_definition(scale: str, leave_one_out: bool) -> None:
    groups = [[2, 1.5, 1.68, -0.75], [0.5, -2, 1, -0.9], [0.1, 0.2, 0.3, 0.9]]
    rewards = torch.tensor(groups, dtype=torch.float64).flatten()
    got = group_advantages(rewards, 4, scale_rewards=scale, eps=1e-4, leave_one_out=leave_one_out)
    expected = torch.tensor(advantages_by_hand(groups, scale, 1e-4, leave_one_out), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


# With blocks of 16, groups of 18 need two; the other groups are interleaved and uneven.
LAYOUTS: dict[str, dict[str, Any]] = {
    "runs": {"num_generations": 18},
    "labels": {"group_ids": (torch.arange(36) * 7 % 5 - 2) * 10**12},
}


@by_baseline
@by_scale
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_kernel_matches_the_reference(
    kernels: Backend, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], scale: str, leave_one_out: bool
) -> None:
    monkeypatch.setattr("fastr1_kernels.gpu.advantages.BLOCK_REWARDS", 16)
    rewards = rand(36).float()
    rewards[7::13] = NAN
    ids = layout.get("group_ids", torch.arange(36) // 18)
    options = {"scale_rewards": scale, "leave_one_out": leave_one_out, "eps": 1e-4}
    moved = {k: kernels.put(v) for k, v in layout.items()}
    got = group_advantages(rewards.to(kernels.device), **moved, **options)
    gold = torch_advantages.group_advantages(rewards.double(), group_ids=ids, **options)
    assert_as_accurate(got, torch_advantages.group_advantages(rewards, group_ids=ids, **options), gold)
    assert got[rewards.isnan()].eq(0).all()
    assert got.dtype == torch.float32


def test_advantages_of_a_published_example(backend: Backend) -> None:
    rewards = torch.tensor([2, 1.5, 1.68, -0.75, -0.5, -2, 1, -0.9])
    expected = torch.tensor([1.1857, 0.8462, 0.9685, -0.6816, -0.5118, -1.5304, 0.5067, -0.7834])
    torch.testing.assert_close(group_advantages(rewards.to(backend.device), 8).cpu(), expected, rtol=0, atol=6e-5)


def test_advantages_match_the_original_trainer() -> None:
    expected = load_file(shared_path("fixtures/tinyllava/group_expected.safetensors"))
    got = group_advantages(expected["grpo.rewards"], len(expected["grpo.rewards"]))
    torch.testing.assert_close(got, expected["grpo.advantages"], rtol=1e-6, atol=1e-6)


def test_uneven_interleaved_groups_equal_each_group_alone(backend: Backend) -> None:
    rewards = backend.put(torch.tensor([1.0, 5.0, 0.0, 2.0, 4.0, 9.0]))
    ids = torch.tensor([7, -3, 7, 7, -3, 50], device=backend.device)
    got = group_advantages(rewards, group_ids=ids)
    for label in (7, -3):
        alone = group_advantages(rewards[ids == label], int((ids == label).sum()))
        backend.assert_close(got[ids == label], alone)
    assert got[5] == 0  # a group of one


@by_scale
@by_baseline
def test_equal_rewards_give_exactly_zero(backend: Backend, scale: str, leave_one_out: bool) -> None:
    sizes = (7,) if backend.has_kernels else (2, 3, 7, 8)
    values = (0.7, 1 / 3, 1e-8, -123.456) if backend.has_kernels else (0.7, 0.1, 1 / 3, 1e-8, -123.456, 0.0)
    for value, size in product(values, sizes):
        # A second, mixed group keeps the deviation of the batch away from 0.
        mixed = [0.0, 1.0] + [0.3] * (size - 3) + [NAN] * (size > 2)
        rewards = torch.tensor([value] * size + mixed, device=backend.device)
        got = group_advantages(rewards, size, scale_rewards=scale, eps=1e-8, leave_one_out=leave_one_out)
        assert got[:size].eq(0).all()
        assert got[size : size + 2].ne(0).all()


def test_equal_rewards_without_the_exact_rule_would_not_be_zero() -> None:
    rewards = torch.tensor([0.7] * 7)
    naive = (rewards - rewards.sum() / 7) / (rewards.std() + 1e-8)
    assert naive.abs().max() > 0.1  # so the test above can fail


@by_scale
@by_baseline
def test_groups_of_one_and_unscored_groups_are_zero(backend: Backend, scale: str, leave_one_out: bool) -> None:
    options: dict[str, Any] = {"scale_rewards": scale, "leave_one_out": leave_one_out}
    rewards = torch.tensor([1.0, NAN, 0.0, NAN, 5.0], device=backend.device)
    assert group_advantages(rewards, 1, **options).eq(0).all()
    ids = torch.tensor([0, 1, 2, 1, 3], device=backend.device)
    assert group_advantages(rewards, group_ids=ids, **options).eq(0).all()
    assert group_advantages(rewards * NAN, 5, **options).eq(0).all()


@by_scale
@by_baseline
def test_nan_reward_is_left_out_and_gets_zero(backend: Backend, scale: str, leave_one_out: bool) -> None:
    rewards = backend.put(torch.tensor([1.0, NAN, 0.0, 0.5, NAN, 2.0]))
    ids = torch.tensor([0, 0, 0, 0, 1, 1], device=backend.device)
    got = group_advantages(rewards, group_ids=ids, scale_rewards=scale, leave_one_out=leave_one_out)
    keep = ~rewards.isnan()
    without = group_advantages(rewards[keep], group_ids=ids[keep], scale_rewards=scale, leave_one_out=leave_one_out)
    backend.assert_close(got[keep], without)
    assert got[~keep].eq(0).all()


def test_noise_reaches_every_scored_completion_and_follows_the_generator() -> None:
    rewards = torch.tensor([0.7] * 4000 + [NAN] + [1.0] * 3999)
    noisy = group_advantages(rewards, 8, noise_std=0.02, generator=torch.Generator().manual_seed(3))
    again = group_advantages(rewards, 8, noise_std=0.02, generator=torch.Generator().manual_seed(3))
    other = group_advantages(rewards, 8, noise_std=0.02, generator=torch.Generator().manual_seed(4))
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)
    assert noisy[4000] == 0
    scored = noisy[~rewards.isnan()]
    assert scored.ne(0).all()
    assert scored.mean().abs() < 4 * 0.02 / len(scored) ** 0.5
    assert scored.std() == pytest.approx(0.02, rel=0.05)


def test_noise_is_added_to_the_advantage() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5])
    noisy = group_advantages(rewards, 4, noise_std=0.02, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy, group_advantages(rewards, 4) + 0.02 * noise)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float16])
def test_rewards_of_any_real_dtype(backend: Backend, dtype: torch.dtype) -> None:
    rewards = torch.tensor([1, 0, 0, 1], device=backend.device)
    got = group_advantages(rewards.to(dtype), 4)
    assert got.dtype == torch.float32
    assert torch.equal(got, group_advantages(rewards.float(), 4))


def test_advantages_are_detached_and_rewards_unchanged(backend: Backend) -> None:
    rewards = torch.tensor([1.0, NAN, 0.0, 0.5], device=backend.device, requires_grad=True)
    before = rewards.detach().clone()
    assert not group_advantages(rewards, 4).requires_grad
    assert torch.equal(rewards.detach().nan_to_num(9), before.nan_to_num(9))


def test_strided_rewards_equal_their_copy(backend: Backend) -> None:
    whole = backend.put(rand(24))
    before = whole.clone()
    assert torch.equal(group_advantages(whole[::2], 4), group_advantages(whole[::2].clone(), 4))
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([1.0, INF], {"num_generations": 2}, "reward 1 is inf"),
        ([-INF, 1.0], {"num_generations": 2}, "reward 0 is -inf"),
        ([1.0, 0.0, 2.0], {"num_generations": 2}, "3 rewards are not whole groups of num_generations=2"),
        ([1.0, 0.0], {"num_generations": 0}, "num_generations=0"),
        ([1.0, 0.0], {}, "exactly one"),
        ([1.0, 0.0], {"num_generations": 2, "group_ids": torch.tensor([0, 0])}, "exactly one"),
        ([1.0, 0.0], {"group_ids": torch.tensor([0])}, r"group_ids has shape \(1,\)"),
        ([1.0, 0.0], {"group_ids": torch.tensor([0.0, 0.0])}, "group_ids has dtype torch.float32"),
        ([1.0, 0.0], {"num_generations": 2, "scale_rewards": "std"}, "scale_rewards='std'.*group, batch, none"),
        ([1.0, 0.0], {"num_generations": 2, "eps": -1.0}, "eps=-1.0"),
        ([1.0, 0.0], {"num_generations": 2, "noise_std": NAN}, "noise_std=nan"),
        ([], {"num_generations": 2}, r"shape \(0,\)"),
        ([[1.0, 0.0]], {"num_generations": 2}, r"shape \(1, 2\)"),
    ],
)
def test_wrong_arguments_are_refused(rewards: list[float], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), **options)  # type: ignore[arg-type]
