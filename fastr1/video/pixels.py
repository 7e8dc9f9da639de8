"""Frames to the vision tower's input on the frames' own device: the resize it was trained with, scale, normalise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastr1.video.resize import resize_frames

RESCALE = 1 / 255


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
    """(resize(frames) · 1/255 - mean) / std, as `dtype` on the frames' device. Thread-safe.

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
    scale = torch.full((len(frames), 1, 1, 1), RESCALE, device=frames.device)
    if skip_rescale_quirk:
        # On the device, without waiting for it: the maximum of the frame as it was before the resize.
        scale = torch.where(frames.amax(dim=(1, 2, 3), keepdim=True) <= 1, 1.0, scale)
    mean_tensor = torch.tensor(mean, device=frames.device).view(1, 3, 1, 1)
    std_tensor = torch.tensor(std, device=frames.device).view(1, 3, 1, 1)
    resized = resize_frames(frames, height, width)
    pixels = torch.empty(resized.shape, dtype=dtype, device=frames.device)
    # On a CPU one frame at a time, which stays in the cache; on a GPU all at once.
    num_together = 1 if frames.device.type == "cpu" else max(1, len(frames))
    for target, part, factor in zip(*(x.split(num_together) for x in (pixels, resized, scale)), strict=True):
        target.copy_(part.contiguous().float().mul_(factor).sub_(mean_tensor).div_(std_tensor))
    return pixels
