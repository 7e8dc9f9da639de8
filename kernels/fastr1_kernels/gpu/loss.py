"""The GRPO loss of logits in one launch: value, metrics and the gradient of the logits, one program per token.

A program reads its row once (`score_row` of rows: maximum, log-sum, logp, entropy H), does the scalar work of
its token (policy: f and its derivative f' by logp, kl and kl', sampler weight w), and walks the row a second
time to write the gradient, in place if asked:
    loss of the token = W_b·(w·f + β·kl - c·H)    ∂/∂logp = W_b·(w·f' + β·kl')    ∂/∂H = -W_b·c
W_b, the weight of every token of sequence b, holds the denominators (per-sequence count, normalizer, maximal length);
it is (B,) and prepared by torch. A comes from the rewards, inside the launch: each program reduces its own group, and B
more programs write A for the caller. The terms, losses and metrics of every token, are one (8, N) buffer, whose rows
(`terms`) torch sums in a fixed order.

Objectives in which the tokens of a sequence depend on one another (sequence-level ratio or sampler weight, off-policy
mask, luspo, entropy quantile) do not fit in one launch: they take `score_rows`, torch on N numbers, and its backward.

With N live rows and e bytes a logit: fewest bytes 2·N·V·e (read the logits, write their gradient; a row still in the
cache when it is read again costs nothing more), fewest FLOPs about 14·N·V, two exp2 per logit among them. A masked row
is not read, its gradient is written as zeros; so is that of a row whose token has gradient 0 (A = 0, say), after one
reading. Never materialised: float32 logits, log-softmax, probabilities. The backward pass multiplies by the upstream
gradient in place and stops at once where that is 1. No atomics: bit-identical from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..checks import LossArguments
from ..dispatch import device_of
from ..reference import Metrics
from .advantages import BLOCK_REWARDS, reward_advantage
from .policy import kl_term, policy_arguments, policy_term, sampler_term
from .rows import (
    as_grid,
    row_base,
    row_launch_config,
    scale_rows_kernel,
    score_row,
    write_row_gradient,
    write_row_zeros,
)
from .terms import (
    METRIC_TERMS,
    NUM_TERMS,
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


@triton.jit(do_not_specialize=["N", "T", "R", "G"])  # floats never are
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
    advantages_ptr,  # (B,) or (N,) float32; (B,) out with SOURCE "rewards"
    rewards_ptr,  # (R,) float32 or None
    group_ids_ptr,  # (R,) or None
    sequence_index_ptr,  # (B,) or None
    N,
    T,
    V,
    R,
    G,
    stride_b,
    stride_t,
    stride_v,
    d_stride_b,
    d_stride_t,
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
    HAS_BONUS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_b = i_n - N
    if i_n < N:
        if mask_ptr is not None:  # `and` would load from None
            if tl.load(mask_ptr + i_n) == 0:
                if d_logits_ptr is not None:
                    d_ptr = row_base(d_logits_ptr, i_n, T, d_stride_b, d_stride_t)
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

    x_ptr = row_base(logits_ptr, i_n, T, stride_b, stride_t)
    token = tl.load(token_ids_ptr + i_n).to(tl.int64)
    row_top, log2_sum, logp, entropy = score_row(x_ptr, stride_v, token, V, 1.4426950408889634 / temperature, BLOCK)

    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + i_n)
    log_ratio = logp - old
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -limit), limit))
    slope = tl.where((log_ratio >= -limit) & (log_ratio <= limit), ratio, 0.0)
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
    # minimum and maximum drop NaN; a NaN among the logits of a live row has to show.
    sequence_weight = tl.load(weight_ptr + i_b)
    loss = sequence_weight * tl.where(logp == logp, loss - entropy_coef * entropy, logp)
    d_logp = sequence_weight * tl.where(logp == logp, d_logp, logp)

    store_term(terms_ptr, TERM_LOSS, i_n, N, loss)
    store_term(terms_ptr, TERM_RATIO, i_n, N, ratio)
    store_term(terms_ptr, TERM_CLIP_LOW, i_n, N, tl.where((ratio < low) & (advantage < 0), 1.0, 0.0))
    store_term(terms_ptr, TERM_CLIP_HIGH, i_n, N, tl.where((ratio > high) & (advantage > 0), 1.0, 0.0))
    store_term(terms_ptr, TERM_ENTROPY, i_n, N, entropy)
    store_term(terms_ptr, TERM_LOGP, i_n, N, logp)

    if d_logits_ptr is not None:
        d_ptr = row_base(d_logits_ptr, i_n, T, d_stride_b, d_stride_t)
        d_entropy = -sequence_weight * entropy_coef
        if (d_logp != 0.0) | (d_entropy != 0.0):
            write_row_gradient(
                x_ptr,
                stride_v,
                d_ptr,
                d_stride_v,
                token,
                d_logp,
                d_entropy,
                row_top,
                log2_sum,
                entropy,
                V,
                temperature,
                HAS_BONUS,
                BLOCK,
            )
        else:
            write_row_zeros(d_ptr, d_stride_v, V, BLOCK)


@dataclass(frozen=True)
class _Rows:
    """What the kernel reads beside the logits."""

    token_ids: Tensor  # (N,)
    mask: Tensor  # (N,) bool
    sequence: Tensor | None  # (N,) where packed
    weights: Tensor  # (B,) float32
    advantages: Tensor | None  # (B,) or (N,) float32; None: from the rewards
    arguments: LossArguments

    def launch(self, logits: Tensor, d_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Terms (8, N) and advantages, (B,) or as given; writes d_logits."""
        o, n = self.arguments, self.token_ids.numel()
        terms = torch.zeros(NUM_TERMS, n, device=logits.device)
        rewards = _flat(o.rewards) if self.advantages is None else None
        advantages = torch.empty_like(self.weights) if self.advantages is None else self.advantages
        programs = n if rewards is None else n + len(self.weights)
        gradient = logits if d_logits is None else d_logits
        if programs:
            with device_of(logits):
                grpo_rows_kernel[(programs,)](
                    logits_ptr=logits,
                    d_logits_ptr=d_logits,
                    terms_ptr=terms,
                    token_ids_ptr=self.token_ids,
                    mask_ptr=None if o.mask is None else self.mask.view(torch.uint8),
                    sequence_ptr=self.sequence,
                    old_ptr=_flat(o.old_logps),
                    ref_ptr=_flat(o.ref_logps),
                    sampler_ptr=_flat(o.sampler_logps),
                    weight_ptr=self.weights,
                    advantages_ptr=advantages,
                    rewards_ptr=rewards,
                    group_ids_ptr=None if o.group_ids is None else o.group_ids.contiguous(),
                    sequence_index_ptr=None if o.sequence_index is None else o.sequence_index.contiguous(),
                    N=n,
                    T=logits.shape[1],
                    V=logits.shape[2],
                    R=0 if rewards is None else len(rewards),
                    G=o.num_generations or 0,
                    stride_b=logits.stride(0),
                    stride_t=logits.stride(1),
                    stride_v=logits.stride(2),
                    d_stride_b=gradient.stride(0),
                    d_stride_t=gradient.stride(1),
                    d_stride_v=gradient.stride(2),
                    SOURCE=self.source(),
                    temperature=float(o.options.temperature),
                    eps=float(o.options.advantage_eps),
                    SCALE=o.options.scale_rewards,
                    LEAVE_ONE_OUT=o.options.leave_one_out,
                    HAS_BONUS=o.options.entropy_coef != 0,
                    BLOCK_R=BLOCK_REWARDS,
                    **policy_arguments(o.options),
                    **row_launch_config(logits.shape[2]),
                )
        return terms, advantages

    def source(self) -> str:
        """Where the kernel finds the advantage of a token."""
        if self.advantages is None:
            return "rewards"
        return "sequence" if len(self.advantages) == len(self.weights) else "token"


