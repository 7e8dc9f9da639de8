"""How the tests of the kernels judge numbers: against float64, with torch in the same precision as yardstick."""

from __future__ import annotations

import torch
from torch import Tensor


def rand(*shape: int, seed: int = 0) -> Tensor:
    """float64 normal numbers; the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounding_floor(dtype: torch.dtype, device: str) -> float:
    """Triton's interpreter cuts float32 to bfloat16 instead of rounding: an error of up to 2**-7 that a GPU has not."""
    return 2**-7 if dtype == torch.bfloat16 and device == "cpu" else 1e-6


def assert_as_accurate(got: Tensor, yardstick: Tensor, gold: Tensor, floor: float = 1e-6) -> None:
    """The largest error is at most twice that of the yardstick plus `floor` of the largest value; subnormal numbers
    have no digits to be accurate in."""
    assert got.shape == yardstick.shape == gold.shape
    if gold.numel() == 0:
        return
    got, yardstick, gold = got.detach().double().cpu(), yardstick.detach().double().cpu(), gold.detach().double().cpu()
    error, allowed = (got - gold).abs().max(), 2 * (yardstick - gold).abs().max()
    limit = allowed + floor * gold.abs().max() + torch.finfo(torch.float64).tiny
    assert error <= limit, f"error {error:.3e} of {gold.abs().max():.3e}, allowed {limit:.3e}"
