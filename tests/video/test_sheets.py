"""Contact sheets: what is where, how large, and the files that cannot be written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_toys import write_video

from fastr1.schema import DataError
from fastr1.video import VideoError, load_clip
from fastr1.video.sheets import CAPTION_PX, draw_sheet, encode_jpeg, small_frames, write_contact_sheet


def plain_frames(number: int, height: int, width: int) -> torch.Tensor:
    """Frame i is of one colour, (20·i, 255 - 20·i, 7)."""
    colours = torch.tensor([[20 * i, 255 - 20 * i, 7] for i in range(number)], dtype=torch.uint8)
    return colours[:, :, None, None].expand(number, 3, height, width)


@pytest.mark.parametrize(
    ("number", "columns"), [(1, 1), (3, 3), (4, 4), (8, 4), (16, 4), (17, 5), (25, 5), (26, 6), (256, 16)]
)
def test_lines_are_a_square_of_frames_but_no_narrower_than_four(number: int, columns: int) -> None:
    assert small_frames(torch.zeros(number, 3, 6, 8, dtype=torch.uint8), 8).columns == columns


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(480, 640, (128, 96)), (640, 480, (96, 128)), (1080, 1920, (128, 72)), (48, 64, (64, 48)), (2, 900, (128, 1))],
)
def test_frames_keep_their_aspect_ratio_and_are_not_enlarged(height: int, width: int, size: tuple[int, int]) -> None:
    small = small_frames(plain_frames(2, height, width), 128)
    assert small.size == size
    assert draw_sheet(small).size == (2 * size[0], size[1])
    kept = small.frames.shape[1:3]
    assert all(n >= min(full, 2 * px) for n, full, px in zip(kept, (height, width), size[::-1], strict=True))
    assert all(n <= max(4 * px, 4) for n, px in zip(kept, size[::-1], strict=True))  # a copy far smaller than the clip


def test_every_frame_is_at_its_place_and_the_rest_is_black() -> None:
    sheet = np.asarray(draw_sheet(small_frames(plain_frames(6, 60, 80), 40)))
    assert sheet.shape == (2 * 30, 4 * 40, 3)
    for i in range(6):
        cell = sheet[i // 4 * 30 : i // 4 * 30 + 30, i % 4 * 40 : i % 4 * 40 + 40]
        assert (cell == (20 * i, 255 - 20 * i, 7)).all()
    assert not sheet[30:, 80:].any()


def test_pictures_are_smaller_ones_of_the_frames() -> None:
    rows = torch.arange(200)[:, None].expand(200, 320)
    columns = torch.arange(320)[None].expand(200, 320) * 200 // 320
    frame = torch.stack([rows, columns, 200 - rows]).to(torch.uint8)
    got = np.asarray(draw_sheet(small_frames(frame[None], 80))).astype(int)
    expected = frame.permute(1, 2, 0).numpy().reshape(50, 4, 80, 4, 3).mean(axis=(1, 3))
    assert np.abs(got - expected).max() <= 3


def test_captions_are_drawn_under_their_frames() -> None:
    small = small_frames(plain_frames(5, 60, 80), 80)
    plain, captioned = draw_sheet(small), draw_sheet(small, ["0.00 s", "0.25 s", "", "9.99 s", "1.50 s"])
    assert captioned.height == plain.height + 2 * CAPTION_PX
    strips = np.asarray(captioned)[60 : 60 + CAPTION_PX]
    is_drawn = [bool(strips[:, 80 * i : 80 * (i + 1)].any()) for i in range(4)]
    assert is_drawn == [True, True, False, True]
    assert (strips[:, :80] != strips[:, 80:160]).any()
    assert (np.asarray(captioned)[:60] == np.asarray(plain)[:60]).all()


def test_jpeg_is_that_of_the_sheet_and_its_quality_shows() -> None:
    noise = torch.randint(256, (4, 3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sheet = draw_sheet(small_frames(noise, 80))
    good, small = (encode_jpeg(sheet, quality) for quality in (90, 30))
    assert len(small) < len(good)
    assert good.startswith(b"\xff\xd8")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".PNG"])
def test_the_sheet_of_a_video_shows_the_frames_of_load_clip(tmp_path: Path, suffix: str) -> None:
    write_video(tmp_path / "clip.mp4", 1)
    file = write_contact_sheet(tmp_path / "clip.mp4", tmp_path / "new" / f"sheet{suffix}", num_frames=5)
    frames = load_clip(tmp_path / "clip.mp4", num_frames=5).frames.permute(0, 2, 3, 1).numpy().astype(int)
    with Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape == (2 * (48 + CAPTION_PX), 4 * 64, 3)
    assert np.abs(pixels[:48, :64] - frames[0]).mean() < 4
    assert np.abs(pixels[:48, 64:128] - frames[1]).mean() < 4
    assert np.abs(pixels[48 + CAPTION_PX : -CAPTION_PX, :64] - frames[4]).mean() < 4
    assert pixels[48 : 48 + CAPTION_PX].max() > 200  # the times


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sheet.xyz", "pictures cannot be written as '.xyz'"),
        ("sheet", "pictures cannot be written as ''"),
        ("sheet.mp4", "pictures cannot be written as '.mp4'"),
        ("sheet.xbm", "cannot be written as XBM (cannot write mode RGB as XBM)"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_and_not_written(tmp_path: Path, name: str, reason: str) -> None:
    write_video(tmp_path / "clip.mp4", 1)
    with pytest.raises(DataError, match=re.escape(f"{name}: {reason}; use .png, .jpg or .webp")):
        write_contact_sheet(tmp_path / "clip.mp4", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_what_cannot_be_drawn_or_written_is_told(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", 1)
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        write_contact_sheet(tmp_path / "broken.mp4", tmp_path / "sheet.png")
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"num_frames must be at least 1, got {number}"):
            write_contact_sheet(tmp_path / "clip.mp4", tmp_path / "sheet.png", num_frames=number)
    with pytest.raises(DataError, match=r"cannot be written \(.+\); choose another place"):
        write_contact_sheet(tmp_path / "clip.mp4", tmp_path / "broken.mp4" / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
