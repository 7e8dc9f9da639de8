"""Pillow's bicubic resize with antialiasing, the same bits: by products of matrices, or by Pillow itself.

One axis after the other, each rounded to 8 bits, as Pillow 13 does it. On a GPU the products are of float64; on a CPU
they are of bytes where its instructions add such products up exactly (VNNI), which takes half of Pillow's time; on any
other CPU Pillow resizes.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from fastr1.video.resize_products import SIGN_BIT, bytes_are_exact, resize_by_bytes, resize_by_doubles

CHUNK_ELEMENTS = 2**23  # of the frames resized at a time on a GPU: 64 MiB in float64
CHUNK_LINES = 2**12  # of the frames resized at a time on a CPU, lines of one colour: their sums stay in the cache


def resize_frames(
    frames: torch.Tensor,  # (F, 3, H, W) uint8
    height: int,
    width: int,
) -> torch.Tensor:  # (F, 3, height, width) uint8
    """Bicubic, antialiased, straight to this size; bit for bit as Pillow 13. Thread-safe; a CPU releases the GIL.

    Frames that have this size are returned as they are, not copied.
    """
    axes = _axes(frames.shape, height, width)
    if not axes or not len(frames):
        return frames.reshape(len(frames), 3, height, width)
    if frames.device.type != "cpu":
        num_together, resize = CHUNK_ELEMENTS // frames[0].numel(), _resize_by_doubles
    elif bytes_are_exact():
        # Lines of a frame: three colours, times the length of the other axis, which is the new one for the second axis.
        first, new_size = axes[0]
        num_lines = 3 * max(frames.shape[5 - first], new_size)
        num_together, resize = CHUNK_LINES // num_lines, _resize_by_bytes
    else:
        num_together, resize = 1, _resize_by_pillow
    return torch.cat([resize(part, axes) for part in frames.split(max(1, num_together))])


def _axes(shape: torch.Size, height: int, width: int) -> list[tuple[int, int]]:
    """(dimension, new size) in the order in which they are resized; an axis that has the right length is left alone."""
    num_lines, num_columns = shape[2:]
    # Pillow 13 begins with the height where that shrinks by more than twice as many lines as the width; older versions
    # always begin with the width. The order shows in the rounding, by 1/255 in smooth pictures.
    height_first = num_lines > height and num_lines - height > 2 * (num_columns - width)
    axes = [(2, height), (3, width)] if height_first else [(3, width), (2, height)]
    return [(dim, size) for dim, size in axes if shape[dim] != size]


def _resize_by_pillow(frames: torch.Tensor, axes: list[tuple[int, int]]) -> torch.Tensor:
    resized = []
    for picture in frames.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(picture)
        for dim, size in axes:  # one axis at a time: the order is ours, whatever the version of Pillow
            image = image.resize((image.width, size) if dim == 2 else (size, image.height), Image.Resampling.BICUBIC)
        resized.append(torch.from_numpy(np.array(image)))
    return torch.stack(resized).permute(0, 3, 1, 2)


def _resize_by_doubles(frames: torch.Tensor, axes: list[tuple[int, int]]) -> torch.Tensor:
    for dim, size in axes:
        frames = resize_by_doubles(frames.movedim(dim, -1), size).movedim(-1, dim)
    return frames


def _resize_by_bytes(frames: torch.Tensor, axes: list[tuple[int, int]]) -> torch.Tensor:
    centered = frames.contiguous().bitwise_xor(SIGN_BIT).view(torch.int8)
    order = [0, 1, 2, 3]  # of the dimensions in memory
    for dim, size in axes:
        centered = resize_by_bytes(centered.movedim(order.index(dim), -1), size)
        order.remove(dim)
        order.insert(0, dim)
    resized = centered.view(torch.uint8).bitwise_xor(SIGN_BIT)
    return resized.permute([order.index(dim) for dim in range(4)])
