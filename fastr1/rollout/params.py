"""How completions are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastr1.config import GRPOConfig
from fastr1.models import VideoLanguageModel

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no character


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

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}; give 1 or more")


class NonFiniteLogitsError(ValueError):
    """The model has diverged. The message says where."""


def check_request(
    model: VideoLanguageModel, num_prompts: int, num_generations: int, prompt_keys: Sequence[int] | None
) -> None:
    """Raises ValueError for what cannot be sampled."""
    if model.training:
        raise ValueError(
            "the model is in training mode, in which dropout and gradient checkpointing change what it computes; call "
            "model.eval() first"
        )
    if num_prompts < 1 or num_generations < 1:
        raise ValueError(f"{num_prompts} prompts with {num_generations} completions each; give at least one of both")
    if prompt_keys is not None and len(prompt_keys) != num_prompts:
        raise ValueError(f"{len(prompt_keys)} prompt_keys for {num_prompts} prompts; give a key for each")
    size = model.layout.vocab_size
    for token in model.media_token_ids:
        if not 0 <= token < size:
            raise ValueError(f"media_token_ids has {token}, which is no id of a vocabulary of {size}; leave it out")


def check_logps(logps: torch.Tensor) -> None:
    """Raises NonFiniteLogitsError where a token was drawn from what is no distribution; logps are (rows, T)."""
    bad = (~logps.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteLogitsError(
            f"{len(bad)} of {len(logps)} completions, the first is number {bad[0]}, were drawn from logits with a NaN "
            "or infinity; look for the weights or the pixels that the model computed them from"
        )


def find_stop(
    decode: Callable[[torch.Tensor], str],  # `Processor.raw_text`
    token_ids: torch.Tensor,  # (n,), a completion
    num_checked: int,  # of its tokens, in whose text there is none
    stop_strings: Sequence[str],
) -> int | None:
    """How many tokens a completion has when the first stop string is in its text; None while there is none."""

    def has_stop(text: str) -> bool:
        return any(stop in text for stop in stop_strings)

    text = decode(token_ids)
    # Nearly always this is all: one text, not one for every new token. Half a character at the end may hide what is
    # before it, so then each is looked at.
    if not has_stop(text) and _NO_CHARACTER not in text:
        return None
    lengths = range(num_checked + 1, len(token_ids) + 1)
    return next((length for length in lengths if has_stop(decode(token_ids[:length]))), None)
