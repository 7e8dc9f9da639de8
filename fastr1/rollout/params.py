"""How completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass

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
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
