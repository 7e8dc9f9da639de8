"""Whether a video can be used, found out by decoding what training would decode of it."""

from __future__ import annotations

from fastr1.video.decoders import load_clip
from fastr1.video.errors import VideoError


def find_problem(path: str, num_frames: int, max_frames: int | None, backend: str) -> str | None:
    """Why these frames of a video cannot be had, or None. Runs in a worker process, on the CPU."""
    try:
        load_clip(path, num_frames=num_frames, max_frames=max_frames, backend=backend)
    except VideoError as error:
        return error.problem
    return None
