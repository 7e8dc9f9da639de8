"""RoPE with the cache write, norm and SwiGLU equal what transformers' modules compute, and write nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import TORCH, Backend
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from fastr1_kernels import add_rms_norm, rope_and_store, swiglu

NUMBERS = {"rtol": 2e-6, "atol": 2e-6}
NAN = float("nan")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(positions: int, d: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions).double(), 100.0 ** -(torch.arange(0, d, 2) / d)).repeat(1, 2)
    # The halves differ, so that the wrong half of the table shows.
    return angles.cos() * (1 + torch.arange(d) / d), angles.sin() * (2 - torch.arange(d) / d)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("is_one_buffer", [False, True])
@pytest.mark.parametrize("lengths", [[2] * 5, [-1] * 5, [0, 3, 4, -1, 1], [4, -1, 9, -7, 4]])
@pytest.mark.parametrize(("heads", "d"), [((4, 2), 16), ((7, 1), 24), ((2, 2), 10)])
def test_rotation_matches_transformers(
    backend: Backend, heads: tuple[int, int], d: int, lengths: list[int], is_one_buffer: bool, has_norm: bool
) -> None:
    H, Hkv = heads
    R, T, eps = 5, 4, 1e-2
    sizes = [H * d, Hkv * d, Hkv * d]
    buffer = backend.put(draw(R, sum(sizes)))
    slices = buffer.split(sizes, -1)
    q, k, v = (x.view(R, -1, d) if is_one_buffer else x.clone().view(R, -1, d) for x in slices)
    cos, sin = map(backend.put, table(40, d))
    positions = backend.put(torch.tensor([39, 0, 7, 7, 21]))
    weights = [backend.put(draw(d, seed=i)) if has_norm else None for i in (1, 2)]
    caches = [torch.full((R + 1, Hkv, T, d), NAN, dtype=backend.dtype, device=backend.device) for _ in range(2)]
    norms = dict(zip(("q_norm", "k_norm"), weights, strict=True))
    counts = backend.put(torch.tensor(lengths, dtype=torch.int32))
    before = buffer.clone()
    got = rope_and_store(q, k, v, cos, sin, positions, *caches, counts, eps=eps, **norms)
    expected = apply_rotary_pos_emb(
        *(normed(x, weight, eps) for x, weight in zip((q, k), weights, strict=True)), cos[positions], sin[positions]
    )
    torch.testing.assert_close(got, expected[0], **NUMBERS)
    for cache, rows in zip(caches, (expected[1], v), strict=True):
        whole = torch.full_like(cache, NAN)
        for r, length in enumerate(lengths):
            if 0 <= length < T:
                whole[r, :, length] = rows[r]
        torch.testing.assert_close(cache, whole, equal_nan=True, **NUMBERS)
    assert torch.equal(buffer, before)


def test_rows_are_written_where_their_sequence_is(backend: Backend) -> None:
    # Three tokens of sequence 1, two of sequence 0, a row of padding; more rows than sequences.
    H, Hkv, d, T, lengths, rows = 4, 2, 8, 6, [3, 4, 5, 0, 1, -1], [1, 1, 1, 0, 0, 0]
    q, k, v = (backend.put(draw(6, n, d, seed=i)) for i, n in enumerate((H, Hkv, Hkv)))
    cos, sin = map(backend.put, table(40, d))
    positions = backend.put(torch.tensor([13, 14, 15, 7, 8, 0]))
    caches = [torch.full((2, Hkv, T, d), NAN, dtype=backend.dtype, device=backend.device) for _ in range(2)]
    counts, suffix_rows = (backend.put(torch.tensor(x, dtype=torch.int32)) for x in (lengths, rows))
    got = rope_and_store(q, k, v, cos, sin, positions, *caches, counts, suffix_rows=suffix_rows)
    expected = apply_rotary_pos_emb(q, k, cos[positions], sin[positions])
    torch.testing.assert_close(got, expected[0], **NUMBERS)
    for cache, new in zip(caches, (expected[1], v), strict=True):
        whole = torch.full_like(cache, NAN)
        for r in range(5):
            whole[rows[r], :, lengths[r]] = new[r]
        torch.testing.assert_close(cache, whole, equal_nan=True, **NUMBERS)


def test_equal_lengths_of_several_sequences_in_another_order(backend: Backend) -> None:
    q, k, v = (backend.put(draw(3, n, 8, seed=i)) for i, n in enumerate((4, 2, 2)))
    tables, positions = map(backend.put, table(40, 8)), backend.put(torch.tensor([5, 6, 7]))
    caches = [torch.zeros(3, 2, 4, 8, dtype=backend.dtype, device=backend.device) for _ in range(2)]
    counts, suffix_rows = (backend.put(torch.tensor(x, dtype=torch.int32)) for x in ([2, 2, 2], [2, 0, 1]))
    rope_and_store(q, k, v, *tables, positions, *caches, counts, suffix_rows=suffix_rows)
    assert torch.equal(caches[1][[2, 0, 1], :, 2], v)
    assert torch.equal(caches[1][:, :, [0, 1, 3]], torch.zeros_like(caches[1][:, :, :3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_of_half_inputs_is_rounded_once(dtype: torch.dtype) -> None:
    R, H, Hkv, d, T = 6, 4, 2, 16, 3
    q, k, v = (draw(R, n, d, seed=n + i).to(dtype) for i, n in enumerate((H, Hkv, Hkv)))
    norms = [Qwen3RMSNorm(d).to(dtype) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight.data.copy_(draw(d, seed=9 + i))
    cos, sin = (x.to(dtype) for x in table(40, d))
    positions, lengths = torch.arange(R), torch.zeros(R, dtype=torch.int32)
    caches = [torch.zeros(R, Hkv, T, d, dtype=dtype) for _ in range(2)]
    with torch.no_grad():
        weights = {"q_norm": norms[0].weight, "k_norm": norms[1].weight}
        got = rope_and_store(q, k, v, cos, sin, positions, *caches, lengths, **weights)
        tables = cos[positions], sin[positions]
        exact = apply_rotary_pos_emb(norms[0](q).double(), norms[1](k).double(), *(x.double() for x in tables))
    for ours, truth in zip((got, caches[0][:, :, 0]), exact, strict=True):
        assert torch.equal(ours, truth.to(dtype))


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 24), (3, 130), (0, 8)])
def test_norm_matches_transformers(backend: Backend, rows: int, columns: int, has_residual: bool) -> None:
    x, weight = backend.put(draw(rows, 2 * columns))[:, :columns], backend.put(draw(columns, seed=1))
    residual = backend.put(draw(rows, columns, seed=2)) if has_residual else None
    before = x.clone()
    got, summed = add_rms_norm(x, residual, weight, 1e-2)
    expected = x if residual is None else x + residual
    assert torch.equal(summed, expected)
    torch.testing.assert_close(got, normed(expected, weight, 1e-2), **NUMBERS)
    assert torch.equal(x, before)


def test_norm_of_half_inputs_rounds_as_transformers_does() -> None:
    x, residual, weight = (draw(*shape, seed=i).bfloat16() for i, shape in enumerate([(4, 64), (4, 64), (64,)]))
    module = Qwen3RMSNorm(64, eps=1e-6).bfloat16()
    module.weight.data.copy_(weight)
    got, summed = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(summed, x + residual)
    assert torch.equal(got, module(summed).detach())


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 1030), (0, 8)])
def test_swiglu_matches_torch(backend: Backend, rows: int, columns: int) -> None:
    buffer = backend.put(10 * draw(rows, 2 * columns))
    before = buffer.clone()
    gate, up = buffer.chunk(2, -1)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up, **NUMBERS)
    assert torch.equal(buffer, before)


def test_swiglu_of_large_gates_is_finite(backend: Backend) -> None:
    gate = backend.put(torch.tensor([[-1e4, 1e4, -100.0, 100.0, 0.0]]))
    expected = backend.put(torch.tensor([[0.0, 1e4, 0.0, 100.0, 0.0]]))
    torch.testing.assert_close(swiglu(gate, torch.ones_like(gate)), expected, **NUMBERS)


def test_no_rows_are_no_error(backend: Backend) -> None:
    q, k = (torch.empty(0, n, 8, dtype=backend.dtype, device=backend.device) for n in (4, 2))
    caches = [torch.empty(1, 2, 3, 8, dtype=backend.dtype, device=backend.device) for _ in range(2)]
    tables, rows = map(backend.put, table(4, 8)), backend.put(torch.empty(0, dtype=torch.long))
    assert rope_and_store(q, k, k, *tables, rows, *caches, rows.int()).shape == (0, 4, 8)


def test_positions_outside_the_table_are_refused_in_torch() -> None:
    q, k = (TORCH.put(draw(1, n, 8)) for n in (4, 2))
    caches = [torch.zeros(1, 2, 3, 8, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(IndexError):
        rope_and_store(q, k, k, *table(4, 8), torch.tensor([4]), *caches, torch.zeros(1, dtype=torch.int32))
