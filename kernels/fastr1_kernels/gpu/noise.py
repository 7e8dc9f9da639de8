"""The noise of `fastr1_kernels.noise` as device functions: the same bits, the same numbers up to rounding.

Multiplications that are followed by a sum are written as `fma`: a compiler that may choose would choose differently in
two copies of the same line, and the noise of a column would depend on the block that it falls into.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_W = tl.constexpr(1 - 2.0**-24)
# w below which -log(1 - w) is summed: the logarithm of a number near 1 has lost w's digits.
SERIES = tl.constexpr(0.03125)


@triton.jit
def row_words(key, position):
    """k0 and k1, uint32, of an int64 key and position: splitmix64."""
    x = ((key + position + 1) * -7046029254386353131).to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def noise_bits(columns, k0, k1):
    """uint32 bits of int32 columns: lowbias32 of the column, then a round keyed with k0 and k1."""
    x = columns.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    x = (x ^ k0) * 0x7FEB352D + k1
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def log2_exponential(bits):
    """log2 E of the exponential number of uint32 bits; the noise is -ln 2 times it."""
    w = tl.minimum(tl.fma(bits.to(tl.float32), 2.0**-32, 2.0**-33), LARGEST_W)
    series = tl.fma(w, tl.fma(w, tl.fma(w, tl.fma(w, 0.2, 0.25), 1.0 / 3.0), 0.5), 1.0) * w
    e = tl.where(w < SERIES, series, tl.log2(1.0 - w) * -LN_2)
    return tl.log2(e)
