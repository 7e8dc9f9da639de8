"""Whether the longest sample of a run fits, tried before the first update instead of when its turn comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastr1.schema import S
from fastr1.training.agreement import agreement
from fastr1.training.loop import TrainingRun
from fastr1.training.packing import check_fits


def check_longest(run: TrainingRun[S], texts: Sequence[tuple[torch.Tensor, int]]) -> None:
    """Refuses the sample with most text if no micro-batch holds it, beside a video of `data.num_frames` frames (of one
    frame where that is -1, so that longer videos are only found out when their turn comes). All ranks call it.

    Args:
        texts: of each sample, the ids of its prompt and the number of tokens that will follow it.

    Raises: PackingError.
    """
    longest = max(range(len(texts)), key=lambda index: len(texts[index][0]) + texts[index][1])
    ids, num_behind = texts[longest]
    (blank,) = run.fill([None])
    with torch.no_grad():
        video = run.distributed(lambda model: list(model.visual_tokens([model.encode(blank)])))
    with run.distributed.gathered_parameters():
        (length,) = run.model.prompt_lengths([ids.to(run.distributed.device)], video)
    with agreement(run.distributed):
        check_fits(length, num_behind, run.config.optim.max_tokens_per_micro_batch, origin=run.samples[longest].origin)
