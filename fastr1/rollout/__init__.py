"""Completions sampled from the trainer's own weights."""

from fastr1.rollout.backends import build_sampler, sample_completions
from fastr1.rollout.engine import RolloutEngine
from fastr1.rollout.params import SamplingParams

__all__ = ["RolloutEngine", "SamplingParams", "build_sampler", "sample_completions"]
