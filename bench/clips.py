"""Clips of the loading bench, encoded here, and what loading one gives by the plainest means.

Every frame carries its number in stripes, so that an output proves which frames it holds. The pictures are a fine
texture that moves, in which a resize without antialiasing shows, and a shape with hard edges. Three frames of four are
B-frames, as is usual, and two of them are references of no other frame.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import harness
import numpy as np
import torch
from harness import Group, Outputs
from PIL import Image
from shapes import LoadingCase
from torch import Tensor

STRIPES = 8
# Of the norm of the pixels: other antialiased filters stay below, a resize without antialiasing does not.
TOLERANCE = 0.1


class LoadingGroup(Group):
    @property
    def strict_tolerance(self) -> float:
        """A GPU's video engine has another conversion of colours than FFmpeg, which ours is held to on a CPU."""
        return TOLERANCE if harness.device().type == "cuda" else super().strict_tolerance


@dataclass
class Clip:
    case: LoadingCase
    path: Path
    folder: tempfile.TemporaryDirectory[str]  # removed with this object


def encode(case: LoadingCase) -> Clip:
    folder = tempfile.TemporaryDirectory(prefix="loading-bench-")
    path = Path(folder.name) / "clip.mp4"
    width, height = case.width, case.height
    rng = np.random.default_rng(harness.SEED)
    y, x = np.mgrid[0:height, 0 : 2 * width]
    shading = 255 * (x + y) / (2 * width + height) - 100
    waves = [60 * np.sin(x / 37) + 50 * np.cos(y / 11), 60 * np.cos(y / 29) + 50 * np.sin(x / 7), shading]
    texture = (np.stack(waves, -1) + 100 + rng.integers(-30, 30, (height, 2 * width, 1))).clip(0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=case.fps, options={"preset": "veryfast", "x264-params": "b-adapt=0"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(case.seconds * case.fps):
            shift = 3 * number % width
            picture = texture[:, shift : shift + width].copy()
            left = int((width - height // 3) * (0.5 + 0.5 * np.sin(number / 20)))
            picture[height // 2 : height // 2 + height // 6, left : left + height // 3] = (255, 20, 20)
            bits = (number >> (STRIPES - 1 - np.arange(width) * STRIPES // width)) & 1
            picture[: height // 8] = (bits * 255)[None, :, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return Clip(case, path, folder)


def read_numbers(pixels: Tensor) -> Tensor:
    """The numbers of the frames (F, 3, S, S), whose values lie in [-1, 1]: (F,) int64."""
    side = pixels.shape[-1]
    centers = [side * (2 * stripe + 1) // (2 * STRIPES) for stripe in range(STRIPES)]
    bits = (pixels[:, 1, side // 16, :][:, centers] > 0).long()
    return bits @ (1 << torch.arange(STRIPES - 1, -1, -1, device=bits.device))


def outputs_of(pixels: Tensor) -> Outputs:
    return {"frames": read_numbers(pixels), "pixels": pixels}


def wanted(num_available: int, num_frames: int) -> list[int]:
    """First and last frame included, evenly spaced, truncated."""
    return [int(index) for index in np.linspace(0, num_available - 1, num_frames, dtype=int)]


def decode_all(clip: Clip) -> list[np.ndarray]:
    """Every frame as RGB (H, W, 3)."""
    with av.open(str(clip.path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def preprocess_one(picture: np.ndarray, side: int) -> np.ndarray:
    """One frame as an image processor does it: Pillow's resize, scale, normalise; (3, side, side) float32."""
    resized = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
    scaled = resized.astype(np.float32) * np.float32(1 / 255)
    return ((scaled - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)


def loading_group(case: LoadingCase) -> Group:
    clip = encode(case)
    frames = decode_all(clip)
    indices = wanted(len(frames), case.num_frames)
    pixels = torch.from_numpy(np.stack([preprocess_one(frames[i], case.side) for i in indices])).to(harness.device())
    gold = {"frames": torch.tensor(indices, device=harness.device()), "pixels": pixels}
    scales = {"frames": 1.0, "pixels": float(pixels.double().norm())}  # one wrong frame is an error of 1 at least
    return LoadingGroup(case, clip, gold, scales, None, None, tolerance=TOLERANCE)
