"""What a GRPO update reports: means over the completions of all ranks, and one row per completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fastr1.schema import Batch

Metrics = dict[str, float]


class Ranks(Protocol):
    """The processes of a run, as far as adding up goes."""

    def sum_across_ranks(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def gather_objects(self, value: Any) -> list[Any]: ...


class TokenSums:
    """Adds up (sum, count) pairs over micro-batches; `means` divides after adding up the ranks too."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Adds one micro-batch; every call, on every rank, has the same names.

        Raises: ValueError for a count on another device than its sum, which a GPU refuses to stack.
        """
        for name, (total, count) in pairs.items():
            if total.device != count.device:
                raise ValueError(f"{name}: the sum is on {total.device}, its count on {count.device}; move the count")
            pair = torch.stack([total.detach().double(), count.detach().double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, ranks: Ranks) -> dict[str, float]:
        """name → total / max(count, 1): a sum added with count 0 is itself. All ranks call it."""
        names = sorted(self._sums)
        totals = ranks.sum_across_ranks(torch.stack([self._sums[name] for name in names])).tolist()
        return {name: total / max(count, 1.0) for name, (total, count) in zip(names, totals, strict=True)}


def summarise_rollout(ranks: Ranks, batch: Batch) -> Metrics:
    """Rewards, their spread within groups, and lengths, over the valid completions of all ranks. All ranks call it."""
    rollout, scored = batch.rollout, batch.scored
    valid = torch.tensor(batch.is_valid).repeat_interleave(batch.num_generations)
    columns = {
        "reward": torch.tensor(scored.rewards),
        **{f"rewards/{name}": torch.tensor(values) for name, values in scored.parts.items()},
        "completion_length": torch.tensor(batch.lengths, dtype=torch.float32),
        "completion_clipped_ratio": rollout.is_truncated.cpu().float(),
        "advantage_abs": batch.advantages.cpu().abs(),
        "signal": torch.tensor(batch.has_signal, dtype=torch.float32),
    }
    gathered = ranks.gather_objects({name: values[valid] for name, values in columns.items()})
    # The parts that a reward function returns may differ between ranks.
    names = {name: None for part in gathered for name in part}
    merged = {name: torch.cat([part[name] for part in gathered if name in part]) for name in names}
    groups = merged["reward"].reshape(-1, batch.num_generations)
    signal = merged.pop("signal").reshape(-1, batch.num_generations)
    return {
        **{name: values.mean().item() for name, values in merged.items()},
        "reward_std": groups.std(dim=1).mean().item(),
        "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean().item(),
        "groups_without_signal": float((signal.amax(1) == 0).sum()),
        "completion_length_max": merged["completion_length"].max().item(),
        "num_tokens": merged["completion_length"].sum().item(),
    }


def rollout_rows(batch: Batch) -> list[dict[str, Any]]:
    """One JSON object per completion of this rank; "valid" is false where the video could not be decoded."""
    rollout, scored = batch.rollout, batch.scored
    advantages, is_truncated = batch.advantages.tolist(), rollout.is_truncated.tolist()
    rows = []
    for i, text in enumerate(rollout.texts):
        sample = batch.samples[i // batch.num_generations]
        rows.append(
            {
                "sample_id": sample.sample_id,
                "video": str(sample.video_path),
                "question": sample.problem,
                "solution": sample.solution,
                "completion": text,
                "reward": scored.rewards[i],
                "rewards": {name: values[i] for name, values in scored.parts.items()},
                "advantage": advantages[i],
                "is_truncated": is_truncated[i],
                "valid": batch.is_valid[i // batch.num_generations],
            }
        )
    return rows


def join_rows(ranks: Ranks, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks with the number of their rank, in rank order, which is the order of samples. All ranks call
    it."""
    gathered = ranks.gather_objects(rows)
    return [{"rank": rank, **row} for rank, part in enumerate(gathered) for row in part]


def maxima(ranks: Ranks, values: Metrics) -> Metrics:
    """The largest value of every name over the ranks. All ranks call it."""
    gathered = ranks.gather_objects(values)
    names = {name: None for part in gathered for name in part}
    return {name: max(part[name] for part in gathered if name in part) for name in names}


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The mean of every metric over the rows that have it."""
    names = {name: None for row in rows for name in row}
    return {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows) for name in names}
