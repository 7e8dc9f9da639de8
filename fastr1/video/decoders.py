"""Load the wanted frames of a video file: the one door to both decoders.

Refuses what is not a decodable video with `VideoError`; never gives another clip, fewer frames or a blank instead.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from fastr1.config import DataConfig, check_value
from fastr1.schema import Clip
from fastr1.video import pyav_backend, torchcodec_backend
from fastr1.video.errors import REPLACE_FILE, BackendError, VideoError
from fastr1.video.frame_rule import select_indices
from fastr1.video.torchcodec_backend import TorchcodecUnavailableError

TORCHCODEC_REMEDY = (
    "Install torchcodec and FFmpeg 4 to 8, or in a checkout run `python scripts/link_ffmpeg.py` (no root needed), "
    'or set data.backend to "pyav".'
)

logger = logging.getLogger(__name__)


def load_clip(
    path: str | Path,
    *,
    num_frames: int = DataConfig.num_frames,
    max_frames: int | None = DataConfig.max_frames,
    device: str | torch.device = "cpu",
    backend: str = DataConfig.backend,
    num_ffmpeg_threads: int = 1,
) -> Clip:
    """Decode `num_frames` evenly spaced frames of one video, first and last included, onto `device`.

    Args:
        num_frames: frames to take; a shorter video repeats some. -1: one per second, at most `max_frames`.
        backend: "torchcodec", "pyav", or "auto": for a CUDA `device` torchcodec where it can be loaded, which also
            decodes on the GPU where it can; for the CPU PyAV, which is faster there. `Clip.backend` says what was used.
        num_ffmpeg_threads: decoding threads for this clip; 0 leaves it to FFmpeg. Has no effect on the result.
    Returns: the frames (F, 3, H, W) uint8 with their numbers and times. May be called from several threads at once.
    Raises: VideoError if the file cannot be decoded; BackendError for a forced backend that cannot be loaded;
        ValueError for an option out of range.
    """
    if num_ffmpeg_threads < 0:
        raise ValueError(f"num_ffmpeg_threads must be at least 0, got {num_ffmpeg_threads}")
    # FFmpeg would take "a:b.mp4" for a protocol; an absolute path is always a file.
    path = Path(path).absolute()
    _check_is_file(path)
    choose = functools.partial(select_indices, num_frames=num_frames, max_frames=max_frames)
    device = torch.device(device)
    decoder = _backend_module(backend, device.type)
    return decoder.decode(path, choose, device=device, num_ffmpeg_threads=num_ffmpeg_threads)


def resolve_backend(
    backend: str = DataConfig.backend, device: str | torch.device | None = None
) -> Literal["torchcodec", "pyav"]:
    """The decoder a setting stands for here: "torchcodec" or "pyav". Raises: BackendError as `load_clip` does.

    `device`: where the frames are wanted; None: a GPU where there is one.
    """
    return "pyav" if _backend_module(backend, _device(device).type) is pyav_backend else "torchcodec"


def describe_backend(backend: str = DataConfig.backend, device: str | torch.device | None = None) -> str:
    """One line about that decoder, its version and, where "auto" had to do without torchcodec, why."""
    wanted = _device(device)
    module = _backend_module(backend, wanted.type)
    if backend == "auto" and module is pyav_backend and wanted.type != "cpu":
        return f"{module.describe()}; no torchcodec: {_why_no_torchcodec()}"
    return module.describe()


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@functools.cache  # so that the reason for doing without torchcodec is logged once
def _backend_module(backend: str, device_type: str) -> ModuleType:
    check_value("data.backend", backend)
    if backend == "pyav" or (backend == "auto" and device_type == "cpu"):
        return pyav_backend
    reason = _why_no_torchcodec()
    if reason is None:
        return torchcodec_backend
    if backend == "torchcodec":
        raise BackendError(f'backend "torchcodec" cannot be loaded: {reason}. {TORCHCODEC_REMEDY}')
    logger.warning("decoding videos with PyAV on the CPU; torchcodec cannot be loaded: %s", reason)
    return pyav_backend


def _why_no_torchcodec() -> str | None:
    try:
        torchcodec_backend.load_torchcodec()
    except TorchcodecUnavailableError as error:
        return str(error)
    return None


def _check_is_file(path: Path) -> None:
    """Name the plain reasons in plain words before a decoder turns them into its own."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(path, "is not a regular file")
        with open(path, "rb"):
            pass
    except FileNotFoundError as error:
        raise VideoError(path, "does not exist", f"Check the path and data.video_root. {REPLACE_FILE}") from error
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error.strerror})", "Check the path and its permissions.") from error
    if status.st_size == 0:
        raise VideoError(path, "is empty")
