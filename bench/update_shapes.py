"""Updates that are measured, whole or one of their phases, and the targets, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

UPDATE_OPS = ("train", "reference", "update", "report_frames")
PAPER_UPDATES = 687  # of 8 prompts: one pass over the paper's 5,496 questions


@dataclass(frozen=True, kw_only=True)
class UpdateCase:
    """`num_prompts` prompts of `prompt_length` tokens, those of their video included, with `num_generations`
    completions each, whose lengths are forced.

    `model` is "demo", the base model of the demo, or the size of a Qwen2.5 ("3B", "1.5B", "0.5B") behind SigLIP-so400m
    and the connector between them, with random weights.
    """

    op: str  # of UPDATE_OPS: forward and backward; log-probabilities of the reference; everything; with its frames
    name: str
    num_prompts: int
    prompt_length: int
    mean_length: float
    max_length: int
    num_generations: int = 8
    beta: float = 0.0
    model: str = "demo"
    dtype: str = "float32"
    num_frames: int = 8  # 0: a prompt is text alone
    video_size: tuple[int, int] | None = None  # of MP4 files that are decoded in every update; None: drawn pixels
    num_queries: int = 32  # tokens of a video
    num_groups: int = 8  # of frames, in the connector
    checkpointing: bool = False
    max_tokens: int = 8192  # of a micro-batch, the trainer's default
    dead: float = 0.0
    cold: bool = False
    frozen: bool = False

    @property
    def label(self) -> str:
        prompts = f"{self.num_prompts} × {self.prompt_length:,} prompt tokens"
        lengths = f"{self.num_generations} completions each of {self.mean_length:g} tokens, longest {self.max_length}"
        return f"{self.op}, {self.name}: {prompts}, {lengths}, beta {self.beta:g}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> dict[str, Any]:
        names = ("name", "model", "num_prompts", "prompt_length", "num_generations", "mean_length", "max_length")
        return {name: getattr(self, name) for name in (*names, "num_frames", "beta", "checkpointing", "max_tokens")}

    @property
    def results(self) -> str:
        return "frames.jsonl" if self.op == "report_frames" else "step.jsonl"


BETA = 0.04
DEMO = UpdateCase(op="train", name="demo", num_prompts=8, prompt_length=122, mean_length=28, max_length=64)
SHARED_PREFIX = replace(DEMO, name="long prompt", num_prompts=1, prompt_length=600, mean_length=100, max_length=100)
DEMO_FILES = replace(DEMO, name="demo, from files", video_size=(96, 96))
TEXT = replace(DEMO, name="text alone", num_frames=0, mean_length=28, max_length=28)
PAPER = UpdateCase(
    op="update",
    name="paper",
    model="3B",
    dtype="bfloat16",
    num_prompts=8,
    prompt_length=612,
    mean_length=300,
    max_length=512,
    beta=0.01,
    num_frames=16,
    video_size=(640, 480),
    num_queries=512,
    num_groups=16,
    max_tokens=16_384,
)
LONG_VIDEO = replace(
    PAPER,
    name="long video",
    num_prompts=1,
    prompt_length=16_484,
    num_frames=256,
    num_queries=16_384,
    num_groups=256,
    max_tokens=32_768,
    checkpointing=True,
)


def update_cases(op: str, full: bool) -> list[UpdateCase]:
    """Of the tiny model everywhere; `full` on a GPU for the full size too."""
    cases = {
        "train": [DEMO, SHARED_PREFIX],
        "reference": [replace(DEMO, beta=BETA)],
        "update": [replace(DEMO, beta=BETA), TEXT],
        "report_frames": [DEMO_FILES],
    }[op]
    if full and torch.cuda.is_available() and op != "report_frames":
        cases = [*cases, PAPER, LONG_VIDEO]
    return [replace(case, op=op) for case in cases]


# Not run: they would say again what another case says, and take seconds.
LEFT_OUT = {
    ("long prompt", "ours, whole logits"),
    ("long prompt", "ours, padded, not shared"),
    ("text alone", "before"),
    ("text alone", "original's schedule"),
    ("demo", "TRL GRPOTrainer"),
}

# Stated beside what is measured, asserted nowhere: milliseconds of an update on one H200, and how many times as long as
# ours a provider takes at least.
TARGETS_MS = {("update", "paper"): 3400.0}
TARGET_RATIOS = {
    ("train", "demo", "before"): 1.5,
    ("reference", "demo", "before"): 1.5,
    ("train", "long prompt", "ours, prompts not shared"): 2.0,
    ("update", "text alone", "TRL GRPOTrainer"): 1.6,
    ("update", "demo", "original's schedule"): 10.0,
    ("update", "paper", "original's schedule"): 10.0,
    ("update", "long video", "before"): 4.0,
}


def update_target_ms(case: UpdateCase, device: str) -> float | None:
    return TARGETS_MS.get((case.op, case.name)) if "H200" in device else None


def stated_targets(case: UpdateCase, provider: str, median_ms: float) -> dict[str, float]:
    """What a row says of goals: the ratio that is wanted, and the hours of the paper's run at this speed."""
    stated = {}
    if (case.op, case.name, provider) in TARGET_RATIOS:
        stated["target_ratio"] = TARGET_RATIOS[case.op, case.name, provider]
    if (case.op, case.name) == ("update", "paper"):
        stated["paper_hours"] = PAPER_UPDATES * median_ms / 3.6e6
    return stated
