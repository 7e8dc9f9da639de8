"""Losses of group-relative policy optimisation for language models, from logits or straight from hidden states."""

from .advantages import group_advantages
from .logps import linear_logps, selective_log_softmax
from .losses import GRPOOutput, grpo_loss, linear_grpo_loss

__all__ = [
    "GRPOOutput",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logps",
    "selective_log_softmax",
]
