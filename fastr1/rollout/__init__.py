"""Completions sampled from the trainer's own weights."""

from fastr1.rollout.eager import SamplingParams, sample_completions

__all__ = ["SamplingParams", "sample_completions"]
