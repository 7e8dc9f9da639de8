"""Contact sheets: the frames of a clip as one picture, line by line."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fastr1.config import DataConfig
from fastr1.schema import DataError
from fastr1.video.decoders import load_clip

MIN_COLUMNS = 4
FILE_FRAME_PX = 240  # longer side of a frame in a sheet that `write_contact_sheet` makes
CAPTION_PX = 18


@dataclass(frozen=True)
class SmallFrames:
    """Frames with at least as many pixels as a sheet shows of them, on the CPU: other threads draw them, which know
    nothing of the stream that they were decoded in."""

    frames: torch.Tensor  # (F, h, w, 3) uint8
    size: tuple[int, int]  # width and height of each in the sheet

    @property
    def columns(self) -> int:
        """Frames in a line of the sheet: a square of frames, but no narrower than four."""
        return min(len(self.frames), max(MIN_COLUMNS, math.ceil(math.sqrt(len(self.frames)))))


def small_frames(
    frames: torch.Tensor,  # (F, 3, H, W) uint8
    longest_px: int,
) -> SmallFrames:
    """Every n-th pixel, twice as many as a sheet needs, where its frames are `longest_px` on their longer side; smaller
    ones keep their size. The aspect ratio is kept."""
    height, width = frames.shape[2:]
    scale = min(1.0, longest_px / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    across, down = max(1, width // (2 * size[0])), max(1, height // (2 * size[1]))
    return SmallFrames(frames.permute(0, 2, 3, 1)[:, ::down, ::across].contiguous().cpu(), size)


def draw_sheet(small: SmallFrames, captions: Sequence[str] | None = None) -> Image.Image:
    """The frames line by line without gaps, on black, with a caption under each if given."""
    width, height = small.size
    line = height + (CAPTION_PX if captions is not None else 0)
    num_lines = math.ceil(len(small.frames) / small.columns)
    sheet = Image.new("RGB", (small.columns * width, num_lines * line))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default() if captions is not None else None
    for number, picture in enumerate(small.frames.numpy()):
        left, top = number % small.columns * width, number // small.columns * line
        sheet.paste(Image.fromarray(picture).resize(small.size, Image.Resampling.BILINEAR), (left, top))
        if captions is not None:
            place = (left + width // 2, top + height + CAPTION_PX // 2)
            draw.text(place, captions[number], fill="white", font=font, anchor="mm")
    return sheet


def encode_jpeg(sheet: Image.Image, quality: int) -> bytes:
    """The file of a sheet."""
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_contact_sheet(video: str | Path, out: str | Path, num_frames: int = DataConfig.num_frames) -> Path:
    """The frames of a video that a model would see, with the time of each under it, as a picture file.

    Raises: VideoError for a video that cannot be decoded, DataError for a file that cannot be written, ValueError for a
        number of frames below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    target = Path(out)
    kind = Image.registered_extensions().get(target.suffix.lower())
    if kind not in Image.SAVE:
        raise DataError(f"{target}: pictures cannot be written as {target.suffix!r}; use .png, .jpg or .webp")
    clip = load_clip(video, num_frames=num_frames)
    captions = [f"{seconds:.2f} s" for seconds in clip.timestamps_seconds]
    sheet, buffer = draw_sheet(small_frames(clip.frames, FILE_FRAME_PX), captions), io.BytesIO()
    try:
        sheet.save(buffer, kind)
    except (OSError, ValueError, KeyError) as error:  # formats without colours, or of small pictures
        raise DataError(f"{target}: cannot be written as {kind} ({error}); use .png, .jpg or .webp") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(buffer.getvalue())
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror}); choose another place") from error
    return target
