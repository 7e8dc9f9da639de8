"""The GRPO loss of logits in one launch: value, metrics and the gradient of the logits, one program per token.

A program of `loss_kernel` reads its row once (`row_passes.score_row`: maximum, log-sum, logp, entropy H), does the
scalar work of its token (policy: f and its derivative f' by logp, kl and kl', sampler weight w), and walks the row a
second time to write the gradient, in place if asked:
    loss of the token = W_b·(w·f + β·kl - c·H)    ∂/∂logp = W_b·(w·f' + β·kl')    ∂/∂H = -W_b·c
W_b, the weight of every token of sequence b, holds the denominators (per-sequence count, normalizer, maximal length);
it is (B,) and prepared by torch. A comes from the rewards, inside the launch: each program reduces its own group, and B
more programs write A for the caller; where those would be many rewards, a launch before computes A. The terms, losses
and metrics of every token, are one (8, N) buffer, whose rows (`terms`) torch sums in a fixed order.

Objectives in which the tokens of a sequence depend on one another (sequence-level ratio or sampler weight, off-policy
mask, luspo, entropy quantile) do not fit in one launch: they take `score_rows`, torch on N numbers, and its backward.

With N live rows and e bytes a logit: fewest bytes 2·N·V·e (read the logits, write their gradient; a row still in the
cache when it is read again costs nothing more), fewest FLOPs about 13·N·V, two exp2 per logit among them. A masked row
is not read, its gradient is written as zeros; so is that of a row whose token has gradient 0 (A = 0, say), after one
reading. Never materialised: float32 logits, log-softmax, probabilities. No atomics: bit-identical from run to run.

The backward pass multiplies by the upstream gradient in place and stops at once where that is 1, or the grad_scale that
the gradient was written with. float16 logits have to be given one: at 1/65,536 of its size their gradient would round
to zeros before the factor is known (`dispatch.knows_gradient`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import LossArguments
from ..dispatch import device_of
from ..reference import Metrics
from .advantages import BLOCK_REWARDS, launch_group_advantages
from .loss_kernel import grpo_rows_kernel
from .policy import policy_arguments
from .rows import as_grid, row_launch_config, row_width, scale_rows_kernel
from .terms import METRIC_TERMS, NUM_TERMS, TERM_ENTROPY, TERM_LOGP, TERM_LOSS

# A program that would read more rewards than this for its advantage finds it computed by a launch before.
MAX_REWARDS_IN_LAUNCH = 2 * BLOCK_REWARDS


@dataclass(frozen=True)
class _Rows:
    """What the kernel reads beside the logits."""

    token_ids: Tensor  # (N,)
    mask: Tensor  # (N,) bool
    sequence: Tensor | None  # (N,) where packed
    weights: Tensor  # (B,) float32
    advantages: Tensor | None  # (B,) or (N,) float32; None: from the rewards
    arguments: LossArguments
    grad_scale: Tensor | None  # 0-d float32
    compute_entropy: bool

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
                    grad_scale_ptr=self.grad_scale,
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
                    HAS_ENTROPY=self.compute_entropy,
                    HAS_BONUS=o.options.entropy_coef != 0,
                    BLOCK_R=BLOCK_REWARDS,
                    **policy_arguments(o.options),
                    **row_launch_config(logits.shape[2], row_width(logits, gradient)),
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
            ctx.save_for_backward(d_logits, rows.grad_scale)
        sums = terms.sum(1)
        loss = sums[TERM_LOSS.value].clone()
        ctx.mark_non_differentiable(sums, terms, advantages)
        return loss, sums, terms, advantages

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("grpo_loss on a GPU is differentiable once: leave create_graph=True out")
        d_logits, grad_scale = ctx.saved_tensors
        d_logits = d_logits.detach()
        if d_logits.numel():
            with device_of(d_logits):
                scale_rows_kernel[(d_logits.shape[0] * d_logits.shape[1],)](
                    d_logits_ptr=d_logits,
                    d_loss_ptr=d_loss.contiguous(),
                    grad_scale_ptr=grad_scale,
                    T=d_logits.shape[1],
                    V=d_logits.shape[2],
                    stride_b=d_logits.stride(0),
                    stride_t=d_logits.stride(1),
                    stride_v=d_logits.stride(2),
                    **row_launch_config(d_logits.shape[2], row_width(d_logits)),
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
    grad_scale: float | Tensor | None = None,
    compute_entropy: bool = True,
) -> tuple[Tensor, Metrics, Tensor, Tensor, Tensor]:
    """The fields of `GRPOOutput` for checked arguments in which every token's loss depends on its own row alone.

    `grad_scale` is the upstream gradient, as far as it is known: a backward pass that brings it has nothing left to do.
    Without `compute_entropy`, and without entropy bonus, the entropy is zeros and no metric.
    """
    if isinstance(grad_scale, Tensor):
        grad_scale = grad_scale.detach().float()
    elif grad_scale is not None:
        grad_scale = torch.full((), grad_scale, device=logits.device)
    if advantages is None:
        advantages = _launched_advantages(arguments)
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
        grad_scale,
        compute_entropy or options.entropy_coef != 0,
    )
    has_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss, sums, terms, used_advantages = _GRPOLoss.apply(as_grid(logits), rows, has_gradient, inplace)
    names = ["ratio", *options.loss.clip_metrics]
    names += ["entropy"] if rows.compute_entropy else []
    names += ["kl"] if arguments.ref_logps is not None else []
    names += ["sampler_weight"] if arguments.sampler_logps is not None else []
    count = counts.sum()
    metrics = {name: (sums[METRIC_TERMS[name]], count) for name in names}
    shape = token_ids.shape
    given = used_advantages if advantages is None else used_advantages.view(advantages.shape)
    return loss, metrics, terms[TERM_LOGP.value].view(shape), terms[TERM_ENTROPY.value].view(shape), given


def _launched_advantages(arguments: LossArguments) -> Tensor | None:
    """(B,) from many rewards, in a launch of their own; None: few enough for every token's program to read them.

    A program reads its group; all rewards with group_ids or scale_rewards="batch". By arithmetic, not by a clock: two
    blocks of rewards take some 2 % of the time of a row of 150,000 logits, a launch as long as a handful of rows.
    """
    assert arguments.rewards is not None
    options, rewards = arguments.options, arguments.rewards
    reads_all = arguments.num_generations is None or options.scale_rewards == "batch"
    if (len(rewards) if reads_all else arguments.num_generations or 0) <= MAX_REWARDS_IN_LAUNCH:
        return None
    advantages = launch_group_advantages(
        rewards,
        num_generations=arguments.num_generations,
        group_ids=arguments.group_ids,
        scale_rewards=options.scale_rewards,
        eps=options.advantage_eps,
        leave_one_out=options.leave_one_out,
    )
    index = arguments.sequence_index
    return advantages if index is None else advantages[index.long()]


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
