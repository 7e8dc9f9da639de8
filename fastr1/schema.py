"""The nouns every stage shares. A stage imports these, its own config section and leaf helpers, nothing else.

Symbols in shapes: B sequences, P prompt length, T completion length, L total length, D hidden size, V vocabulary,
G group size (`num_generations`), F frames, S frame side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

IMAGE_TOKEN_INDEX = -200  # id that marks the place of the visual tokens in `input_ids`
IGNORE_INDEX = -100  # label of a position without loss


class DataError(ValueError):
    """A sample or its video cannot be used. The message names file, line, reason and remedy."""


@dataclass(frozen=True)
class Sample:
    """One multiple-choice question about one video (a row of a GRPO annotation file)."""

    sample_id: str
    problem: str  # question, newline, "Options:" and the lettered options; no placeholder, no instruction
    solution: str  # "<answer>C</answer>"
    video_path: Path
    origin: str  # "nextqa.jsonl:12", for error messages
    problem_type: str = ""


@dataclass(frozen=True)
class SftSample:
    """One supervised conversation turn about one video (an entry of a LLaVA-style annotation file)."""

    sample_id: str
    question: str  # text of the human turn without the placeholder
    answer: str  # text of the model turn
    video_path: Path
    origin: str


@dataclass(frozen=True)
class Clip:
    """The frames chosen from one video, with the time each is shown."""

    frames: torch.Tensor  # (F, 3, H, W) uint8 RGB
    indices: tuple[int, ...]  # (F,) frame numbers in the file
    timestamps_seconds: tuple[float, ...]  # (F,)
    source_fps: float
    duration_seconds: float
    backend: str  # the decoder that produced the pixels: "torchcodec-cpu" | "torchcodec-cuda" | "pyav"


@dataclass
class Rollout:
    """Completions of B prompts, G each, in prompt-major order: row b·G + g is completion g of prompt b."""

    completion_ids: torch.Tensor  # (B·G, T) int64, right-padded with the pad id
    completion_mask: torch.Tensor  # (B·G, T) bool, True up to and including the first end-of-sequence token
    sampler_logps: torch.Tensor  # (B·G, T) fp32 log-probability under the distribution that was sampled from
    is_truncated: torch.Tensor  # (B·G,) bool: ran into the length limit without an end-of-sequence token
    texts: list[str]  # decoded, special tokens removed, stripped
