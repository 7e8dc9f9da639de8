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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import LossArguments
from ..dispatch import device_of
from ..options import OPTIONS_SCHEMA, LossOptions, option_values
from ..rows import ONCE, as_grid
from ..token_loss import LossOutput, metric_names
from .advantages import BLOCK_REWARDS, launch_group_advantages
from .loss_kernel import grpo_rows_kernel
from .policy import policy_arguments
from .rows import gradient_arguments, grid_arguments, row_launch_config, scale_rows_kernel
from .terms import METRIC_TERMS, NUM_TERMS, TERM_ENTROPY, TERM_LOGP, TERM_LOSS

# A program that would read more rewards than this for its advantage finds it computed by a launch before.
MAX_REWARDS_IN_LAUNCH = 2 * BLOCK_REWARDS
GRAD_SCALE = 12  # its place among the arguments of the operator


def _launch(
    d_logits: Tensor | None,  # (B, T, V) out, may be the logits
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (N,)
    mask: Tensor | None,  # (N,) uint8
    sequence: Tensor | None,  # (N,) where packed
    weights: Tensor,  # (B,) float32
    advantages: Tensor | None,  # (B,) or (N,) float32; None: from the rewards
    rewards: Tensor | None,  # (R,) float32
    group_ids: Tensor | None,  # (R,)
    sequence_index: Tensor | None,  # (B,)
    old_logps: Tensor | None,  # (N,) float32, as the two below
    ref_logps: Tensor | None,
    sampler_logps: Tensor | None,
    grad_scale: Tensor | None,  # 0-d float32
    num_generations: int,  # 0 with group_ids
    has_entropy: bool,
    **values: Any,  # the fields of LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the terms (8,), the terms (8, N) and the advantages (B,), empty where they were given."""
    options, n = LossOptions(**values), len(token_ids)
    terms = torch.zeros(NUM_TERMS, n, device=logits.device)
    computed = weights.new_empty(len(weights) if advantages is None else 0)
    gradient = logits if d_logits is None else d_logits
    source = "rewards" if advantages is None else "sequence" if len(advantages) == len(weights) else "token"
    if programs := n + len(computed):
        with device_of(logits):
            grpo_rows_kernel[(programs,)](
                logits_ptr=logits,
                d_logits_ptr=d_logits,
                terms_ptr=terms,
                token_ids_ptr=token_ids,
                mask_ptr=mask,
                sequence_ptr=sequence,
                old_ptr=old_logps,
                ref_ptr=ref_logps,
                sampler_ptr=sampler_logps,
                weight_ptr=weights,
                grad_scale_ptr=grad_scale,
                advantages_ptr=computed if advantages is None else advantages,
                rewards_ptr=rewards,
                group_ids_ptr=group_ids,
                sequence_index_ptr=sequence_index,
                N=n,
                **grid_arguments(logits),
                R=0 if rewards is None else len(rewards),
                G=num_generations,
                **gradient_arguments(gradient),
                SOURCE=source,
                temperature=float(options.temperature),
                eps=float(options.advantage_eps),
                SCALE=options.scale_rewards,
                LEAVE_ONE_OUT=options.leave_one_out,
                HAS_ENTROPY=has_entropy,
                HAS_BONUS=options.entropy_coef != 0,
                BLOCK_R=BLOCK_REWARDS,
                **policy_arguments(options),
                **row_launch_config(logits, gradient),
            )
    return terms.sum(1), terms, computed


def _loss_rows(logits: Tensor, *arguments: Any, has_gradient: bool, **values: Any) -> tuple[Tensor, ...]:
    """The operator: `_launch`, and the gradient of the logits, empty where none is wanted."""
    d_logits = _new_gradient(logits, has_gradient)
    return *_launch(d_logits if has_gradient else None, logits, *arguments, **values), d_logits


def _new_gradient(logits: Tensor, has_gradient: bool) -> Tensor:
    shape = logits.shape if has_gradient else (0, *logits.shape[1:])
    return torch.empty(shape, dtype=logits.dtype, device=logits.device)


loss_rows_op = torch.library.custom_op(
    "fastr1::grpo_rows",
    _loss_rows,
    mutates_args=(),
    schema="(Tensor logits, Tensor token_ids, Tensor? mask, Tensor? sequence, Tensor weights, Tensor? advantages, "
    "Tensor? rewards, Tensor? group_ids, Tensor? sequence_index, Tensor? old_logps, Tensor? ref_logps, "
    "Tensor? sampler_logps, Tensor? grad_scale, int num_generations, bool has_entropy, *, bool has_gradient, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@loss_rows_op.register_fake
def _(logits: Tensor, token_ids: Tensor, *arguments: Any, has_gradient: bool, **_: Any) -> tuple[Tensor, ...]:
    weights, advantages = arguments[2:4]
    terms = weights.new_empty(NUM_TERMS, token_ids.shape[0])
    computed = weights.new_empty(weights.shape[0] if advantages is None else 0)
    return weights.new_empty(NUM_TERMS), terms, computed, _new_gradient(logits, has_gradient)


def scale_rows(d_logits: Tensor, d_loss: Tensor, grad_scale: Tensor | None) -> None:
    """d_logits (B, T, V) *= d_loss / grad_scale, both 0-d; not touched where that is 1."""
    if d_logits.numel():
        with device_of(d_logits):
            scale_rows_kernel[(d_logits.shape[0] * d_logits.shape[1],)](
                d_logits_ptr=d_logits,
                d_loss_ptr=d_loss.contiguous(),
                grad_scale_ptr=grad_scale,
                **grid_arguments(d_logits),
                **row_launch_config(d_logits),
            )


scale_rows_op = torch.library.custom_op("fastr1::scale_rows_", scale_rows, mutates_args=("d_logits",))


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[-1], inputs[GRAD_SCALE])
    ctx.num_inputs = len(inputs)


def _scaled(ctx: Any, d_sums: Tensor, scale: Callable[..., None]) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs; that of the logits was written in the forward pass."""
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    d_logits, grad_scale = ctx.saved_tensors
    # The buffer is scaled once: a second backward pass through retain_graph=True is refused by autograd.
    d_logits = d_logits.detach()
    scale(d_logits, d_sums[TERM_LOSS.value], grad_scale)
    return d_logits, *(None,) * (ctx.num_inputs - 1)


def _backward(ctx: Any, d_sums: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _scaled(ctx, d_sums, scale_rows_op)


loss_rows_op.register_autograd(_backward, setup_context=_save)


class _LossRows(torch.autograd.Function):
    """The operator for eager code, whose gradient may take the place of the logits during its forward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, has_gradient: bool, inplace: bool, values: dict[str, Any], *arguments: Any
    ) -> tuple[Tensor, ...]:
        inplace = inplace and has_gradient
        d_logits = logits if inplace else _new_gradient(logits, has_gradient)
        outputs = _launch(d_logits if has_gradient else None, logits, *arguments, **values)
        if inplace:  # whoever kept the logits for a backward pass of their own must be told
            torch.autograd.graph.increment_version(logits)
        _save(ctx, (logits, *arguments), {}, (d_logits,))
        return outputs

    @staticmethod
    def backward(ctx: Any, d_sums: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_logits, *rest = _scaled(ctx, d_sums, scale_rows)
        torch.autograd.graph.increment_version(ctx.saved_tensors[0])
        return d_logits, None, None, None, *rest


def one_launch_loss(
    logits: Tensor,  # (B, T, V) padded, (N, V) packed
    token_ids: Tensor,  # (B, T) padded, (N,) packed
    mask: Tensor,  # as token_ids, bool
    arguments: LossArguments,
    advantages: Tensor | None,  # (B,) or as token_ids; None: from arguments.rewards
    inplace: bool,
    grad_scale: float | Tensor | None = None,
) -> LossOutput:
    """The fields of `GRPOOutput` for checked arguments in which every token's loss depends on its own row alone.

    `grad_scale` is the upstream gradient, as far as it is known: a backward pass that brings it has nothing left to do.
    """
    if isinstance(grad_scale, Tensor):
        grad_scale = grad_scale.detach().float()
    elif grad_scale is not None:
        grad_scale = torch.full((), grad_scale, device=logits.device)
    if advantages is None:
        advantages = _launched_advantages(arguments)
    sequence, counts = _sequences(token_ids, mask, arguments.cu_seqlens)
    options = arguments.options
    weights = reference.sequence_weights(counts, options, arguments.normalizer, torch.float32)
    rewards = _flat(arguments.rewards) if advantages is None else None
    tensors = (
        token_ids.reshape(-1).contiguous(),
        None if arguments.mask is None else mask.reshape(-1).contiguous().view(torch.uint8),
        sequence,
        weights.contiguous(),
        _flat(advantages),
        rewards,
        None if rewards is None or arguments.group_ids is None else arguments.group_ids.contiguous(),
        None if rewards is None or arguments.sequence_index is None else arguments.sequence_index.contiguous(),
        *(_flat(x) for x in (arguments.old_logps, arguments.ref_logps, arguments.sampler_logps)),
        grad_scale,
        arguments.num_generations or 0,
        arguments.has_entropy,
    )
    values = option_values(options)
    has_gradient = torch.is_grad_enabled() and logits.requires_grad
    grid = as_grid(logits)
    if torch.compiler.is_compiling():
        sums, terms, computed, _ = loss_rows_op(grid, *tensors, has_gradient=has_gradient, **values)
    else:
        sums, terms, computed = _LossRows.apply(grid, has_gradient, inplace, values, *tensors)
    loss, sums, terms = sums[TERM_LOSS.value], sums.detach(), terms.detach()
    count = counts.sum()
    metrics = {name: (sums[METRIC_TERMS[name]], count) for name in metric_names(arguments)}
    logps, entropy = (terms[i.value].view(token_ids.shape) for i in (TERM_LOGP, TERM_ENTROPY))
    used = computed.detach() if advantages is None else advantages.detach().float()
    return loss, metrics, logps, entropy if arguments.has_entropy else None, used


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
        rewards.detach(),
        arguments.num_generations,
        arguments.group_ids,
        options.scale_rewards,
        options.advantage_eps,
        options.leave_one_out,
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
