"""Whether every sample fits into a micro-batch: learned before the first update, not hours into the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastr1.training.agreement import agreement
from fastr1.training.loop import TrainingRun
from fastr1.training.packing import check_fits


def check_longest(run: TrainingRun[Any], texts: Sequence[tuple[torch.Tensor, int]]) -> None:
    """Refuses the sample with most text if a micro-batch does not hold it beside a video of `data.num_frames` (where
    that is -1: of one frame, the least; longer videos are measured when they are due). All ranks call it.

    Args:
        texts: of each sample, the ids of its prompt and the number of tokens that will follow it.

    Raises: PackingError, on every rank.
    """
    longest = max(range(len(texts)), key=lambda index: len(texts[index][0]) + texts[index][1])
    ids, num_behind = texts[longest]
    distributed, (blank,) = run.distributed, run.fill([None])
    with torch.no_grad():
        video = distributed(lambda model: list(model.visual_tokens([model.encode(blank)])))
    with distributed.gathered_parameters():
        (length,) = run.model.prompt_lengths([ids.to(distributed.device)], video)
    with agreement(distributed):
        budget = run.config.optim.max_tokens_per_micro_batch
        check_fits(length, num_behind, budget, origin=run.samples[longest].origin)
