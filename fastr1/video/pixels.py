"""Frames to the vision tower's input: Pillow-equal bicubic resize on the frames' own device, scale, normalise.

Vision towers are trained on frames resized by Pillow: bicubic with antialiasing, straight to their size, one axis
after the other in fixed-point arithmetic, each pass rounded to 8 bits. The same is done here with torch integers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

RESCALE = 1 / 255
WEIGHT_BITS = 22  # fixed-point filter weights, as Pillow holds them


def preprocess_frames(
    frames: torch.Tensor,  # (F, 3, H, W) uint8 RGB
    *,
    height: int,
    width: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    skip_rescale_quirk: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(resize(frames) · 1/255 - mean) / std, as `dtype` on the frames' device.

    Args:
        height, width: of the result in pixels; the aspect ratio is not kept.
        skip_rescale_quirk: leave out the 1/255 for a frame whose maximum is at most 1, as the original does because it
            takes such a frame for an already scaled one. Matters for (nearly) black frames only.
    Returns: (F, 3, height, width).
    Raises: ValueError for frames of another shape or dtype, or a size below 1.
    Numerics: the resize equals that of Pillow 13 bit for bit and is the same on every device; the rest is float32.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames must be (F, 3, H, W) uint8, got {tuple(frames.shape)} {frames.dtype}")
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    pixels = _resize(frames, height, width)
    scale = torch.full((len(frames), 1, 1, 1), RESCALE, device=frames.device)
    if skip_rescale_quirk:
        # On the device, without waiting for it: the maximum of the frame as it was before the resize.
        scale = torch.where(frames.amax(dim=(1, 2, 3), keepdim=True) <= 1, 1.0, scale)
    mean_tensor = torch.tensor(mean, device=frames.device).view(1, 3, 1, 1)
    std_tensor = torch.tensor(std, device=frames.device).view(1, 3, 1, 1)
    return ((pixels * scale - mean_tensor) / std_tensor).to(dtype)


def _resize(
    frames: torch.Tensor,  # (F, 3, H, W) uint8
    height: int,
    width: int,
) -> torch.Tensor:  # (F, 3, height, width) uint8
    """One axis after the other, each rounded to 8 bits; an axis that has the right length is left alone."""
    num_lines, num_columns = frames.shape[2:]
    # Pillow 13 begins with the height where that shrinks by more than twice as many lines as the width; older versions
    # always begin with the width. The order shows in the rounding, by 1/255 in smooth pictures.
    height_first = num_lines > height and num_lines - height > 2 * (num_columns - width)
    for dim, size in ((2, height), (3, width)) if height_first else ((3, width), (2, height)):
        if frames.shape[dim] != size:
            frames = _resize_axis(frames, dim, size)
    return frames


def _resize_axis(frames: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    taps, weights = (table.to(frames.device) for table in _filter_table(frames.shape[dim], size))
    shape = [1, 1, 1, 1]
    shape[dim] = size
    total: torch.Tensor | None = None
    for tap, weight in zip(taps, weights, strict=True):  # in whole numbers, so every device gives the same bits
        part = frames.index_select(dim, tap).int() * weight.view(shape)
        total = part if total is None else total.add_(part)
    assert total is not None
    half = 1 << (WEIGHT_BITS - 1)
    return (total.add_(half) >> WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _filter_table(in_size: int, out_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K input positions that count for each output position, and their int32 weights: both (K, out_size)."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)  # antialiasing: the filter widens with the step between outputs
    reach = 2 * stretch
    center = (np.arange(out_size) + 0.5) * scale
    first = np.maximum((center - reach + 0.5).astype(int), 0)
    last = np.minimum((center + reach + 0.5).astype(int), in_size)
    taps = first + np.arange((last - first).max())[:, None]
    weights = np.where(taps < last, _cubic((taps - center + 0.5) * (1 / stretch)), 0.0)
    weights /= weights.sum(axis=0)
    fixed_point = np.trunc(weights * (1 << WEIGHT_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    return torch.from_numpy(np.minimum(taps, in_size - 1)), torch.from_numpy(fixed_point)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Cubic convolution with a = -0.5; the order of the operations decides the last bit of a weight."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))
