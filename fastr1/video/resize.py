"""Pillow's bicubic resize with antialiasing: by Pillow on a CPU, by two products of matrices on a GPU, the same bits.

One axis after the other in fixed-point arithmetic, each rounded to 8 bits, as Pillow 13 does it. On a GPU an axis is
cut into blocks of outputs, each a weighted sum of a short window of inputs, so the product is small; its terms are
whole numbers whose sums float64 holds exactly, so the order of summation and the device do not matter.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

WEIGHT_BITS = 22  # fixed-point filter weights, as Pillow holds them
BLOCK = 32  # outputs that share a window of inputs
CHUNK_ELEMENTS = 2**23  # of the frames resized at a time on a GPU: 64 MiB in float64


def resize_frames(
    frames: torch.Tensor,  # (F, 3, H, W) uint8
    height: int,
    width: int,
) -> torch.Tensor:  # (F, 3, height, width) uint8
    """Bicubic, antialiased, straight to this size; bit for bit as Pillow 13. Thread-safe; on a CPU without the GIL."""
    if frames.device.type == "cpu":
        return _resize_by_pillow(frames, height, width)
    num_together = max(1, CHUNK_ELEMENTS // max(1, frames[:1].numel()))
    return torch.cat([_resize_by_products(part, height, width) for part in frames.split(num_together)])


def _axes(shape: torch.Size, height: int, width: int) -> list[tuple[int, int]]:
    """(dimension, new size) in the order in which they are resized; an axis that has the right length is left alone."""
    num_lines, num_columns = shape[2:]
    # Pillow 13 begins with the height where that shrinks by more than twice as many lines as the width; older versions
    # always begin with the width. The order shows in the rounding, by 1/255 in smooth pictures.
    height_first = num_lines > height and num_lines - height > 2 * (num_columns - width)
    axes = [(2, height), (3, width)] if height_first else [(3, width), (2, height)]
    return [(dim, size) for dim, size in axes if shape[dim] != size]


def _resize_by_pillow(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    axes = _axes(frames.shape, height, width)
    if not axes:
        return frames
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for picture, target in zip(frames.permute(0, 2, 3, 1).numpy(), resized, strict=True):
        image = Image.fromarray(picture)
        for dim, size in axes:  # one axis at a time: the order is ours, whatever the version of Pillow
            image = image.resize((image.width, size) if dim == 2 else (size, image.height), Image.Resampling.BICUBIC)
        target[:] = np.asarray(image)
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def _resize_by_products(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    for dim, size in _axes(frames.shape, height, width):
        frames = _resize_axis(frames.movedim(dim, -1), size).movedim(-1, dim)
    return frames


def _resize_axis(
    pixels: torch.Tensor,  # (..., in_size) uint8
    size: int,
) -> torch.Tensor:  # (..., size) uint8
    inputs, weights = (table.to(pixels.device) for table in _window_table(pixels.shape[-1], size))
    num_blocks, window, _ = weights.shape
    windows = pixels.reshape(-1, pixels.shape[-1]).index_select(1, inputs).view(-1, num_blocks, window)
    sums = torch.bmm(windows.transpose(0, 1).double(), weights)  # (blocks, pixels / in_size, BLOCK)
    half = 1 << (WEIGHT_BITS - 1)
    rounded = (sums.add_(half).long() >> WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)
    return rounded.transpose(0, 1).reshape(*pixels.shape[:-1], num_blocks * BLOCK)[..., :size]


@functools.lru_cache(maxsize=64)
def _window_table(in_size: int, out_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For every block of outputs the inputs that count for it, (blocks · window,), and what each counts for each
    output, (blocks, window, BLOCK) float64 whole numbers."""
    first, fixed_point = _filter_table(in_size, out_size)
    num_taps = len(fixed_point)
    starts = first[::BLOCK]
    window = int((first - np.repeat(starts, BLOCK)[:out_size]).max()) + num_taps
    weights = np.zeros((len(starts), window, BLOCK))
    place = np.arange(out_size)
    for tap in range(num_taps):
        weights[place // BLOCK, first - starts[place // BLOCK] + tap, place % BLOCK] = fixed_point[tap]
    inputs = np.minimum(starts[:, None] + np.arange(window), in_size - 1)  # beyond the edge the weight is 0
    return torch.from_numpy(inputs.reshape(-1)), torch.from_numpy(weights)


def _filter_table(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first of the K inputs that count for each output, (out_size,), and their int32 weights, (K, out_size)."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)  # antialiasing: the filter widens with the step between outputs
    reach = 2 * stretch
    center = (np.arange(out_size) + 0.5) * scale
    first = np.maximum((center - reach + 0.5).astype(int), 0)
    last = np.minimum((center + reach + 0.5).astype(int), in_size)
    taps = first + np.arange((last - first).max())[:, None]
    weights = np.where(taps < last, _cubic((taps - center + 0.5) * (1 / stretch)), 0.0)
    weights /= weights.sum(axis=0)
    return first, np.trunc(weights * (1 << WEIGHT_BITS) + np.copysign(0.5, weights)).astype(np.int32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Cubic convolution with a = -0.5; the order of the operations decides the last bit of a weight."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))
