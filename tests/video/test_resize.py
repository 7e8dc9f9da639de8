"""Both resizes, Pillow's own and the one for a GPU, give the bits of Pillow's single call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from fastr1.video import resize
from fastr1.video.resize import resize_frames

needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 resizes tall pictures differently"
)
RESIZES = [resize._resize_by_pillow, resize._resize_by_products]


def picture(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8; all but noise overshoot or reach the ends of the range."""
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "black and white noise":
        return rng.choice(np.array([0, 255], np.uint8), (height, width, 3))
    if kind == "checkerboard":
        return np.repeat(((np.indices((height, width)).sum(0) % 2) * 255)[..., None], 3, 2).astype(np.uint8)
    level = {"black": 0, "nearly black": 1, "nearly white": 254, "white": 255}[kind]
    return np.full((height, width, 3), level, np.uint8)


KINDS = ("noise", "black and white noise", "checkerboard", "black", "nearly black", "nearly white", "white")


@needs_pillow_13
@pytest.mark.parametrize("resize_by", RESIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_random_sizes_give_pillows_bits(resize_by, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(25):
        height, width = (int(rng.choice([1, 2, rng.integers(3, 40), rng.integers(40, 300)])) for _ in range(2))
        new_height, new_width = (int(rng.choice([1, 31, 32, 33, rng.integers(2, 200)])) for _ in range(2))
        image = picture(rng, kind, height, width)
        expected = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
        found = resize_by(torch.from_numpy(image).permute(2, 0, 1)[None], new_height, new_width)
        sizes = f"{kind}, {height}×{width} to {new_height}×{new_width}"
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), expected), sizes


@pytest.mark.parametrize(("height", "width"), [(480, 854), (1080, 1920), (30, 40)])
def test_frames_of_a_video_give_the_same_bits_both_ways(height, width):
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(picture(rng, "noise", height, width)).permute(2, 0, 1)[None]
    expected = resize._resize_by_pillow(frames, 56, 48)
    assert torch.equal(resize._resize_by_products(frames, 56, 48), expected)
    assert torch.equal(resize_frames(frames.contiguous(), 56, 48), expected)


@pytest.mark.parametrize("resize_by", RESIZES)
def test_no_frames_and_frames_of_the_right_size_are_left_alone(resize_by):
    frames = torch.from_numpy(picture(np.random.default_rng(0), "noise", 20, 30)).permute(2, 0, 1)[None]
    assert torch.equal(resize_by(frames, 20, 30), frames)
    assert resize_by(frames[:0], 10, 12).shape == (0, 3, 10, 12)


def test_the_sums_of_the_products_are_exact():
    for in_size, out_size in ((3840, 56), (1920, 384), (854, 384), (7, 384), (2, 1), (1, 384)):
        _, weights = resize._window_table(in_size, out_size)
        assert torch.equal(weights, weights.round())
        assert 255 * weights.abs().sum(1).max() < 2**53
        assert weights.sum(1).flatten()[:out_size].sub(2**resize.WEIGHT_BITS).abs().max() <= weights.shape[1]


def test_threads_do_not_change_a_frame():
    rng = np.random.default_rng(0)
    clips = [torch.from_numpy(picture(rng, "noise", 50 + i, 70)).permute(2, 0, 1)[None] for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda frames: resize_frames(frames, 33, 35), clips))
    assert all(torch.equal(a, resize_frames(frames, 33, 35)) for a, frames in zip(together, clips, strict=True))


def test_on_a_cpu_pillow_does_it(monkeypatch):
    monkeypatch.setattr(resize, "_resize_by_products", None)
    assert resize_frames(torch.zeros(5, 3, 2, 2, dtype=torch.uint8), 1, 1).shape == (5, 3, 1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("height", "width"), [(97, 161), (480, 854), (1080, 1920), (21, 13), (1, 7)])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_cuda_gives_the_cpus_bits(height, width, precision):
    frames = torch.from_numpy(picture(np.random.default_rng(0), "noise", height, width)).permute(2, 0, 1)[None]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = resize_frames(frames.expand(3, -1, -1, -1).cuda(), 56, 384)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.cpu(), resize_frames(frames, 56, 384).expand(3, -1, -1, -1))
