"""Rollouts that are measured, and the targets, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from update_shapes import UpdateCase

ROLLOUT = "rollout"


@dataclass(frozen=True, kw_only=True)
class RolloutCase(UpdateCase):
    """Completions of an update, drawn by the model; their lengths are forced. What is measured begins behind the
    connector and ends with the tokens on the device."""

    op: str = ROLLOUT

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.num_generations

    @property
    def shape(self) -> dict[str, Any]:
        names = ("name", "model", "num_prompts", "prompt_length", "num_generations", "mean_length", "max_length")
        return {name: getattr(self, name) for name in (*names, "num_frames")}

    @property
    def results(self) -> str:
        return "rollout.jsonl"


DEMO = RolloutCase(name="demo", num_prompts=8, prompt_length=122, mean_length=28, max_length=64)
EQUAL = replace(DEMO, name="equal lengths", mean_length=64)
LARGE_MODELS = ("3B", "1.5B", "0.5B")
LARGE = [
    RolloutCase(
        name=f"{model}, {number} sequences",
        model=model,
        dtype="bfloat16",
        num_prompts=number // 8,
        prompt_length=612,
        mean_length=128,
        max_length=128,
        num_frames=16,
        num_queries=512,
        num_groups=16,
    )
    for model in LARGE_MODELS
    for number in (8, 64, 128, 512)
]
TEXT = RolloutCase(
    name="3B, 64 sequences, text alone",
    model="3B",
    dtype="bfloat16",
    num_prompts=8,
    prompt_length=128,
    mean_length=128,
    max_length=128,
    num_frames=0,
    num_queries=512,
    num_groups=16,
)


def rollout_cases(full: bool) -> list[RolloutCase]:
    """Of the tiny model everywhere; `full` on a GPU for the full sizes too."""
    return [DEMO, EQUAL, *LARGE, TEXT] if full and torch.cuda.is_available() else [DEMO, EQUAL]


# Stated beside what is measured, asserted nowhere: of ours on one H200, and how many times as long as ours a provider
# takes at least.
MAIN = "3B, 64 sequences"
STEP_TARGET_MS = 2.2
TARGETS = {"target_step_ms": STEP_TARGET_MS, "target_tokens_per_second": 20_000.0, "target_device_peak_bytes": 45e9}
TARGET_RATIOS = {
    ("demo", "before"): 3.0,
    ("demo", "generate"): 3.0,
    ("equal lengths", "before"): 1.6,
    ("equal lengths", "generate"): 1.6,
    (MAIN, "generate"): 10.0,
}


def rollout_target_ms(case: RolloutCase, device: str) -> float | None:
    return STEP_TARGET_MS * case.max_length if case.name == MAIN and "H200" in device else None


def stated(case: RolloutCase, provider: str, median_ms: float, num_tokens: int, device: str) -> dict[str, float]:
    """Rates of a rollout of so many tokens, and what a row says of goals.

    A step takes `median_ms / max_length`: the prefill, behind which the first token is drawn, counts as one.
    """
    said = {"tokens_per_second": 1e3 * num_tokens / median_ms, "step_ms": median_ms / case.max_length}
    if (case.name, provider) in TARGET_RATIOS:
        said["target_ratio"] = TARGET_RATIOS[case.name, provider]
    if provider == "ours" and rollout_target_ms(case, device) is not None:
        said |= TARGETS
    return said
