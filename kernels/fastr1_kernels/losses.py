"""The GRPO family of losses, from logits or straight from hidden states.

Only the rows of loss tokens are used: what stands in a masked row, NaN included, reaches neither loss nor gradients.
On a GPU `grpo_loss` is one Triton launch where every token's loss depends on its own row alone (`gpu.loss`), else
two row launches with torch between them. `linear_grpo_loss`, and `grpo_loss` elsewhere, compute log-probabilities with
`logps` and reduce them with `reference.policy_loss_from_logps`. `dispatch` is the rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import reference
from .advantages import group_advantages
from .checks import (
    LossArguments,
    check_groups,
    check_inplace,
    check_layout,
    check_linear,
    check_loss_arguments,
    check_mask,
    check_rows,
    check_token_ids,
)
from .dispatch import rewards_use_triton, uses_triton
from .logps import chunked_linear_logps

_F = TypeVar("_F", bound=Callable[..., "GRPOOutput"])


class GRPOOutput(NamedTuple):
    """What a loss returns. Only `loss` carries a gradient; nothing here waits for a GPU."""

    loss: Tensor  # 0-d float32 (float64 for float64 inputs)
    metrics: dict[str, tuple[Tensor, Tensor]]  # name → (sum, count) over loss tokens, 0-d: add up, then divide
    logps: Tensor  # shape of token_ids, 0 where masked
    entropy: Tensor  # shape of token_ids, 0 where masked
    advantages: Tensor  # (B,), or the shape of the given advantages


def _with_loss_arguments(function: _F) -> _F:
    """Show the fields of `LossArguments` in help() and in editors in the place of **loss_arguments."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(LossArguments).parameters.values()]
    function.__signature__ = inspect.Signature(own + shared, return_annotation=GRPOOutput)  # type: ignore[attr-defined]
    return function


@_with_loss_arguments
def grpo_loss(
    logits: Tensor,  # (B, T, V) padded, (N, V) packed; row t predicts token t
    token_ids: Tensor,  # (B, T) padded, (N,) packed with cu_seqlens
    *,
    inplace: bool = False,
    **loss_arguments: Any,
) -> GRPOOutput:
    """Per token −min(ratio·A, clip(ratio)·A) + β·KL, reduced as `loss_type` says.

    The other keywords and their defaults are the fields of `LossArguments` and `PolicyOptions`; the formulas are in the
    README of this package. Exactly one of `rewards` and `advantages` is given. All log-probabilities but those of
    `logits`, and the advantages, are constants.

    `normalizer` fixes the denominator for an update that is computed in several calls: the number of loss tokens (dapo,
    where it is required, and bnpo) or of sequences (grpo, dr_grpo, tinyllava_video_r1) of the whole update. The losses
    of the calls then add up to the loss of one call with everything.

    With `inplace` the gradient takes the place of the logits, which are lost then: during this call where the loss is
    one launch, during its backward pass elsewhere. Nothing is written where no gradient is wanted.

    Raises:
        ValueError: wrong shapes, dtypes, devices, ids, unknown or contradictory options; `inplace` where the kernels do
            not run, or for logits that are a leaf or overlap themselves.
    """
    arguments = LossArguments(**loss_arguments)
    check_rows("logits", logits, token_ids)
    mask = _check(arguments, token_ids, logits.shape[-1])
    if inplace:
        check_inplace(logits, uses_triton(logits))
    if uses_triton(logits):
        from .gpu import loss  # triton exists on Linux only
        from .gpu import rows as row_kernels

        if _is_one_launch(arguments):
            advantages = None if _kernel_advantages(arguments) else _advantages(arguments)
            return GRPOOutput(*loss.one_launch_loss(logits, token_ids, mask, arguments, advantages, inplace=inplace))
        scores = row_kernels.score_rows(logits, token_ids, mask, temperature=arguments.temperature, inplace=inplace)
        logps, entropy = (x[mask.reshape(-1)] for x in scores)
        return _reduce(logps, entropy, token_ids, mask, arguments)
    rows = _select(logits, arguments.mask, mask)
    logps, entropy = reference.selective_log_softmax(rows, token_ids[mask].long(), arguments.temperature)
    return _reduce(logps, entropy, token_ids, mask, arguments)


