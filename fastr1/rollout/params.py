"""How completions are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastr1.config import GRPOConfig


@dataclass(frozen=True)
class SamplingParams:
    """`temperature=0` is greedy; `top_k=0`, `top_p=1` and `min_p=0` keep the whole vocabulary.

    A completion also ends with the token whose text completes one of `stop_strings`.
    """

    max_completion_length: int
    temperature: float = GRPOConfig.temperature
    top_k: int = GRPOConfig.top_k
    top_p: float = GRPOConfig.top_p
    min_p: float = GRPOConfig.min_p
    stop_strings: tuple[str, ...] = GRPOConfig.stop_strings


def find_stop(
    decode: Callable[[torch.Tensor], str],
    token_ids: torch.Tensor,  # (n,), a completion
    num_checked: int,  # of its tokens, in whose text there is none
    stop_strings: Sequence[str],
) -> int | None:
    """How many of its tokens a completion needs to have a stop string in its text, the fewest; None: no string yet."""
    for length in range(num_checked + 1, len(token_ids) + 1):
        text = decode(token_ids[:length])
        if any(stop in text for stop in stop_strings):
            return length
    return None
