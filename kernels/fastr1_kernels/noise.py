"""Gumbel noise that is a function of (key, position, column) alone: the specification, in integer arithmetic of torch.

A row has 64 bits k = splitmix64(key + position), of which k0 are the low and k1 the high 32. A column c has
    h = lowbias32(c)    x = (h ^ k0)·C1 + k1    x ^= x >> 15    x *= C2    bits = x ^ (x >> 16),
two rounds of one mixer: the last shift of the first is also the first shift of the second. The round of the column is
shared by all rows. Then, in float32,
    w = min((bits + ½)·2⁻³², 1 - 2⁻²⁴)    E = -log1p(-w)    noise = -log E,
an exponential and a Gumbel number. Small w, the upper tail that decides a draw, have steps of 2⁻³²; the noise is
finite, from -2.9 to 22.9.

Integers wrap. torch has no unsigned ones to speak of, so a logical shift is a shift and a mask.
Sources: splitmix64, Steele, Lea and Flood, OOPSLA 2014; lowbias32 of Chris Wellons' hash-prospector (public domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # C1, C2 as int32
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
FINALISERS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LARGEST_W = 1 - 2.0**-24
BLOCK_ELEMENTS = 2**18  # of (R, V) worked on at a time on a CPU, so that every pass finds them in the cache


def gumbel_noise(
    keys: Tensor,  # (R,) int64
    positions: Tensor,  # (R,) int64
    vocab_size: int,
) -> Tensor:
    """Standard Gumbel noise (R, V), float32: what `sample_tokens` adds to the logits of row r at column c."""
    k0, k1 = row_words(keys, positions)
    columns = column_words(vocab_size, keys.device)
    noise = torch.empty(len(keys), vocab_size, device=keys.device)
    step = max(1, BLOCK_ELEMENTS // vocab_size) if keys.device.type == "cpu" else max(1, len(keys))
    for start in range(0, len(keys), step):
        rows = slice(start, start + step)
        noise[rows] = gumbel(noise_bits(columns, k0[rows, None], k1[rows, None]))
    return noise


def mix64(x: Tensor) -> Tensor:
    """The splitmix64 step and finaliser on int64."""
    x = (x + 1) * GOLDEN
    x = (x ^ _shift_right(x, 30, 64)) * FINALISERS[0]
    x = (x ^ _shift_right(x, 27, 64)) * FINALISERS[1]
    return x ^ _shift_right(x, 31, 64)


def row_words(keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """k0 and k1, (R,) int32."""
    words = mix64(keys + positions)
    return _low_word(words), _low_word(words >> 32)


def column_words(vocab_size: int, device: torch.device) -> Tensor:
    """lowbias32 of every column, (V,) int32."""
    x = torch.arange(vocab_size, dtype=torch.int32, device=device)
    x = (x ^ _shift_right(x, 16, 32)) * MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 15, 32)) * MULTIPLIERS[1]
    return x ^ _shift_right(x, 16, 32)


def noise_bits(columns: Tensor, k0: Tensor, k1: Tensor, scratch: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The 32 bits of each column, int32, shapes broadcast; with `scratch`, two int32 tensors, in the first of them."""
    x, shifted = (None, None) if scratch is None else scratch
    x = torch.bitwise_xor(columns, k0, out=x)
    x = torch.add(k1, x, alpha=MULTIPLIERS[0], out=x)
    shifted = torch.bitwise_right_shift(x, 15, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(MULTIPLIERS[1])
    torch.bitwise_right_shift(x, 16, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(0xFFFF))


def gumbel(bits: Tensor) -> Tensor:
    """Noise of int32 bits, float32."""
    w = unsigned_float(bits).add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_W)
    return w.neg_().log1p_().neg_().log_().neg_()


def unsigned_float(bits: Tensor) -> Tensor:
    """int32 read as unsigned, rounded to float32."""
    return bits.view(torch.uint32).float()


def _low_word(x: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32: the same bits, whatever the machine's order of bytes."""
    low = x & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def _shift_right(x: Tensor, shift: int, bits: int) -> Tensor:
    """Logical shift: signed shifts in torch copy the sign bit."""
    return (x >> shift) & ((1 << (bits - shift)) - 1)