class _GRPOLoss(torch.autograd.Function):
    """Logits (B, T, V) to loss, sums of terms (8,), terms (8, N) and advantages. Only the loss has a gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: _Rows, has_gradient: bool, inplace: bool) -> tuple[Tensor, ...]:
        d_logits = None
        if has_gradient:
            d_logits = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        terms, advantages = rows.launch(logits, d_logits)
        if d_logits is not None:
            if inplace:  # whoever kept the logits for a backward pass of their own must be told
                torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(d_logits)
        sums = terms.sum(1)
        loss = sums[TERM_LOSS.value].clone()
        ctx.mark_non_differentiable(sums, terms, advantages)
        return loss, sums, terms, advantages

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("grpo_loss on a GPU is differentiable once: leave create_graph=True out")
        (d_logits,) = ctx.saved_tensors
        d_logits = d_logits.detach()
        if d_logits.numel():
            with device_of(d_logits):
                scale_rows_kernel[(d_logits.shape[0] * d_logits.shape[1],)](
                    d_logits_ptr=d_logits,
                    d_loss_ptr=d_loss.contiguous(),
                    T=d_logits.shape[1],
                    V=d_logits.shape[2],
                    stride_b=d_logits.stride(0),
                    stride_t=d_logits.stride(1),
                    stride_v=d_logits.stride(2),
                    **row_launch_config(d_logits.shape[2]),
                )
        # The buffer is scaled once: a second backward pass through retain_graph=True is refused by autograd.
        torch.autograd.graph.increment_version(d_logits)
        return d_logits, None, None, None


def one_launch_loss(
    logits: Tensor,  # (B, T, V) padded, (N, V) packed
    token_ids: Tensor,  # (B, T) padded, (N,) packed
    mask: Tensor,  # as token_ids, bool
    arguments: LossArguments,
    advantages: Tensor | None,  # (B,) or as token_ids; None: from arguments.rewards
    inplace: bool,
) -> tuple[Tensor, Metrics, Tensor, Tensor, Tensor]:
    """The fields of `GRPOOutput` for checked arguments in which every token's loss depends on its own row alone."""
    sequence, counts = _sequences(token_ids, mask, arguments.cu_seqlens)
    options = arguments.options
    denominator = reference.loss_denominator(counts.sum(), len(counts), options, arguments.normalizer)
    weights = (1 / denominator).expand(len(counts))
    if options.loss.reduction == "sequence_means":
        weights = weights / counts.clamp(min=1)
    rows = _Rows(
        token_ids.reshape(-1).contiguous(),
        mask.reshape(-1).contiguous(),
        sequence,
        weights.float().contiguous(),
        _flat(advantages),
        arguments,
    )
    has_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss, sums, terms, used_advantages = _GRPOLoss.apply(as_grid(logits), rows, has_gradient, inplace)
    names = ["ratio", "entropy", *options.loss.clip_metrics]
    names += ["kl"] if arguments.ref_logps is not None else []
    names += ["sampler_weight"] if arguments.sampler_logps is not None else []
    count = counts.sum()
    metrics = {name: (sums[METRIC_TERMS[name]], count) for name in names}
    shape = token_ids.shape
    given = used_advantages if advantages is None else used_advantages.view(advantages.shape)
    return loss, metrics, terms[TERM_LOGP.value].view(shape), terms[TERM_ENTROPY.value].view(shape), given


def _sequences(token_ids: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The sequence of every packed row (None where padded), and the number of loss tokens of every sequence."""
    if cu_seqlens is None:
        return None, mask.sum(1)
    bounds = cu_seqlens.long()
    rows = torch.arange(len(token_ids), device=token_ids.device)
    running = torch.cat([bounds.new_zeros(1), mask.long().cumsum(0)])[bounds]
    return torch.searchsorted(bounds, rows, right=True) - 1, running.diff()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().reshape(-1).float().contiguous()
