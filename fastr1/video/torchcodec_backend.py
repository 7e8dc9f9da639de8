"""Decoding with torchcodec: on the GPU's video engine where that works, else on the CPU. The only importer of it.

torchcodec needs FFmpeg's shared libraries. Where the system has none, `scripts/link_ffmpeg.py` puts a copy into the
environment; it is loaded here first, so that no environment variable has to be set before Python starts.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import logging
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastr1.schema import Clip
from fastr1.video.errors import REPLACE_FILE, VideoError

if TYPE_CHECKING:
    from collections.abc import Callable

LINKED_FFMPEG = Path(sys.prefix) / "lib" / "fastr1-ffmpeg"  # made by scripts/link_ffmpeg.py
TRY_PYAV = f'Try data.backend "pyav". {REPLACE_FILE}'

logger = logging.getLogger(__name__)
_load_lock = threading.Lock()
_load_result: Any = None  # the module, or the reason (str) why it cannot be loaded; a failed import is not repeated


class TorchcodecUnavailableError(ImportError):
    """torchcodec or the FFmpeg libraries below it cannot be loaded. The message is the reason."""


def load_torchcodec() -> Any:
    """The torchcodec module; safe to call from several threads.

    Raises: TorchcodecUnavailableError with the reason.
    """
    global _load_result
    with _load_lock:
        if _load_result is None:
            _load_result = _import_torchcodec()
    if isinstance(_load_result, str):
        raise TorchcodecUnavailableError(_load_result)
    return _load_result


def describe() -> str:
    """Version, build and FFmpeg in use, for logs and run metadata."""
    torchcodec = load_torchcodec()
    return f"torchcodec {torchcodec.__version__} (FFmpeg {torchcodec.ffmpeg_major_version})"


def decode(
    path: Path,
    choose: Callable[[int, float], list[int]],  # (frames in the file, frames per second) -> frames wanted
    *,
    device: torch.device,
    num_ffmpeg_threads: int,
) -> Clip:
    """Decode the chosen frames onto `device`; a GPU that cannot decode this video leaves it to the CPU, logged once."""
    if device.type == "cuda":
        try:
            return _decode_on(str(device), path, choose, num_ffmpeg_threads)
        except VideoError as error:
            # Either the video or the GPU is at fault: the CPU tells which.
            clip = _decode_on("cpu", path, choose, num_ffmpeg_threads)
            _warn_once(f"torchcodec cannot decode on {device}, using the CPU: {error.reason}")
    else:
        clip = _decode_on("cpu", path, choose, num_ffmpeg_threads)
    return dataclasses.replace(clip, frames=clip.frames.to(device))


def _decode_on(device: str, path: Path, choose: Callable[[int, float], list[int]], num_ffmpeg_threads: int) -> Clip:
    video_decoder = load_torchcodec().decoders.VideoDecoder
    try:
        # "exact" scans the file, so that frame i is frame i also where the header is wrong or the rate varies.
        decoder = video_decoder(str(path), device=device, num_ffmpeg_threads=num_ffmpeg_threads, seek_mode="exact")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise VideoError(path, f"not a readable video ({_first_line(error)})") from error
    metadata = decoder.metadata
    if not metadata.num_frames:
        raise VideoError(path, "the video stream holds no frame")
    if not metadata.average_fps:
        raise VideoError(path, "the frame rate is unknown")
    fps = round(metadata.average_fps, 6)  # 29.999999999999996 must not cost a frame of the one-per-second rule
    indices = choose(metadata.num_frames, fps)
    try:
        batch = decoder.get_frames_at(indices)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise VideoError(path, f"its frames cannot be decoded ({_first_line(error)})", TRY_PYAV) from error
    times = batch.pts_seconds.tolist()
    if not _are_those_frames(indices, times, metadata.begin_stream_seconds, fps):
        raise VideoError(path, f"torchcodec gives other frames than {indices} (those at {times} s)", TRY_PYAV)
    on_gpu = device != "cpu" and not decoder.cpu_fallback
    if device != "cpu" and not on_gpu:
        _warn_once(f"torchcodec decodes on the CPU, not on {device}: {decoder.cpu_fallback}")
    return Clip(
        frames=batch.data,
        indices=tuple(indices),
        timestamps_seconds=tuple(times),
        source_fps=fps,
        duration_seconds=metadata.num_frames / fps,
        backend="torchcodec-cuda" if on_gpu else "torchcodec-cpu",
    )


def _are_those_frames(indices: list[int], times: list[float], begin_seconds: float, fps: float) -> bool:
    """Whether frame 0 is shown first and later frames later.

    Where a file cannot be sought in exactly or a frame cannot be decoded, torchcodec gives a neighbour without a word.
    """
    steps = zip(itertools.pairwise(indices), itertools.pairwise(times), strict=True)
    in_order = all((j > i) == (later > earlier) for (i, j), (earlier, later) in steps)
    return in_order and (indices[0] > 0 or times[0] - begin_seconds < 0.5 / fps)


def _import_torchcodec() -> Any:
    """The module, or the reason why it cannot be loaded."""
    try:
        # libavdevice needs all the others, so one call loads the set. torchcodec's own libraries then find them by
        # name. Not RTLD_GLOBAL: PyAV's FFmpeg in the same process must keep calling its own copy.
        for library in sorted(LINKED_FFMPEG.glob("libavdevice.so.*")):
            ctypes.CDLL(str(library))
        import torchcodec
        import torchcodec.decoders

        if torchcodec.ffmpeg_major_version is None:
            # Newer versions import without FFmpeg and fail at the first use: let that say what is missing.
            torchcodec.decoders.VideoDecoder(b"")
            return "torchcodec found no FFmpeg"
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec's message holds one traceback per FFmpeg version: keep what the dynamic loader said about each.
        said = re.findall(r"^OSError: (?!Could not load this library)(.+)$", str(error), flags=re.MULTILINE)
        short = [
            line.replace(": cannot open shared object file: No such file or directory", " not found") for line in said
        ]
        return "; ".join(dict.fromkeys(short)) or _first_line(error.__cause__ or error)
    return torchcodec


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # torchcodec puts the place in its own source in front.
    return re.sub(r"^\w+, \S+\.(cpp|h):\d+, ", "", lines[0]) if lines else type(error).__name__
