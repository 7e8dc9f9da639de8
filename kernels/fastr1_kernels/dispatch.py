"""The rules that choose between the Triton kernels and plain torch.

Triton: float32, bfloat16 and float16 tensors on a GPU; also on a CPU where TRITON_INTERPRET=1 was set before the
import, which runs the kernels in Python, slowly, for tests. Plain torch: everything else: CPU tensors and float64.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .options import LossOptions

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def uses_triton(x: Tensor) -> bool:
    return x.dtype in KERNEL_DTYPES and _runs_triton(x)


def rewards_use_triton(rewards: Tensor) -> bool:
    """Rewards may also be integers or booleans; float64 rewards keep their precision in torch."""
    return rewards.dtype != torch.float64 and _runs_triton(rewards)


def may_read_values(check_values: bool) -> bool:
    """Whether a check may read a tensor: never inside `torch.compile`, which would break the graph there."""
    return check_values and not torch.compiler.is_compiling()


def is_per_token(options: LossOptions, has_sampler: bool) -> bool:
    """Whether no token's loss depends on the other tokens of its sequence, beside a threshold on the entropy."""
    return (
        options.importance_sampling_level == "token"
        and not (has_sampler and options.sampler_correction.startswith("sequence"))
        and options.off_policy_threshold is None
    )


def fits_one_launch(options: LossOptions, has_sampler: bool) -> bool:
    """Whether the loss of every token depends on its own row alone, so that one launch gives loss and gradient."""
    return is_per_token(options, has_sampler) and options.top_entropy_quantile == 1


def knows_gradient(logits: Tensor, has_grad_scale: bool) -> bool:
    """Whether a gradient written in the forward pass survives its dtype.

    float16 needs loss scaling: at 1/65,536 of its size most of the gradient rounds to 0, and the factor comes too late.
    """
    return logits.dtype != torch.float16 or has_grad_scale or not (logits.requires_grad and torch.is_grad_enabled())


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda or (INTERPRETED and x.device.type == "cpu")


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of `x` current: Triton launches on the current device, whatever its arguments live on."""
    return torch.cuda.device_of(x)
