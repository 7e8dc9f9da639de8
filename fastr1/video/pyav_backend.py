"""Decoding with PyAV, whose wheel brings FFmpeg along: what "auto" takes where frames are wanted on the CPU.

Gives the frames, and on a CPU the pixels, that torchcodec gives: the same frame numbering, colour conversion and
rotation. Frames are numbered in the order they are shown. Between the wanted frames only those are decoded that others
are predicted from, which saves a third of the time or more where the codec marks them.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from fastr1.schema import Clip
from fastr1.video.errors import VideoError

# frame index -> (time in seconds where known, (H, W, 3) uint8 pixels)
_Images = dict[int, tuple[float | None, np.ndarray]]

# Codecs that mark frames which no other frame is predicted from. HEVC's mark holds within a temporal layer only.
_MARKS_UNREFERENCED = ("h264", "mpeg4")


# Opening a file decodes some frames to learn what decoding tells anyway (20 ms at 720p); these options prevent that for
# the first eight streams. Only for formats whose header names all streams: PyAV frees one option per stream, and for a
# stream that FFmpeg finds later (FLV, MPEG-PS) there is none: the process dies. `Any`: PyAV's stub says strings.
_NO_PROBING: Any = [{"skip_frame": "all"}] * 8
_MP4, _MATROSKA = b"ftyp", b"\x1a\x45\xdf\xa3"  # from byte 4 and from byte 0 on

_STORES_BOTH_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


@dataclass(frozen=True)
class _Scan:
    """What reading the packets, without decoding them, tells about a video."""

    num_frames: int
    fps: float
    pts: list[int] | None  # time of every frame in stream units, ascending; None: the file has no usable times
    key_indices: list[int]  # frames at which decoding can begin, ascending


def describe() -> str:
    """Version, for logs and run metadata."""
    return f"pyav {av.__version__}"


def decode(
    path: Path,
    choose: Callable[[int, float], list[int]],  # (frames in the file, frames per second) -> frames wanted
    *,
    device: torch.device,
    num_ffmpeg_threads: int,
) -> Clip:
    """Decode the chosen frames on the CPU and move them to `device`."""
    try:
        with _opened(path, num_ffmpeg_threads) as (container, stream):
            scan = _scan(path, container, stream)
            indices = choose(scan.num_frames, scan.fps)
            wanted = sorted(set(indices))
            images = None if scan.pts is None else _decode_seeking(container, stream, scan, wanted)
        if images is None:
            images = _decode_from_start(path, scan, wanted, num_ffmpeg_threads)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"not a readable video ({error.strerror})") from error
    missing = [index for index in wanted if index not in images]
    if missing:
        raise VideoError(path, f"frames {missing} of {scan.num_frames} cannot be decoded: damaged or cut short")
    if len({array.shape for _, array in images.values()}) > 1:
        raise VideoError(path, "the picture size changes within the video")
    frames = torch.from_numpy(_by_colour([images[index][1] for index in indices]))
    times = (images[index][0] for index in indices)
    return Clip(
        frames=frames.to(device),
        indices=tuple(indices),
        timestamps_seconds=tuple(
            index / scan.fps if time is None else time for index, time in zip(indices, times, strict=True)
        ),
        source_fps=scan.fps,
        duration_seconds=scan.num_frames / scan.fps,
        backend="pyav",
    )


def _scan(path: Path, container: InputContainer, stream: VideoStream) -> _Scan:
    """Number the frames. The header's own count is not used: it is missing or wrong in many files."""
    # A packet marked "discard" lies outside the part that an edited file shows; an empty one ends the stream.
    packets = [
        (packet.pts, packet.duration or 0, packet.is_keyframe, packet.pts == packet.dts)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]
    header_rate, time_base = stream.average_rate, stream.time_base
    if not packets:
        raise VideoError(path, "the video stream holds no frame")
    in_file_order = [start for start, *_ in packets if start is not None]
    # Frames that may be stored out of order and yet carry ascending times may have made-up ones (AVI), unless the file
    # stores for each when it is to be decoded and, later, to be shown.
    has_both = container.format.name in _STORES_BOTH_TIMES and not all(at_once for *_, at_once in packets)
    is_ascending = in_file_order == sorted(in_file_order)
    are_made_up = bool(stream.codec_context.has_b_frames) and is_ascending and not has_both
    if time_base is None or len(set(in_file_order)) < len(packets) or are_made_up:
        return _Scan(_count_by_decoding(path), _known_rate(path, header_rate), pts=None, key_indices=[])
    pts = sorted(in_file_order)
    end = max(start + duration for start, duration, *_ in packets if start is not None)
    rate = len(pts) / ((end - pts[0]) * time_base) if end > pts[0] else header_rate
    keys = {start for start, _, is_keyframe, _ in packets if is_keyframe}
    key_indices = [index for index, value in enumerate(pts) if value in keys]
    return _Scan(len(pts), _known_rate(path, rate), pts, key_indices)


