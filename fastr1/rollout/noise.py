"""The keys of draws: pure functions of seed, prompt and completion.

The noise behind a draw is a hash of key, position and token (`fastr1_kernels.gumbel_noise`), so a draw does not depend
on the other rows of the batch, their order, or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastr1_kernels.noise import mix64


def completion_keys(seed: int, prompt_keys: Sequence[int], num_generations: int) -> torch.Tensor:
    """One int64 key per completion, (B·G,) on the CPU, from the seed, the prompt's key and the completion's index."""
    prompts = torch.tensor(list(prompt_keys), dtype=torch.int64).repeat_interleave(num_generations)
    index = torch.arange(num_generations).repeat(len(prompt_keys))
    return mix64(mix64(mix64(torch.full_like(prompts, seed)) + prompts) + index)
