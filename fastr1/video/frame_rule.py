"""Which frames of a video are looked at: index arithmetic alone, no decoding.

Every rule includes the first and the last frame, and a short video repeats frames. Positions are truncated with
`numpy.linspace(..., dtype=int)`: exact integer arithmetic gives other frames for some lengths.
"""

from __future__ import annotations

import numpy as np

ONE_PER_SECOND = -1  # the value of `num_frames` that asks for one frame per second


def uniform_indices(num_available: int, num_frames: int) -> list[int]:
    """`num_frames` evenly spaced indices from 0 to `num_available - 1`, truncated to whole frames.

    Raises: ValueError if either count is below 1.
    """
    if num_available < 1:
        raise ValueError(f"num_available must be at least 1, got {num_available}: there is no frame to choose")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return [int(index) for index in np.linspace(0, num_available - 1, num_frames, dtype=int)]


def one_fps_indices(num_available: int, fps: float, max_frames: int | None = None) -> list[int]:
    """One index per whole second of the video, at least one, at most `max_frames`; evenly spaced over all of it.

    Raises: ValueError if a count is below 1 or `fps` is not a positive number.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps must be a positive number, got {fps}")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1 or None (no cap), got {max_frames}")
    num_frames = max(1, int(num_available / fps))
    return uniform_indices(num_available, num_frames if max_frames is None else min(num_frames, max_frames))


def select_indices(num_available: int, fps: float, num_frames: int, max_frames: int | None = None) -> list[int]:
    """`uniform_indices`, or `one_fps_indices` for `num_frames` = -1; `max_frames` bounds only the latter."""
    if num_frames == ONE_PER_SECOND:
        return one_fps_indices(num_available, fps, max_frames)
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, or -1 for one frame per second, got {num_frames}")
    return uniform_indices(num_available, num_frames)
