"""A kernel that shows what the sampler adds to the logits."""

from __future__ import annotations

import triton
import triton.language as tl

from fastr1_kernels.gpu.noise import LN_2, log2_exponential, noise_bits, row_words


@triton.jit
def noise_kernel(keys_ptr, positions_ptr, bits_ptr, noise_ptr, vocabulary, size: tl.constexpr):
    i_r, o_v = tl.program_id(0), tl.program_id(1) * size + tl.arange(0, size)
    k0, k1 = row_words(tl.load(keys_ptr + i_r), tl.load(positions_ptr + i_r))
    bits = noise_bits(o_v, k0, k1)
    tl.store(bits_ptr + i_r * vocabulary + o_v, bits.to(tl.int32, bitcast=True))
    tl.store(noise_ptr + i_r * vocabulary + o_v, log2_exponential(bits) * -LN_2)
