"""Which groups a page shows."""

from __future__ import annotations

import random
from typing import Any

from run_folders import GROUP, rollout_row, rollouts

from fastr1.reporting.rollout_picks import GROUPS_PER_RANKING, GROUPS_PER_UPDATE, RANKINGS, iterate_groups, pick_groups


def group(step: int, sample: str, rewards: list[float], **others: Any) -> list[dict[str, Any]]:
    return [rollout_row(step, 0, i, sample_id=sample, reward=reward, **others) for i, reward in enumerate(rewards)]


def test_rows_of_one_prompt_and_update_are_a_group() -> None:
    rows = rollouts(2)
    groups = list(iterate_groups(rows, GROUP))
    assert [len(found.rows) for found in groups] == [GROUP] * 6
    assert [row for found in groups for row in found.rows] == rows


def test_a_prompt_that_follows_itself_is_two_groups_where_the_size_is_known() -> None:
    rows = group(1, "a", [0.0, 1.0]) + group(1, "a", [1.0, 1.0])
    assert [len(found.rows) for found in iterate_groups(rows, 2)] == [2, 2]
    assert [len(found.rows) for found in iterate_groups(rows, None)] == [4]
    ranks = group(1, "a", [0.0, 1.0]) + group(1, "a", [1.0, 1.0], rank=1)
    assert [len(found.rows) for found in iterate_groups(ranks, None)] == [2, 2]


def test_rankings_hold_the_extremes_of_the_run_once_per_question() -> None:
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, 60):
        for _ in range(4):
            rows += group(step, f"s{rng.randrange(30)}", [rng.choice([-0.5, 0.0, 1.0, 1.5]) for _ in range(4)])
    groups = list(iterate_groups(rows, 4))
    picks = pick_groups(rows, [], 4)
    for name, score in RANKINGS.items():
        best: dict[Any, Any] = {}
        for found in groups:
            rank = (score(found), found.step)
            if found.key not in best or rank > best[found.key]:
                best[found.key] = rank
        expected = sorted(best.values(), reverse=True)[:GROUPS_PER_RANKING]
        assert [(score(found), found.step) for found in picks.ranked[name]] == expected


def test_the_most_surprising_group_has_one_completion_unlike_the_others() -> None:
    rows = group(1, "even", [0.0, 1.0, 0.0, 1.0]) + group(1, "odd", [1.0, 1.0, 1.0, 0.0]) + group(1, "same", [1.0] * 4)
    ranked = pick_groups(rows, [], 4).ranked["surprising"]
    assert [found.key[0] for found in ranked] == ["odd", "even"]
    assert ranked[0].surprise == 1.0
    assert round(ranked[1].surprise, 6) == round(2 / 3, 6)
    assert pick_groups(group(1, "one", [5.0]), [], 1).ranked["surprising"] == []


def test_groups_whose_video_failed_are_in_no_ranking_but_in_their_update() -> None:
    rows = group(1, "bad", [9.0, -9.0], valid=False) + group(1, "good", [0.0, 1.0])
    picks = pick_groups(rows, [1], 2)
    assert [found.is_valid for found in picks.by_step[1]] == [False, True]
    assert {found.key[0] for ranked in picks.ranked.values() for found in ranked} == {"good"}


def test_of_a_large_update_the_first_groups_are_kept_and_all_are_counted() -> None:
    rows = [row for i in range(20) for row in group(3, f"s{i}", [0.0, 1.0])]
    picks = pick_groups(rows, [3], 2)
    assert [found.key[0] for found in picks.by_step[3]] == [f"s{i}" for i in range(GROUPS_PER_UPDATE)]
    assert picks.sizes == {3: 20}
    assert pick_groups(rows, [4], 2).by_step == {}


def test_shares_count_groups_by_how_many_of_them_are_right() -> None:
    picks = pick_groups(rollouts(2), [], GROUP)
    assert picks.share_steps.tolist() == [1, 2]
    assert picks.shares.tolist() == [[1 / 3] * 3] * 2  # one of each kind
    only = pick_groups([row for row in rollouts(1) if row["sample_id"] == "s2"], [], GROUP)
    assert only.shares.tolist() == [[0.0, 0.0, 1.0]]
    assert len(pick_groups([rollout_row(1, 0, 0, rewards={"vowels": 1.0})], [], 1).share_steps) == 0
