"""One axis of Pillow's bicubic resize as products of matrices, the same bits.

Pillow's filter weights are whole numbers of 22 bits; an output is a weighted sum of a short window of inputs, rounded.
The outputs are cut into blocks that share a window, so the matrices are small. A GPU multiplies them in float64, which
holds the sums exactly. On a CPU a weight is cut into three signed bytes and an input is centered on zero; the three
products of bytes are summed in 32 bits, exactly too, and put together as (high · 256 + middle) · 256 + low, which also
fits into 32 bits. So nothing depends on the order of summation or on the device.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

WEIGHT_BITS = 22  # fixed-point filter weights, as Pillow holds them
BLOCK_OF_DOUBLES = 32  # outputs that share a window of inputs
BLOCK_OF_BYTES = 16
SIGN_BIT = 0x80  # flipped, an unsigned byte x is the signed byte x - 128


def resize_by_doubles(
    pixels: torch.Tensor,  # (..., in_size) uint8
    size: int,
) -> torch.Tensor:  # (..., size) uint8
    inputs, weights = (table.to(pixels.device) for table in _tables_of_doubles(pixels.shape[-1], size))
    num_blocks, window, num_outputs = weights.shape
    windows = pixels.reshape(-1, pixels.shape[-1]).index_select(1, inputs).view(-1, num_blocks, window)
    sums = torch.bmm(windows.transpose(0, 1).double(), weights)  # (blocks, lines, outputs of a block)
    half = 1 << (WEIGHT_BITS - 1)
    rounded = (sums.add_(half).long() >> WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)
    return rounded.transpose(0, 1).reshape(*pixels.shape[:-1], num_blocks * num_outputs)[..., :size]


def resize_by_bytes(
    centered: torch.Tensor,  # (..., in_size) int8, on a CPU for which `bytes_are_exact`
    size: int,
) -> torch.Tensor:  # (size, ...) int8: the lines turned, which makes the other axis the last
    starts, weights, constants = _tables_of_bytes(centered.shape[-1], size)
    num_blocks, num_rows, window = weights.shape
    num_outputs = num_rows // 3
    columns = centered.movedim(-1, 0).reshape(centered.shape[-1], -1)
    resized = torch.empty(num_blocks * num_outputs, columns.shape[1], dtype=torch.int8, device=columns.device)
    sums = torch.empty(num_rows, columns.shape[1], dtype=torch.int32, device=columns.device)
    high, middle, low = sums.split(num_outputs)
    for start, weight, constant, target in zip(starts, weights, constants, resized.split(num_outputs), strict=True):
        torch._int_mm(weight, columns[start : start + window], out=sums)
        torch.add(middle, high, alpha=256, out=middle)
        torch.add(low, middle, alpha=256, out=low)
        target.copy_(low.add_(constant).bitwise_right_shift_(WEIGHT_BITS).clamp_(-128, 127))
    return resized[:size].view(size, *centered.shape[:-1])


@functools.cache
def bytes_are_exact() -> bool:
    """Whether this CPU multiplies signed bytes fast and exactly. CPUs without VNNI cut the sums of two products at 16
    bits; the extremes are tried even with VNNI, because oneDNN may have been told not to use it."""
    if not (torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()):
        return False
    weights = torch.full((3 * BLOCK_OF_BYTES, 64), 127, dtype=torch.int8, device="cpu")
    extremes = (torch.full((64, 2048), value, dtype=torch.int8, device="cpu") for value in (-128, 127))
    return all(
        torch.equal(torch._int_mm(weights, inputs).long(), weights.long() @ inputs.long()) for inputs in extremes
    )


@functools.lru_cache(maxsize=64)
def _tables_of_doubles(in_size: int, out_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For every block of outputs the inputs that count for it, (blocks · window,), and what each counts for each
    output, (blocks, window, outputs) float64 whole numbers."""
    starts, weights = _blocks(in_size, out_size, BLOCK_OF_DOUBLES)
    inputs = starts[:, None] + np.arange(weights.shape[2])
    return torch.from_numpy(inputs.reshape(-1)), torch.from_numpy(weights.transpose(0, 2, 1).astype(float))


@functools.lru_cache(maxsize=64)
def _tables_of_bytes(in_size: int, out_size: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """For every block of outputs its first input; the high, the middle and the low bytes of its weights, (blocks,
    3 · outputs, window) int8; and what is added to its sums, (blocks, outputs, 1) int32: a half, for rounding, and
    128 · (sum of the weights - 1), because inputs and outputs are held 128 too small."""
    starts, weights = _blocks(in_size, out_size, BLOCK_OF_BYTES)
    low = ((weights + 128) & 255) - 128
    middle = ((((weights - low) >> 8) + 128) & 255) - 128
    high = (weights - low - (middle << 8)) >> 16
    constants = 128 * (weights.sum(2, keepdims=True) - (1 << WEIGHT_BITS)) + (1 << (WEIGHT_BITS - 1))
    parts = np.concatenate([high, middle, low], axis=1).astype(np.int8)
    return starts.tolist(), torch.from_numpy(parts), torch.from_numpy(constants.astype(np.int32))


def _blocks(in_size: int, out_size: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The first input of the window of every block of outputs, (blocks,), and what the inputs of the window count for
    each output, (blocks, block, window) int64; the outputs that the last block has too many are 0."""
    first, fixed_point = _filter_table(in_size, out_size)
    num_taps = len(fixed_point)
    place = np.arange(out_size)
    starts = first[::block]
    window = min(in_size, int((first - starts[place // block]).max()) + num_taps)
    starts = np.minimum(starts, in_size - window)
    weights = np.zeros((len(starts), block, window), np.int64)
    for tap in range(num_taps):
        inside = first + tap < in_size  # beyond the edge the weight is 0
        at = place[inside]
        weights[at // block, at % block, first[at] + tap - starts[at // block]] = fixed_point[tap, at]
    return starts, weights


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
