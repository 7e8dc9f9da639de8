"""Rewards: pure functions of a completion's text, one file each, and the weighted sum that keeps every part visible."""

from fastr1.rewards.scorer import RewardError, RewardFunction, Scorer, build_scorer

__all__ = ["RewardError", "RewardFunction", "Scorer", "build_scorer"]
