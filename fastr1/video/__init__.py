"""Videos to pixels: which frames, decoding, resizing for the vision tower, loading ahead."""

from fastr1.video.decoders import describe_backend, load_clip, resolve_backend
from fastr1.video.errors import BackendError, VideoError
from fastr1.video.frame_rule import one_fps_indices, select_indices, uniform_indices
from fastr1.video.loader import ClipPrefetcher, load_pixels
from fastr1.video.pixels import preprocess_frames

__all__ = [
    "BackendError",
    "ClipPrefetcher",
    "VideoError",
    "describe_backend",
    "load_clip",
    "load_pixels",
    "one_fps_indices",
    "preprocess_frames",
    "resolve_backend",
    "select_indices",
    "uniform_indices",
]
