"""Noise of the sampler: Gumbel numbers, independent over columns, positions and keys, the same in the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import Tensor

from fastr1_kernels import gumbel_noise, noise

COLUMNS = 2**15
SIGMAS = 5.5  # of some 2,000 statistics


def bits_grid(draw: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """(keys 4, positions 4, columns) int64 of keys and positions that count up."""
    keys, positions = torch.arange(0, 400, 100).repeat_interleave(4), torch.arange(4).repeat(4)
    k0, k1 = noise.row_words(keys, positions)
    bits = draw(torch.arange(COLUMNS, dtype=torch.int32), k0[:, None], k1[:, None])
    return (bits.long() & 0xFFFFFFFF).view(4, 4, COLUMNS)


def mean_signs(words: Tensor) -> Tensor:
    """For each bit of the words (..., columns) the mean over the columns of 1 where it is clear and -1 where it is set:
    (..., 32)."""
    octets = words.numpy().astype("<u4").view(np.uint8).reshape(*words.shape, 4)
    ones = torch.from_numpy(np.unpackbits(octets, axis=-1, bitorder="little"))
    return 1 - 2 * ones.sum(-2, dtype=torch.int32) / COLUMNS


def defects(bits: Tensor) -> list[str]:
    """Names of the statistics that are more than `SIGMAS` from what independent uniform bits give."""
    found = []

    def note(name: str, sigmas: Tensor) -> None:
        if sigmas.abs().max() > SIGMAS:
            found.append(name)

    for shift in (0, 8, 16, 24):  # each byte of a row is uniform
        counts = torch.stack([torch.bincount((row >> shift) & 255, minlength=256) for row in bits.flatten(0, 1)])
        expected = COLUMNS / 256
        note(f"byte {shift}", (((counts - expected) ** 2 / expected).sum(1) - 255) / math.sqrt(2 * 255))
    note("bits", mean_signs(bits) * math.sqrt(COLUMNS))
    uniform = bits.double() * 2.0**-32 - 0.5
    pairs = {f"column + {lag}": (bits, bits.roll(lag, 2), lag) for lag in (1, 2, 3, 4, 64, 1024)}
    pairs |= {"position": (bits[:, 1:], bits[:, :-1], 0), "key": (bits[1:], bits[:-1], 0)}
    for name, (left, right, _) in pairs.items():
        a, b = left.double() * 2.0**-32 - 0.5, right.double() * 2.0**-32 - 0.5
        note(f"{name}: value", 12 * (a * b).mean(2) * math.sqrt(COLUMNS))
        # The upper tail decides a draw: how often both are in the lowest 64th.
        both = ((a < -0.5 + 1 / 64) & (b < -0.5 + 1 / 64)).double().sum(2)
        note(f"{name}: tail", (both - COLUMNS / 4096) / math.sqrt(COLUMNS / 4096))
        note(f"{name}: bits", mean_signs(left ^ right) * math.sqrt(COLUMNS))
    assert uniform.shape == bits.shape
    return found


def real(columns: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    return noise.noise_bits(noise.column_words(len(columns), columns.device), k0, k1)


def test_noise_bits_are_independent() -> None:
    assert defects(bits_grid(real)) == []


WEAK: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "the column is not mixed first": lambda c, k0, k1: (c ^ k0) * noise.MULTIPLIERS[0] + k1,
    "one product of the sum": lambda c, k0, k1: (c + k0 + k1) * noise.MULTIPLIERS[0],
    "no key": lambda c, k0, k1: real(c, k0 * 0, k1 * 0),
    "a key that only shifts the columns": lambda c, k0, k1: noise.column_words(COLUMNS + 64, c.device)[
        c[None].long() + (k0 & 63).long()
    ],
    "a key that only flips bits": lambda c, k0, k1: noise.column_words(COLUMNS, c.device) ^ k0,
    "no last product": lambda c, k0, k1: (c ^ k0) * noise.MULTIPLIERS[0] ^ (((c ^ k0) * noise.MULTIPLIERS[0]) >> 15),
}


@pytest.mark.parametrize("draw", WEAK.values(), ids=WEAK.keys())
def test_weak_mixers_are_found_out(draw: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert defects(bits_grid(draw))


def test_gumbel_noise_is_standard_and_finite() -> None:
    keys = torch.arange(200)
    drawn = gumbel_noise(keys, keys * 7, 5_000).double()
    n = drawn.numel()
    assert drawn.mean().item() == pytest.approx(0.57721566, abs=5 * 1.2825 / math.sqrt(n))
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    for x in (2.0, 6.0, 10.0):  # P(noise > x) = 1 - exp(-exp(-x))
        expected = -math.expm1(-math.exp(-x)) * n
        assert (drawn > x).sum().item() == pytest.approx(expected, abs=5 * math.sqrt(expected))
    extremes = noise.gumbel(torch.tensor([0, 1, 2**31 - 1, -(2**31), -1], dtype=torch.int32))
    assert extremes[0].item() == pytest.approx(33 * math.log(2))
    assert extremes[1].item() == pytest.approx(33 * math.log(2) - math.log(3))
    assert extremes[2].item() == extremes[3].item() == pytest.approx(-math.log(math.log(2)))
    assert extremes[4].item() == pytest.approx(-math.log(24 * math.log(2)))


def test_noise_of_a_row_and_column_depends_on_nothing_else() -> None:
    keys, positions = torch.arange(50) * 2**40 - 7, torch.arange(50)
    whole = gumbel_noise(keys, positions, 6_001)
    assert torch.equal(gumbel_noise(keys[9:11], positions[9:11], 65), whole[9:11, :65])
    assert torch.equal(gumbel_noise(keys.flip(0), positions.flip(0), 6_001), whole.flip(0))
    assert torch.equal(gumbel_noise(keys + 5, positions - 5, 100), whole[:, :100])


def test_hash_has_these_bits() -> None:
    """Written out with Python's integers; another machine, torch or release must not draw another completion."""

    def mix64(x: int) -> int:
        x = (x + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def bits(key: int, position: int, column: int) -> int:
        k = mix64((key + position) % 2**64)
        x = (column ^ (column >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        x = ((x ^ (x >> 16) ^ (k % 2**32)) * 0x7FEB352D + (k >> 32)) % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
    positions = [0, 5, 1, 3, 0, 1023]
    columns = [0, 1, 2, 255, 65_535, 65_536, 151_935]
    k0, k1 = noise.row_words(torch.tensor(keys), torch.tensor(positions))
    got = noise.noise_bits(noise.column_words(151_936, k0.device), k0[:, None], k1[:, None])[:, columns]
    expected = [[bits(k, p, c) for c in columns] for k, p in zip(keys, positions, strict=True)]
    assert (got.long() & 0xFFFFFFFF).tolist() == expected


def test_kernel_makes_the_same_bits_and_noise(kernels: Backend) -> None:
    from sampling_probe import noise_kernel

    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63), 987654321987654321], device=kernels.device)
    positions = torch.tensor([0, 0, 5, 1023, 77], device=kernels.device)
    n = 2**17
    bits = torch.empty(5, n, dtype=torch.int32, device=kernels.device)
    drawn = torch.empty(5, n, device=kernels.device)
    noise_kernel[(5, n // 4096)](keys, positions, bits, drawn, n, size=4096)
    k0, k1 = noise.row_words(keys, positions)
    expected = noise.noise_bits(noise.column_words(n, keys.device), k0[:, None], k1[:, None])
    assert torch.equal(bits, expected)
    torch.testing.assert_close(drawn, gumbel_noise(keys, positions, n), rtol=1e-6, atol=1e-6)
