"""The GRPO loss of logits in one launch: the kernel, one program per token (see `loss`).

Minimum and maximum of a GPU drop NaN, so every clamp that may meet one says that it stays: a NaN in a live row, be it
in the logits or in the log-probabilities of another policy, has to reach the loss.
"""

from __future__ import annotations

import triton.language as tl

from .advantages import reward_advantage
from .policy import clamp, kl_term, policy_term, sampler_term
from .row_passes import row_base, score_row, write_row_gradient, write_row_zeros
from .rows import row_kernel
from .terms import (
    TERM_CLIP_HIGH,
    TERM_CLIP_LOW,
    TERM_ENTROPY,
    TERM_KL,
    TERM_LOGP,
    TERM_LOSS,
    TERM_RATIO,
    TERM_SAMPLER_WEIGHT,
    store_term,
)


@row_kernel
def grpo_rows_kernel(
    logits_ptr,  # (B, T, V)
    d_logits_ptr,  # (B, T, V) out, may be logits_ptr; None: no gradient
    terms_ptr,  # (8, N) float32 out, zeros where masked
    token_ids_ptr,  # (N,), as the five below
    mask_ptr,  # uint8 or None
    sequence_ptr,  # the sequence of each packed row, or None: row // T
    old_ptr,  # float32 or None, as the two below
    ref_ptr,
    sampler_ptr,
    weight_ptr,  # (B,) float32
    grad_scale_ptr,  # 0-d float32: the gradient is multiplied by it; or None
    advantages_ptr,  # (B,) or (N,) float32; (B,) out with SOURCE "rewards"
    rewards_ptr,  # (R,) float32 or None
    group_ids_ptr,  # (R,) or None
    sequence_index_ptr,  # (B,) or None
    N,
    T,
    V,
    R,
    G,
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,
    d_stride_b: tl.int64,
    d_stride_t: tl.int64,
    d_stride_v,
    temperature,
    beta,
    low,
    high,
    delta,
    limit,
    sampler_floor,
    sampler_cap,
    tau_pos,
    tau_neg,
    entropy_coef,
    eps,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    SOURCE: tl.constexpr,  # of the advantages: "rewards" | "sequence" | "token"
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_BONUS: tl.constexpr,  # of the entropy
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_b = i_n - N
    if i_n < N:
        if mask_ptr is not None:  # `and` would load from None
            if tl.load(mask_ptr + i_n) == 0:
                if d_logits_ptr is not None:
                    d_ptr = row_base(d_logits_ptr, i_n, T, d_stride_b, d_stride_t, WIDTH)
                    write_row_zeros(d_ptr, d_stride_v, V, BLOCK)
                return
        if sequence_ptr is None:
            i_b = i_n // T
        else:
            i_b = tl.load(sequence_ptr + i_n).to(tl.int64)

    if SOURCE == "rewards":
        i_r = i_b
        if sequence_index_ptr is not None:
            i_r = tl.load(sequence_index_ptr + i_b).to(tl.int64)
        advantage = reward_advantage(rewards_ptr, group_ids_ptr, i_r, R, G, eps, SCALE, LEAVE_ONE_OUT, BLOCK_R)
        if i_n >= N:  # one of the B programs that only write an advantage
            tl.store(advantages_ptr + i_b, advantage)
            return
    elif SOURCE == "sequence":
        advantage = tl.load(advantages_ptr + i_b)
    else:
        advantage = tl.load(advantages_ptr + i_n)

    x_ptr = row_base(logits_ptr, i_n, T, stride_b, stride_t, WIDTH)
    token = tl.load(token_ids_ptr + i_n).to(tl.int64)
    row_top, log2_sum, logp, entropy, x_token = score_row(
        x_ptr, stride_v, token, V, temperature, HAS_ENTROPY, WIDTH, BLOCK
    )

    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + i_n)
    log_ratio = logp - old
    ratio = tl.exp(clamp(log_ratio, -limit, limit))
    slope = tl.where((log_ratio < -limit) | (log_ratio > limit), 0.0, ratio)
    if old_ptr is None:  # exactly 1, also where logp is -inf
        ratio, slope = 1.0, 1.0
    loss, d_logp = policy_term(ratio, slope, advantage, logp, low, high, delta, tau_pos, tau_neg, OBJECTIVE)
    if sampler_ptr is not None:
        weight = sampler_term(old - tl.load(sampler_ptr + i_n), limit, sampler_floor, sampler_cap, CORRECTION)
        loss, d_logp = loss * weight, d_logp * weight
        store_term(terms_ptr, TERM_SAMPLER_WEIGHT, i_n, N, weight)
    if ref_ptr is not None:
        kl, d_kl = kl_term(tl.load(ref_ptr + i_n) - logp, limit, KL)
        # beta = 0 must not turn an infinite kl into NaN
        loss, d_logp = loss + tl.where(beta == 0.0, 0.0, beta * kl), d_logp + tl.where(beta == 0.0, 0.0, beta * d_kl)
        store_term(terms_ptr, TERM_KL, i_n, N, kl)
    sequence_weight = tl.load(weight_ptr + i_b)
    bonus = 0.0
    if HAS_BONUS:
        bonus = entropy_coef * entropy
    # A NaN among the logits of a live row has to show, whatever the objective reads.
    loss = sequence_weight * tl.where(logp == logp, loss - bonus, logp)
    if grad_scale_ptr is not None:
        sequence_weight *= tl.load(grad_scale_ptr)
    d_logp = sequence_weight * tl.where(logp == logp, d_logp, logp)

    store_term(terms_ptr, TERM_LOSS, i_n, N, loss)
    store_term(terms_ptr, TERM_RATIO, i_n, N, ratio)
    store_term(terms_ptr, TERM_CLIP_LOW, i_n, N, tl.where((ratio < low) & (advantage < 0), 1.0, 0.0))
    store_term(terms_ptr, TERM_CLIP_HIGH, i_n, N, tl.where((ratio > high) & (advantage > 0), 1.0, 0.0))
    if HAS_ENTROPY:
        store_term(terms_ptr, TERM_ENTROPY, i_n, N, entropy)
    store_term(terms_ptr, TERM_LOGP, i_n, N, logp)

    if d_logits_ptr is not None:
        d_ptr = row_base(d_logits_ptr, i_n, T, d_stride_b, d_stride_t, WIDTH)
        d_entropy = -sequence_weight * entropy_coef
        if (d_logp != 0.0) | (d_entropy != 0.0):
            write_row_gradient(
                x_ptr,
                stride_v,
                d_ptr,
                d_stride_v,
                token,
                x_token,
                d_logp,
                d_entropy,
                row_top,
                log2_sum,
                entropy,
                V,
                temperature,
                HAS_BONUS,
                WIDTH,
                BLOCK,
            )
        else:
            write_row_zeros(d_ptr, d_stride_v, V, BLOCK)
