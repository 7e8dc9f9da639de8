"""Rewards: pure functions of completion text, and the weighted sum that keeps every part visible."""

from fastr1.rewards.functions import extract_answer_letter
from fastr1.rewards.scorer import RewardError, RewardFunction, Scored, Scorer, build_scorer

__all__ = ["RewardError", "RewardFunction", "Scored", "Scorer", "build_scorer", "extract_answer_letter"]
