"""The terms of every token: the rows of the (8, N) float32 buffer that the loss kernel writes and torch sums.

A row that the objective has no use for, and a masked token, stay 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A kernel can read only globals that are constexpr; torch indexes with their value.
TERM_LOSS = tl.constexpr(0)
TERM_RATIO = tl.constexpr(1)
TERM_CLIP_LOW = tl.constexpr(2)
TERM_CLIP_HIGH = tl.constexpr(3)
TERM_SAMPLER_WEIGHT = tl.constexpr(4)
TERM_KL = tl.constexpr(5)
TERM_ENTROPY = tl.constexpr(6)
TERM_LOGP = tl.constexpr(7)
NUM_TERMS = 8
METRIC_TERMS = {  # by the name of the metric
    "ratio": TERM_RATIO.value,
    "entropy": TERM_ENTROPY.value,
    "clip_low": TERM_CLIP_LOW.value,
    "clip_high": TERM_CLIP_HIGH.value,
    "kl": TERM_KL.value,
    "sampler_weight": TERM_SAMPLER_WEIGHT.value,
}


@triton.jit
def store_term(terms_ptr, TERM: tl.constexpr, i_n, N, value):
    """Write row TERM of the terms at token i_n; the offset in 64 bits, as i_n is."""
    tl.store(terms_ptr + N.to(tl.int64) * TERM + i_n, value)