@_with_loss_arguments
def linear_grpo_loss(
    hidden: Tensor,  # (B, T, D) padded, (N, D) packed; row t predicts token t
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (B, T) padded, (N,) packed with cu_seqlens
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    **loss_arguments: Any,
) -> GRPOOutput:
    """`grpo_loss` of the logits of a linear head, which never exist as a whole; see `linear_logps` for the head.

    Values and all gradients equal those of `grpo_loss(hidden @ weight.T, ...)` for every chunk size. Masked rows are
    left out before the product.
    """
    arguments = LossArguments(**loss_arguments)
    check_rows("hidden", hidden, token_ids)
    check_linear(hidden, weight, bias, softcap, logit_scale, chunk_size)
    mask = _check(arguments, token_ids, weight.shape[0])
    rows = _select(hidden, arguments.mask, mask)
    head = (softcap, logit_scale, arguments.temperature)
    logps, entropy = chunked_linear_logps(rows, weight, bias, token_ids[mask].long(), head, chunk_size)
    return _reduce(logps, entropy, token_ids, mask, arguments)


def _check(arguments: LossArguments, token_ids: Tensor, vocabulary: int) -> Tensor:
    num_sequences = check_layout(token_ids, arguments.cu_seqlens)
    mask = check_mask(arguments.mask, token_ids)
    check_loss_arguments(arguments, token_ids, mask, num_sequences)
    check_token_ids(token_ids, vocabulary, mask)
    return mask


def _select(rows: Tensor, given_mask: Tensor | None, mask: Tensor) -> Tensor:
    """The rows (n, ·) of the n loss tokens; a view where there is no mask and the layout allows."""
    return rows.reshape(-1, rows.shape[-1]) if given_mask is None else rows[mask]


def _reduce(logps: Tensor, entropy: Tensor, token_ids: Tensor, mask: Tensor, arguments: LossArguments) -> GRPOOutput:
    """From the log-probabilities (n,) and entropies (n,) of the loss tokens to the output."""
    entropy = entropy if arguments.entropy_coef else entropy.detach()
    advantages = _advantages(arguments)
    grid = _Grid(token_ids, mask, arguments.cu_seqlens)
    per_sequence = advantages.shape == (grid.shape[0],)
    loss, metrics = reference.policy_loss_from_logps(
        grid.place(logps),
        grid.place(torch.ones_like(logps, dtype=torch.bool)),
        advantages if per_sequence else grid.place(advantages[mask]),
        arguments,
        old_logps=None if arguments.old_logps is None else grid.place(arguments.old_logps[mask]),
        ref_logps=None if arguments.ref_logps is None else grid.place(arguments.ref_logps[mask]),
        sampler_logps=None if arguments.sampler_logps is None else grid.place(arguments.sampler_logps[mask]),
        entropy=grid.place(entropy),
    )
    return GRPOOutput(loss, metrics, _scatter(logps, mask), _scatter(entropy, mask), advantages)


def _is_one_launch(arguments: LossArguments) -> bool:
    """Whether the loss of every token depends on its own row alone."""
    return (
        arguments.importance_sampling_level == "token"
        and (arguments.sampler_logps is None or not arguments.sampler_correction.startswith("sequence"))
        and arguments.off_policy_threshold is None
        and arguments.top_entropy_quantile == 1
    )


def _kernel_advantages(arguments: LossArguments) -> bool:
    """Whether the loss kernel computes the advantages, from rewards that are checked here."""
    if arguments.rewards is None or not rewards_use_triton(arguments.rewards):
        return False
    check_groups(arguments.rewards, arguments.num_generations, arguments.group_ids)
    return True


def _advantages(arguments: LossArguments) -> Tensor:
    """(B,) from rewards, or the given ones."""
    if arguments.rewards is None:
        assert arguments.advantages is not None
        return reference.upcast(arguments.advantages.detach())
    advantages = group_advantages(
        arguments.rewards,
        arguments.num_generations,
        group_ids=arguments.group_ids,
        scale_rewards=arguments.scale_rewards,
        eps=arguments.advantage_eps,
        leave_one_out=arguments.leave_one_out,
    )
    return advantages if arguments.sequence_index is None else advantages[arguments.sequence_index.long()]


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Detached values (n,) at the True places of `mask`, 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    out[mask] = values.detach()
    return out


class _Grid:
    """Places values of loss tokens (n,) in a (B, T) grid of zeros, a row per sequence, padded or packed input alike."""

    def __init__(self, token_ids: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> None:
        position = mask.reshape(-1).nonzero().squeeze(1)
        if cu_seqlens is None:
            self.shape = tuple(token_ids.shape)
            self.index = (position // max(self.shape[1], 1), position % max(self.shape[1], 1))
            return
        cu_seqlens = cu_seqlens.long()
        sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1
        lengths = cu_seqlens.diff().tolist()
        self.shape = (len(lengths), max(lengths, default=0))
        self.index = (sequence, position - cu_seqlens[sequence])

    def place(self, values: Tensor) -> Tensor:
        return torch.zeros(self.shape, dtype=values.dtype, device=values.device).index_put(self.index, values)
