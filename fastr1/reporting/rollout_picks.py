"""Chooses, in one pass over the completions of a run, the few groups that a page shows.

A group is the completions of one prompt in one update. Kept are those of some updates, and for each of `RANKINGS` the
first few, one per question. Memory depends on what is kept, not on how many rows go by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

GROUPS_PER_UPDATE = 8
GROUPS_PER_RANKING = 8
SHARES = ("all right", "some right", "all wrong")

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The completions of one prompt in one update, as rows of rollouts.jsonl, in the order of sampling."""

    rows: tuple[Row, ...]

    @property
    def step(self) -> int:
        return int(self.rows[0]["step"])

    @property
    def key(self) -> tuple[str, str]:
        """The same for the same question about the same clip."""
        return str(self.rows[0]["sample_id"]), str(self.rows[0]["question"])

    @property
    def is_valid(self) -> bool:
        return bool(self.rows[0].get("valid", True))

    @property
    def has_signal(self) -> bool:
        return any(row["advantage"] != 0 for row in self.rows)

    @property
    def mean_reward(self) -> float:
        return sum(row["reward"] for row in self.rows) / len(self.rows)

    @property
    def surprise(self) -> float:
        """How far the reward of one completion is from the mean of all others of the group; 0 for a group of one."""
        if len(self.rows) < 2:
            return 0.0
        rewards = [row["reward"] for row in self.rows]
        total, others = sum(rewards), len(rewards) - 1
        return max(abs(reward - (total - reward) / others) for reward in rewards)


# of valid groups, the largest first; among equal ones the latest
RANKINGS: dict[str, Callable[[Group], float]] = {
    "best": lambda group: group.mean_reward,
    "worst": lambda group: -group.mean_reward,
    "surprising": lambda group: group.surprise,
}


@dataclass
class Picks:
    """Groups to show, and what was counted on the way.

    Attributes: by_step, at most `GROUPS_PER_UPDATE` of each chosen update; sizes, how many that update has; ranked, the
        first of each ranking; shares, per update how many groups were all right, some right and all wrong, where a
        part of the reward is an accuracy.
    """

    by_step: dict[int, list[Group]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    ranked: dict[str, list[Group]] = field(default_factory=dict)
    num_groups: int = 0
    num_rows: int = 0
    share_steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    shares: np.ndarray = field(default_factory=lambda: np.empty((0, len(SHARES))))


def iterate_groups(rows: Iterable[Row], group_size: int | None) -> Iterator[Group]:
    """Consecutive rows of one prompt and update; not more than `group_size`, where a prompt follows itself."""
    for _, together in groupby(rows, key=lambda row: (row["step"], row.get("rank"), row["sample_id"], row["question"])):
        group: list[Row] = []
        for row in together:
            group.append(row)
            if len(group) == group_size:
                yield Group(tuple(group))
                group = []
        if group:
            yield Group(tuple(group))


def pick_groups(rows: Iterable[Row], steps: Sequence[int], group_size: int | None) -> Picks:
    """What a page shows of all rows: groups of the updates `steps`, and the first of every ranking."""
    picks = Picks()
    best = {name: _Ranking(score) for name, score in RANKINGS.items()}
    wanted = set(steps)
    counts: dict[int, list[int]] = {}
    for group in iterate_groups(rows, group_size):
        picks.num_groups += 1
        picks.num_rows += len(group.rows)
        if group.step in wanted:
            picks.sizes[group.step] = picks.sizes.get(group.step, 0) + 1
            kept = picks.by_step.setdefault(group.step, [])
            if len(kept) < GROUPS_PER_UPDATE:
                kept.append(group)
        if not group.is_valid:
            continue
        for ranking in best.values():
            ranking.offer(group)
        place = _share(group)
        if place is not None:
            counts.setdefault(group.step, [0] * len(SHARES))[place] += 1
    picks.ranked = {name: ranking.groups() for name, ranking in best.items()}
    if counts:
        picks.share_steps = np.array(sorted(counts))
        table = np.array([counts[step] for step in sorted(counts)], dtype=float)
        picks.shares = table / table.sum(axis=1, keepdims=True)
    return picks


def _share(group: Group) -> int | None:
    """The place in `SHARES`, None where nothing of the reward says what is right."""
    first = group.rows[0]["rewards"]
    name = next((part for part in first if "accuracy" in part), None)
    if name is None:
        return None
    right = sum(float(row["rewards"].get(name) or 0.0) > 0 for row in group.rows)
    return 0 if right == len(group.rows) else 2 if right == 0 else 1


class _Ranking:
    """The groups with the largest scores, the best of each question."""

    def __init__(self, score: Callable[[Group], float]) -> None:
        self._score = score
        self._kept: dict[tuple[str, str], tuple[tuple[float, int], Group]] = {}

    def offer(self, group: Group) -> None:
        rank = (self._score(group), group.step)
        if group.key not in self._kept and len(self._kept) == GROUPS_PER_RANKING:
            last = min(self._kept, key=lambda key: self._kept[key][0])
            if rank <= self._kept[last][0]:
                return
            del self._kept[last]
        if group.key not in self._kept or rank > self._kept[group.key][0]:
            self._kept[group.key] = (rank, group)

    def groups(self) -> list[Group]:
        """The largest first. A score of 0 or less of a ranking by surprise is none: nothing differs there."""
        ordered = sorted(self._kept.values(), key=lambda item: item[0], reverse=True)
        return [group for (score, _), group in ordered if score > 0 or self._score is not RANKINGS["surprising"]]