def _known_rate(path: Path, rate: Fraction | None) -> float:
    if not rate:
        raise VideoError(path, "the frame rate is unknown")
    return round(float(rate), 6)


def _count_by_decoding(path: Path) -> int:
    with _opened(path) as (container, stream):
        num_frames = sum(1 for _ in container.decode(stream))
    if num_frames == 0:
        raise VideoError(path, "no frame can be decoded")
    return num_frames


def _decode_seeking(container: InputContainer, stream: VideoStream, scan: _Scan, wanted: list[int]) -> _Images | None:
    """The wanted frames of a file that may have been read already, skipping to a key frame where that saves work; None
    where a seek does not land there."""
    assert scan.pts is not None
    images: _Images = {}
    reformatter = VideoReformatter()
    times = {scan.pts[index] for index in wanted}
    frames: Iterator[VideoFrame] = iter(())
    position = -2  # the last frame decoded; nothing can be read on from here before the first seek
    for index in wanted:
        before = bisect.bisect_right(scan.key_indices, index) - 1
        key = scan.key_indices[before] if before >= 0 else 0
        if key > position + 1:
            try:
                container.seek(scan.pts[key], stream=stream)
            except av.FFmpegError:  # a file that cannot be sought in is read from its start
                return None
            frames = _decode_sparsely(container, stream, times)
        frame = next((frame for frame in frames if frame.pts is None or frame.pts >= scan.pts[index]), None)
        if frame is None or frame.pts != scan.pts[index]:
            return None
        images[index] = (frame.time, _to_rgb(frame, reformatter))
        position = index
    return images


def _decode_sparsely(container: InputContainer, stream: VideoStream, times: set[int]) -> Iterator[VideoFrame]:
    """After a seek: the frames shown at these times, each as if all were decoded, and some of the others. None at all
    where the seek did not land on a key frame: there, some decoders give pictures of noise."""
    context = stream.codec_context
    can_skip = context.name in _MARKS_UNREFERENCED
    for number, packet in enumerate(container.demux(stream)):
        if number == 0 and not packet.is_keyframe:
            return
        if can_skip and packet.size:
            context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        yield from stream.decode(packet)


def _decode_from_start(path: Path, scan: _Scan, wanted: list[int], num_ffmpeg_threads: int) -> _Images:
    """The wanted frames by reading all of them; one that cannot be decoded is left out."""
    index_of = None if scan.pts is None else {pts: index for index, pts in enumerate(scan.pts)}
    images: _Images = {}
    reformatter = VideoReformatter()
    with _opened(path, num_ffmpeg_threads) as (container, stream):
        for position, frame in enumerate(container.decode(stream)):
            index = position if index_of is None or frame.pts is None else index_of.get(frame.pts)
            if index in wanted:
                images[index] = (frame.time, _to_rgb(frame, reformatter))
                if len(images) == len(wanted):
                    break
    return images


@contextlib.contextmanager
def _opened(path: Path, num_ffmpeg_threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    with open(path, "rb") as file:
        start = file.read(8)
    options = _NO_PROBING if start[4:] == _MP4 or start[:4] == _MATROSKA else None
    with av.open(str(path), stream_options=options) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise VideoError(path, "the file has no video stream")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_ffmpeg_threads
        yield container, stream


def _to_rgb(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:  # (H, W, 3) uint8
    # Bicubic chroma and the frame's own colour matrix and range, as torchcodec converts; PyAV's defaults differ.
    # A destination matrix other than the source's is what makes PyAV honour the source's; RGB has no matrix.
    rgb = reformatter.reformat(
        frame,
        format="rgb24",
        interpolation=Interpolation.BICUBIC,
        dst_colorspace=Colorspace.DEFAULT,
        src_color_range=frame.color_range,
    )
    return np.rot90(rgb.to_ndarray(), round(frame.rotation / 90))


def _by_colour(pictures: list[np.ndarray]) -> np.ndarray:  # each (H, W, 3) uint8, to (F, 3, H, W)
    """One colour after the other, as the resize wants them; the copy is needed anyway."""
    height, width, _ = pictures[0].shape
    frames = np.empty((len(pictures), 3, height, width), np.uint8)
    for target, picture in zip(frames, pictures, strict=True):
        for colour in range(3):  # twice as fast as one copy of all three
            target[colour] = picture[:, :, colour]
    return frames
