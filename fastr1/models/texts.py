"""What a run makes of the text of a sample: once for training, evaluation and checking."""

from __future__ import annotations

import torch

from fastr1.config import DataConfig
from fastr1.models.family import Processor
from fastr1.schema import Sample, SftSample


def prompt_ids(processor: Processor, data: DataConfig, sample: Sample) -> torch.Tensor:
    """The prompt of a question, instruction included: (L,). Raises: DataError where it does not fit into the model."""
    return processor.prompt_ids(sample.problem, instruction=data.instruction, origin=sample.origin)


def conversation_ids(processor: Processor, data: DataConfig, sample: SftSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and answer of a supervised sample, whose question carries its instruction: (L,) and (T,).

    Raises: DataError where the two cannot be told apart or do not fit into the model.
    """
    return processor.conversation_ids(sample.question, sample.answer, origin=sample.origin)
