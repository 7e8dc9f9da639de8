"""What a GRPO update reports: means over the completions of all ranks, and one row per completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastr1.engine import Engine
from fastr1.rewards import Scored
from fastr1.schema import Rollout, Sample


class TokenSums:
    """Adds up (sum, count) pairs over micro-batches; `means` divides after adding up the ranks too."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Adds one micro-batch; every call, on every rank, has the same names."""
        for name, (total, count) in pairs.items():
            pair = torch.stack([total.detach().double(), count.detach().double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, engine: Engine) -> dict[str, float]:
        """name → total / count, 0 without any count. All ranks call it."""
        names = sorted(self._sums)
        totals = engine.sum_across_ranks(torch.stack([self._sums[name] for name in names])).tolist()
        return {name: total / max(count, 1.0) for name, (total, count) in zip(names, totals, strict=True)}


def summarise_rollout(
    engine: Engine, rollout: Rollout, scored: Scored, advantages: torch.Tensor, is_valid: torch.Tensor
) -> dict[str, float]:
    """Rewards, their spread within groups, and lengths, over the valid completions of all ranks. All ranks call it.

    Shapes: advantages (B·G,); is_valid (B,) bool on the CPU.
    """
    num_generations = len(rollout.texts) // len(is_valid)
    valid = is_valid.repeat_interleave(num_generations)
    columns = {
        "reward": torch.tensor(scored.rewards),
        **{f"rewards/{name}": torch.tensor(values) for name, values in scored.parts.items()},
        "completion_length": rollout.completion_mask.sum(dim=1).cpu().float(),
        "completion_clipped_ratio": rollout.is_truncated.cpu().float(),
        "advantage_abs": advantages.cpu().abs(),
    }
    gathered = engine.gather_objects({name: values[valid] for name, values in columns.items()})
    merged = {name: torch.cat([part[name] for part in gathered]) for name in columns}
    groups = merged["reward"].reshape(-1, num_generations)
    return {
        **{name: values.mean().item() for name, values in merged.items()},
        "reward_std": groups.std(dim=1).mean().item(),
        "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean().item(),
        "completion_length_max": merged["completion_length"].max().item(),
        "num_tokens": merged["completion_length"].sum().item(),
    }


def rollout_rows(
    samples: Sequence[Sample], rollout: Rollout, scored: Scored, advantages: torch.Tensor, is_valid: torch.Tensor
) -> list[dict[str, Any]]:
    """One JSON object per completion of this rank; "valid" is false where the video could not be decoded."""
    num_generations = len(rollout.texts) // len(samples)
    rows = []
    for i, text in enumerate(rollout.texts):
        sample = samples[i // num_generations]
        rows.append(
            {
                "sample_id": sample.sample_id,
                "video": str(sample.video_path),
                "question": sample.problem,
                "solution": sample.solution,
                "completion": text,
                "reward": scored.rewards[i],
                "rewards": {name: values[i] for name, values in scored.parts.items()},
                "advantage": advantages[i].item(),
                "is_truncated": bool(rollout.is_truncated[i]),
                "valid": bool(is_valid[i // num_generations]),
            }
        )
    return rows
