"""The keys of draws: pure functions of seed, prompt and completion.

The noise behind a draw is a hash of key, position and token (`fastr1_kernels.gumbel_noise`), so a draw does not depend
on the other rows of the batch, their order, or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


def completion_keys(seed: int, prompt_keys: Sequence[int], num_generations: int) -> torch.Tensor:
    """One int64 key per completion, (B·G,), from the seed, the prompt's key and the completion's index."""
    prompts = torch.tensor(list(prompt_keys), dtype=torch.int64).repeat_interleave(num_generations)
    index = torch.arange(num_generations).repeat(len(prompt_keys))
    return _mix(_mix(_mix(torch.full_like(prompts, seed)) + prompts) + index)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser on int64 (products wrap). Source: Steele, Lea and Flood, OOPSLA 2014."""
    x = (x + 1) * _GOLDEN
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: int64 shifts in torch copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
