"""All three resizes, Pillow's own and the products of float64 and of bytes, give the bits of Pillow's single call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from fastr1.video import resize, resize_products
from fastr1.video.resize import resize_frames
from fastr1.video.resize_products import bytes_are_exact

needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 resizes tall pictures differently"
)
RESIZES = [
    resize._resize_by_pillow,
    resize._resize_by_doubles,
    pytest.param(
        resize._resize_by_bytes,
        marks=pytest.mark.skipif(not bytes_are_exact(), reason="this CPU's products of bytes are not exact (no VNNI)"),
    ),
]


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
        frames = torch.from_numpy(image).permute(2, 0, 1)[None]
        axes = resize._axes(frames.shape, new_height, new_width)
        found = resize_by(frames, axes) if axes else frames
        sizes = f"{kind}, {height}×{width} to {new_height}×{new_width}"
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), expected), sizes


@pytest.mark.parametrize("resize_by", RESIZES)
@pytest.mark.parametrize(("height", "width"), [(480, 854), (1920, 1080), (30, 40)])
def test_frames_of_a_video_give_the_same_bits_whoever_resizes(resize_by, height, width):
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(np.stack([picture(rng, "noise", height, width) for _ in range(3)])).permute(0, 3, 1, 2)
    before = frames.clone()
    expected = resize_frames(frames, 56, 48)
    assert torch.equal(resize_by(frames, resize._axes(frames.shape, 56, 48)), expected)
    assert torch.equal(resize_frames(frames.contiguous(), 56, 48), expected)  # one colour after the other in memory
    assert torch.equal(frames, before)


def test_no_frames_and_frames_of_the_right_size_are_left_alone():
    frames = torch.from_numpy(picture(np.random.default_rng(0), "noise", 20, 30)).permute(2, 0, 1)[None]
    assert torch.equal(resize_frames(frames, 20, 30), frames)
    assert resize_frames(frames[:0], 10, 12).shape == (0, 3, 10, 12)


SIZES = ((3840, 56), (1920, 384), (854, 384), (7, 384), (2, 1), (1, 384))


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_the_sums_of_float64_are_exact(in_size, out_size):
    _, weights = resize_products._tables_of_doubles(in_size, out_size)
    assert torch.equal(weights, weights.round())
    assert 255 * weights.abs().sum(1).max() < 2**53
    total = weights.sum(1).flatten()[:out_size]
    assert total.sub(2**resize_products.WEIGHT_BITS).abs().max() <= weights.shape[1]


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_the_bytes_make_up_the_weights_and_their_sums_fit(in_size, out_size):
    starts, parts, constants = resize_products._tables_of_bytes(in_size, out_size)
    high, middle, low = parts.long().split(resize_products.BLOCK_OF_BYTES, dim=1)
    dense = torch.zeros(len(parts) * resize_products.BLOCK_OF_BYTES, in_size, dtype=torch.long)
    for block, (start, weights) in enumerate(zip(starts, (high << 16) + (middle << 8) + low, strict=True)):
        rows = slice(block * resize_products.BLOCK_OF_BYTES, (block + 1) * resize_products.BLOCK_OF_BYTES)
        dense[rows, start : start + weights.shape[1]] = weights
    first, fixed_point = resize_products._filter_table(in_size, out_size)
    for output in range(out_size):
        taps = torch.from_numpy(fixed_point[:, output]).long()[: in_size - first[output]]
        expected = torch.zeros(in_size, dtype=torch.long)
        expected[first[output] : first[output] + len(taps)] = taps
        assert torch.equal(dense[output], expected)
    assert not dense[out_size:].any()
    assert (128 * dense.abs().sum(1) + constants.flatten().abs()).max() < 2**31


def saturating_product(weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """As CPUs without VNNI make it: one factor is made unsigned, sums of two products are cut at 16 bits."""
    unsigned = (weights.long() + 128).view(len(weights), -1, 2)
    pairs = torch.einsum("mkp,kpn->mkn", unsigned, inputs.long().view(-1, 2, inputs.shape[1]))
    return pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * inputs.long().sum(0)


def test_bytes_are_for_cpus_that_sum_them_up_exactly(monkeypatch):
    decide = bytes_are_exact.__wrapped__
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.double() @ b.double())
    assert decide()
    monkeypatch.setattr(torch, "_int_mm", saturating_product)
    assert not decide()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)  # exact, perhaps, but slow
    assert not decide()


@pytest.mark.parametrize("exact", [False, True])
def test_a_cpu_multiplies_bytes_where_they_are_exact_and_else_leaves_it_to_pillow(monkeypatch, exact):
    used = []
    for name in ("pillow", "bytes", "doubles"):
        monkeypatch.setattr(resize, f"_resize_by_{name}", lambda frames, axes, name=name: used.append(name) or frames)
    monkeypatch.setattr(resize, "bytes_are_exact", lambda: exact)
    resize_frames(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 1, 1)
    assert used == ["bytes" if exact else "pillow"]


def test_frames_together_and_one_by_one_are_the_same(monkeypatch):
    frames = torch.randint(0, 256, (7, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = resize_frames(frames, 13, 17)
    monkeypatch.setattr(resize, "CHUNK_LINES", 120)  # two frames
    assert torch.equal(resize_frames(frames, 13, 17), together)
    assert torch.equal(together, torch.cat([resize_frames(frame[None], 13, 17) for frame in frames]))


@pytest.mark.parametrize(("size", "new_size"), [((8, 8), (384, 384)), ((40, 300), (10, 300)), ((300, 4), (300, 2))])
def test_the_bytes_of_no_axis_are_more_lines_at_a_time_than_allowed(monkeypatch, size, new_size):
    found = []

    def resize_by_bytes(frames, axes):
        lengths, num_frames = {2: frames.shape[2], 3: frames.shape[3]}, len(frames)
        for dim, length in axes:
            found.append((num_frames, 3 * lengths[5 - dim]))
            lengths[dim] = length
        return frames

    monkeypatch.setattr(resize, "bytes_are_exact", lambda: True)
    monkeypatch.setattr(resize, "_resize_by_bytes", resize_by_bytes)
    resize_frames(torch.zeros(20, 3, *size, dtype=torch.uint8), *new_size)
    assert max(num_frames * num_lines for num_frames, num_lines in found) <= resize.CHUNK_LINES
    assert max(num_frames for num_frames, _ in found) > 1


def test_threads_do_not_change_a_frame():
    rng = np.random.default_rng(0)
    clips = [torch.from_numpy(picture(rng, "noise", 50 + i, 70)).permute(2, 0, 1)[None] for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda frames: resize_frames(frames, 33, 35), clips))
    assert all(torch.equal(a, resize_frames(frames, 33, 35)) for a, frames in zip(together, clips, strict=True))


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
