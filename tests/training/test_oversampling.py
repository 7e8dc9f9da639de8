"""Groups without signal are replaced by groups of further prompts, boundedly, counted, and repeatably."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_toys import NUM_SAMPLES, exported, make_config, metrics_of, write_world

from fastr1.reporting.run_log import read_rows
from fastr1.training.grpo import run_grpo
from fastr1.training.oversampling import choose_groups, draw_places

ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def reward_for(useful: set[str], drawn: list[str]) -> Any:
    """Varies within the groups of the useful samples alone; notes the samples that were scored."""

    def rewards(completions: list[str], solutions: list[str], samples: Any) -> list[float]:
        drawn.extend(s.sample_id for s in samples[::3])
        return [float(i % 3 == 0 and s.sample_id in useful) for i, s in enumerate(samples)]

    return rewards


def test_places_are_repeatable_distinct_and_apart_from_the_order() -> None:
    draw = {"seed": 3, "step": 7, "attempt": 1, "prompts_per_update": 4}
    places = draw_places(6, 4, **draw)
    assert places == draw_places(6, 4, **draw)
    assert len({index for index, _ in places}) == 4
    keys = Counter(
        key
        for step in range(1, 40)
        for attempt in range(1, 5)
        for _, key in draw_places(6, 4, seed=3, step=step, attempt=attempt, prompts_per_update=4)
    )
    assert max(keys) < 0
    assert set(keys.values()) == {1}
    assert places != draw_places(6, 4, **{**draw, "attempt": 2})
    assert sorted(Counter(index for index, _ in draw_places(2, 5, **draw)).values()) == [2, 3]
    assert len(draw_places(6, 4, **{**draw, "seed": 2**63 - 1})) == 4


def test_choice_keeps_what_has_a_signal() -> None:
    assert choose_groups([True, False, False, True], [False, True, False]) == [0, 5, 2, 3]
    assert choose_groups([False], [True, True]) == [1]
    assert choose_groups([True], [True]) == [0]


@pytest.mark.parametrize("deepspeed", [{"zero_optimization": {"stage": 1}}, ZERO_3], ids=["1", "3"])
def test_update_is_filled_up(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deepspeed: dict[str, Any]
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("trainer_toys.vowel_reward", reward_for({"1", "4", "5"}, drawn))
    settings = {"optim__max_steps": 1, "grpo__max_num_gen_batches": 9, "deepspeed": deepspeed}
    run_grpo(make_config(world, tmp_path, **settings))
    (row,) = metrics_of(tmp_path)
    assert row["groups_without_signal"] == 0
    assert row["extra_groups"] == len(drawn) - 4 > 0
    rows = read_rows(tmp_path / "rollouts.jsonl")
    assert len(rows) == 12
    assert {r["sample_id"] for r in rows} <= {"1", "4", "5"}
    assert all(r["advantage"] != 0 for r in rows)
    before, after = exported(world / "base"), exported(tmp_path / "final")
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("connector"))


def test_tries_are_bounded_and_what_stays_is_counted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("trainer_toys.vowel_reward", reward_for(set(), drawn))
    run_grpo(make_config(world, tmp_path, optim__max_steps=1, grpo__max_num_gen_batches=3))
    (row,) = metrics_of(tmp_path)
    assert (len(drawn), row["extra_groups"], row["groups_without_signal"]) == (12, 8, 4)


def test_parts_of_rewards_that_are_not_everywhere_are_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def rewards(completions: list[str], solutions: list[str], samples: Any) -> dict[str, list[float]]:
        calls.append(len(completions))
        values = [float(i % 3 == 0 and len(calls) > 1) for i in range(len(completions))]
        return {"reward": values, "always": values, f"in call {len(calls)}": values}

    monkeypatch.setattr("trainer_toys.vowel_reward", rewards)
    run_grpo(make_config(world, tmp_path, optim__max_steps=1, grpo__max_num_gen_batches=2))
    (row,) = metrics_of(tmp_path)
    name = "rewards/trainer_toys:vowel_reward"
    assert {key for key in row if key.startswith("rewards/")} == {name, f"{name}/always"}
    assert row["groups_without_signal"] == 0


def test_replaced_group_trains_as_if_it_had_been_drawn_at_first(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a signal in no group of the order, the update is that of the further prompts alone."""
    drawn: list[str] = []
    calls = []

    def rewards(completions: list[str], solutions: list[str], samples: Any) -> list[float]:
        calls.append(len(completions))
        drawn.extend(s.sample_id for s in samples[::3])
        return [float(i % 3 == 0 and len(calls) > 1) for i in range(len(completions))]

    monkeypatch.setattr("trainer_toys.vowel_reward", rewards)
    settings = {"optim__max_steps": 1, "grpo__max_num_gen_batches": 2}
    filled = exported(run_grpo(make_config(world, tmp_path / "filled", **settings)))
    assert len(drawn) == 8
    further = drawn[4:]

    places = draw_places(NUM_SAMPLES, 4, seed=42, step=1, attempt=1, prompts_per_update=4)
    assert [str(index) for index, _ in places] == further
    monkeypatch.setattr("fastr1.training.updates.Updates._places", lambda updates: iter(places))
    calls.append(0)
    direct = exported(run_grpo(make_config(world, tmp_path / "direct", optim__max_steps=1)))
    for name, value in direct.items():
        torch.testing.assert_close(filled[name], value, atol=1e-6, rtol=0)
