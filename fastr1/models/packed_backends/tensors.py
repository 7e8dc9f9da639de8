"""What a backend of packed attention is given and gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """Tokens one after another; also their gradients. The last dimension is contiguous, the rest may be a view."""

    query: torch.Tensor  # (Tq, H, d)
    key: torch.Tensor  # (Tk, Hkv, d)
    value: torch.Tensor  # (Tk, Hkv, d)

    def empty_like(self) -> Inputs:
        """Room for the gradients, contiguous."""
        return Inputs(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in self))


class Outputs(NamedTuple):
    """Of one part, or merged with those of others."""

    output: torch.Tensor  # (Tq, H, d)
    lse: torch.Tensor  # (H, Tq) log-sum-exp, float32; float64 for float64
