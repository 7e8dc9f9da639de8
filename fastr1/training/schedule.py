"""The learning rate over the steps of the optimizer."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from fastr1.config import OptimConfig, check_value


def build_scheduler(optimizer: torch.optim.Optimizer, optim: OptimConfig, num_steps: int) -> LambdaLR:
    """Warm-up, then `optim.lr_scheduler_type`, over `num_steps` steps. Raises: ConfigError for an unknown one."""
    check_value("optim.lr_scheduler_type", optim.lr_scheduler_type)
    name = {"constant": "constant_with_warmup"}.get(optim.lr_scheduler_type, optim.lr_scheduler_type)
    return get_scheduler(name, optimizer, math.ceil(num_steps * optim.warmup_ratio), num_steps)
