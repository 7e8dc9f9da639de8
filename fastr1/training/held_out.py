"""The held-out questions of a run."""

from __future__ import annotations

from dataclasses import replace

from fastr1.config import TrainConfig
from fastr1.data.questions import load_questions
from fastr1.evaluation.multiple_choice import Evaluator
from fastr1.models import Processor


def build_evaluator(config: TrainConfig, processor: Processor) -> Evaluator | None:
    """What answers `data.eval_file` greedily; None where `run.eval_steps` is 0.

    Raises: DataError as `load_questions`, under the policy for bad data of the run.
    """
    data, run = config.data, config.run
    if not run.eval_steps:
        return None
    assert data.eval_file is not None
    held_out = load_questions(
        data.eval_file,
        data.eval_video_root or data.video_root,
        policy=data.policy,
        max_bad_fraction=data.max_bad_fraction,
        limit=run.eval_samples,
    )
    return Evaluator(
        held_out,
        processor,
        data,
        batch_size=run.per_device_eval_batch_size,
        max_completion_length=config.grpo.max_completion_length,
        stop_strings=config.grpo.stop_strings,
        rollout=replace(config.rollout, num_speculative_tokens=0),  # each question once: nothing to guess from
    )
