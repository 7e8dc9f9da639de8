"""Frames as the vision tower wants them, against Pillow and recorded values."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shared_data import shared_path

from fastr1.video import preprocess_frames, uniform_indices


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height, width):
    """Smooth shading, hard edges and a fully saturated corner, so that bicubic overshoot reaches both limits."""
    y, x = np.mgrid[0:height, 0:width]
    shading = np.stack([127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), 255 * (x + y) / (height + width)], -1)
    shading[: height // 3, : width // 3] = 255
    shading[height // 2 :, width // 2 :] = 0
    return shading.astype(np.uint8)


def pillow(image, size):
    resized = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized.copy()).permute(2, 0, 1)


def resize_only(image, size):
    frames = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = preprocess_frames(frames, height=size, width=size, mean=(0, 0, 0), std=(1, 1, 1))[0]
    return (pixels * 255).round().to(torch.uint8)


@pytest.mark.parametrize("make", [noise, picture])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (48, 64, 56),  # one axis up, the other down
        (480, 640, 56),  # strongly down
        (97, 61, 56),  # odd both ways; the height shrinks much more: it goes first
        (99, 67, 35),  # the height shrinks by twice as many lines: the width still goes first
        (21, 13, 56),  # strongly up
        (56, 75, 56),  # one axis unchanged
        (56, 56, 56),  # nothing to do
        (1, 7, 5),  # a single line
    ],
)
@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 resizes tall pictures differently"
)
def test_resize_is_pillows(make, height, width, size):
    image = make(height, width)
    assert torch.equal(resize_only(image, size), pillow(image, size))


def test_frames_are_scaled_and_normalised_per_channel():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    pixels = preprocess_frames(frames, height=4, width=4, mean=(0.5, 0.1, 0.2), std=(0.5, 0.1, 0.4))
    expected = torch.tensor([-1.0, 1.0, 2.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_quirk_leaves_out_the_scale_for_frames_of_zeros_and_ones_only():
    dark, ones, twos = torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.full((3, 8, 8), 2.0)
    frames = torch.stack([dark, ones, twos]).to(torch.uint8)
    with_quirk = preprocess_frames(frames, height=4, width=4)[:, 0, 0, 0]
    without = preprocess_frames(frames, height=4, width=4, skip_rescale_quirk=False)[:, 0, 0, 0]
    torch.testing.assert_close(with_quirk, torch.tensor([-1.0, 1.0, 4 / 255 - 1]))
    torch.testing.assert_close(without, torch.tensor([-1.0, 2 / 255 - 1, 4 / 255 - 1]))


def test_frames_do_not_influence_each_other_and_stay_unchanged():
    frames = torch.from_numpy(np.stack([noise(20, 30), picture(20, 30)])).permute(0, 3, 1, 2)
    before = frames.clone()
    together = preprocess_frames(frames, height=16, width=16)
    alone = torch.cat([preprocess_frames(frame[None], height=16, width=16) for frame in frames])
    assert torch.equal(together, alone)
    assert torch.equal(frames, before)


def test_dtype_is_rounded_from_float32():
    frames = torch.from_numpy(noise(20, 30)).permute(2, 0, 1)[None]
    half = preprocess_frames(frames, height=16, width=16, dtype=torch.bfloat16)
    assert torch.equal(half, preprocess_frames(frames, height=16, width=16).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("frames", "named"),
    [
        (torch.zeros(2, 3, 4, 4), "float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"\(3, 4, 4\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), r"\(2, 4, 4, 3\)"),
    ],
)
def test_other_frames_are_refused(frames, named):
    with pytest.raises(ValueError, match=named):
        preprocess_frames(frames, height=4, width=4)


def test_size_below_one_is_refused():
    with pytest.raises(ValueError, match="height and width must be at least 1, got 4 and 0"):
        preprocess_frames(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), height=4, width=0)


def test_pixels_match_the_recorded_frames():
    recorded = load_file(shared_path("fixtures/tinyllava/preprocess.safetensors"))
    names = [name for name in recorded if name.startswith("frame_")]
    assert len(names) > 3
    assert any(recorded[name].max() <= 1 for name in names), "no frame exercises the quirk"
    for name in names:
        expected = recorded[name.replace("frame", "pixels")]
        pixels = preprocess_frames(
            recorded[name].permute(2, 0, 1)[None], height=expected.shape[-2], width=expected.shape[-1]
        )
        difference = (pixels - expected.view_as(pixels)).abs().max()
        assert difference < 1e-6, f"{name}: {difference}"


def test_pixels_match_the_recorded_clip():
    recorded = load_file(shared_path("fixtures/tinyllava/group_expected.safetensors"))
    indices = uniform_indices(len(recorded["clip"]), len(recorded["pixel_values"]))
    assert indices == recorded["frame_indices"].tolist()
    pixels = preprocess_frames(recorded["clip"][indices].permute(0, 3, 1, 2), height=56, width=56)
    torch.testing.assert_close(pixels, recorded["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_cuda_gives_the_cpus_pixels():
    frames = torch.from_numpy(picture(97, 161)).permute(2, 0, 1)[None]
    on_gpu = preprocess_frames(frames.cuda(), height=56, width=56).cpu()
    torch.testing.assert_close(on_gpu, preprocess_frames(frames, height=56, width=56), atol=1e-6, rtol=0)
