"""The nouns that cross a room. A room imports these, its part of the configuration, and rooms before it.

Symbols in shapes: B sequences, P prompt length, T completion length, L total length, D hidden size, V vocabulary,
G group size (`num_generations`), Q visual tokens, F frames, H × W pixels of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # the processes that rewards run in start without torch
    import torch


class DataError(ValueError):
    """A sample or its video cannot be used. The message names file, line, reason and remedy."""


@dataclass(frozen=True)
class Sample:
    """One multiple-choice question about one video (a row of a question file)."""

    sample_id: str
    problem: str  # question, newline, "Options:" and the lettered options; no placeholder, no instruction
    options: str  # the letters of the options in order, "ABCDE"
    letter: str  # the right one
    video_path: Path
    origin: str  # "nextqa.jsonl:12", for error messages
    problem_type: str = ""

    @property
    def solution(self) -> str:
        """What reward functions are given as the truth: "<answer>C</answer>"."""
        return f"<answer>{self.letter}</answer>"


@dataclass(frozen=True)
class SftSample:
    """One supervised conversation turn about one video (an entry of a conversation file)."""

    sample_id: str
    question: str  # text of the human turn without the placeholder
    answer: str  # text of the model turn
    video_path: Path
    origin: str


@dataclass(frozen=True)
class BadSample:
    """A row of an annotation file that is left out, or whose video is: one line of bad_samples.jsonl."""

    step: int  # the update at which it was due; 0: before the first one
    when: str  # "reading" (the file), "training", "evaluation", or "checking" (by `fastr1 check-data`)
    file: str  # the annotation file
    line: int  # of a JSONL file, from 1; the entry of a JSON list, from 0
    reason: str


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
    completion_mask: torch.Tensor  # (B·G, T) bool, True up to and including the first end token
    sampler_logps: torch.Tensor  # (B·G, T) fp32 log-probability under the distribution that was sampled from
    full_logps: torch.Tensor  # (B·G, T) fp32 under the softmax of the whole vocabulary, as a trainer scores them
    is_truncated: torch.Tensor  # (B·G,) bool: ran into the length limit without an end token
    texts: list[str]  # decoded, special tokens removed, stripped
    metrics: dict[str, float] = field(default_factory=dict)  # how it went: tokens per second and such


@dataclass(frozen=True)
class Scored:
    """Rewards of N completions and the columns they were summed from."""

    rewards: list[float]  # (N,) weighted sum
    parts: dict[str, list[float]]  # name → (N,) unweighted values; some names are reported only (weight 0)


S = TypeVar("S", Sample, SftSample)


@dataclass
class Update(Generic[S]):
    """This rank's share of the samples of one update."""

    step: int  # from 1
    samples: list[S]  # B
    indices: list[int]  # B places of the samples in the list of all samples
    keys: list[int]  # B places in the endless stream of samples, for any number of ranks; negative for further prompts
    pixels: list[torch.Tensor | None]  # B × (F, 3, H, W); None: undecodable and to be skipped
    is_lost: bool = False  # no video of the whole update, on any rank, could be decoded

    @property
    def is_valid(self) -> list[bool]:
        """B; False: the video could not be decoded."""
        return [pixels is not None for pixels in self.pixels]


@dataclass
class Batch:
    """What became of this rank's share of a GRPO update: B prompts, G completions each, in prompt-major rows."""

    samples: list[Sample]  # B
    prompt_ids: list[torch.Tensor]  # B × (L_i,)
    prompt_lengths: list[int]  # B, tokens with those of the video
    pixel_shapes: list[tuple[int, ...]]  # B × (F, 3, H, W), what the tower saw
    is_valid: list[bool]  # B; False: the video could not be decoded and is skipped
    rollout: Rollout  # B·G rows
    lengths: list[int]  # B·G, tokens of the completions
    scored: Scored  # B·G rows
    advantages: torch.Tensor  # (B·G,)
    is_counted: list[bool]  # B·G; False: no part of the loss
    has_signal: list[bool]  # B·G; False: the loss has no gradient there
    old_logps: torch.Tensor | None = None  # (B·G·T,) of the model that sampled, where it differs from the one trained
    ref_logps: torch.Tensor | None = None  # (B·G·T,) of the initial model; both hold zeros where has_signal is False

    @property
    def num_generations(self) -> int:
        """G."""
        return len(self.lengths) // len(self.samples)


@dataclass(frozen=True)
class Answer:
    """One question, what the model said, and how it counts."""

    sample_id: str
    problem_type: str
    question: str
    completion: str
    solution: str
    letter: str | None  # None: unparsable, counted as wrong
    is_correct: bool
    is_well_formed: bool
    completion_length: int
    video: str
