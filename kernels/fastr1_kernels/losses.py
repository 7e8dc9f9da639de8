"""The GRPO family of losses, from logits or straight from hidden states: the public doors.

Only the rows of loss tokens are used: what stands in a masked row, NaN included, reaches neither loss nor gradients.
On a GPU `grpo_loss` is one Triton launch where every token's loss depends on its own row alone (`gpu.loss`), else two
row launches (`gpu.rows`) with torch between them. On a CPU the reference scores the rows; `linear_grpo_loss` scores
them in chunks of plain torch everywhere (`chunked`). `dispatch` has the rules, `token_loss` what follows the scores.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import reference
from .checks import (
    LossArguments,
    check_grad_scale,
    check_inplace,
    check_layout,
    check_linear,
    check_loss_arguments,
    check_mask,
    check_rows,
    check_token_ids,
)
from .chunked import chunked_linear_logps
from .dispatch import fits_one_launch, knows_gradient, rewards_use_triton, uses_triton
from .options import LossOptions, choose_options
from .token_loss import advantages_of, loss_of_tokens


class GRPOOutput(NamedTuple):
    """What a loss returns. Only `loss` carries a gradient; nothing here waits for a GPU."""

    loss: Tensor  # 0-d float32 (float64 for float64 inputs)
    metrics: dict[str, tuple[Tensor, Tensor]]  # name → (sum, count) over loss tokens, 0-d: add up, then divide
    logps: Tensor  # shape of token_ids, 0 where masked
    entropy: Tensor  # shape of token_ids, 0 where masked
    advantages: Tensor  # (B,), or the shape of the given advantages


def grpo_loss(
    logits: Tensor,  # (B, T, V) padded, (N, V) packed; row t predicts token t
    token_ids: Tensor,  # (B, T) padded, (N,) packed with cu_seqlens
    *,
    inplace: bool = False,
    grad_scale: float | Tensor | None = None,  # what the loss will be multiplied by before its backward pass
    mask: Tensor | None = None,  # as token_ids, True = loss token
    cu_seqlens: Tensor | None = None,  # (B + 1,), packed only
    rewards: Tensor | None = None,  # (R,)
    num_generations: int | None = None,
    group_ids: Tensor | None = None,  # (R,)
    sequence_index: Tensor | None = None,  # (B,)
    advantages: Tensor | None = None,  # (B,) or as token_ids
    old_logps: Tensor | None = None,  # as token_ids, as the two below
    ref_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    normalizer: float | Tensor | None = None,  # loss tokens or sequences of the whole update
    options: LossOptions | None = None,  # instead of the keywords below
    loss_type: str = "dapo",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    importance_sampling_level: str = "token",
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    log_ratio_clamp: float | None = 20.0,
    sampler_correction: str = "token_truncate",
    sampler_cap: float = 3.0,
    sampler_floor: float = 0.5,
    off_policy_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    scale_rewards: str = "group",
    advantage_eps: float = 1e-4,
    leave_one_out: bool = False,
    temperature: float = 1.0,
) -> GRPOOutput:
    """Objective of every loss token plus β·KL, reduced as the row of `loss_type` in `LOSSES` says.

    The keywords from `loss_type` on are the fields of `LossOptions`; `options` gives them all at once. Formulas and the
    meaning of every keyword are in the README of this package. Exactly one of `rewards` and `advantages` is given. All
    log-probabilities but those of `logits`, and the advantages, are constants.

    `normalizer` fixes the denominator for an update that is computed in several calls: the number of loss tokens or of
    sequences (`LOSSES[loss_type].counts`) of the whole update. The losses of the calls then add up to the loss of one
    call with everything.

    With `grad_scale` the one launch writes the gradient of grad_scale · loss, and a backward pass that brings this
    factor, of loss scaling or of accumulation, has nothing left to do. Any other upstream gradient stays right at the
    cost of one more pass. It changes no value. float16 logits are scored by two launches without it: their gradient,
    written before the factor is known, would round to zeros.

    With `inplace` the gradient takes the place of the logits, which are lost then: during this call where the loss is
    one launch, during its backward pass elsewhere. Nothing is written where no gradient is wanted.

    Raises:
        ValueError: wrong shapes, dtypes, devices, ids, unknown or contradictory options; `inplace` where the kernels do
            not run, or for logits that are a leaf or overlap themselves.
    """
    keywords = LossOptions(
        loss_type=loss_type,
        beta=beta,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        importance_sampling_level=importance_sampling_level,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        max_completion_length=max_completion_length,
        log_ratio_clamp=log_ratio_clamp,
        sampler_correction=sampler_correction,
        sampler_cap=sampler_cap,
        sampler_floor=sampler_floor,
        off_policy_threshold=off_policy_threshold,
        top_entropy_quantile=top_entropy_quantile,
        scale_rewards=scale_rewards,
        advantage_eps=advantage_eps,
        leave_one_out=leave_one_out,
        temperature=temperature,
    )
    arguments = LossArguments(
        options=choose_options(options, keywords),
        mask=mask,
        cu_seqlens=cu_seqlens,
        rewards=rewards,
        num_generations=num_generations,
        group_ids=group_ids,
        sequence_index=sequence_index,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampler_logps=sampler_logps,
        normalizer=normalizer,
    )
    check_rows("logits", logits, token_ids)
    mask = _check(arguments, token_ids, logits.shape[-1])
    check_grad_scale(grad_scale)
    if inplace:
        check_inplace(logits, uses_triton(logits))
    if uses_triton(logits):
        return _loss_in_triton(logits, token_ids, mask, arguments, inplace, grad_scale)
    rows = _select(logits, mask, arguments)
    logps, entropy = reference.selective_log_softmax(rows, token_ids[mask].long(), arguments.options.temperature)
    return GRPOOutput(*loss_of_tokens(logps, entropy, token_ids, mask, arguments))


def linear_grpo_loss(
    hidden: Tensor,  # (B, T, D) padded, (N, D) packed; row t predicts token t
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (B, T) padded, (N,) packed with cu_seqlens
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rewards: Tensor | None = None,
    num_generations: int | None = None,
    group_ids: Tensor | None = None,
    sequence_index: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    options: LossOptions | None = None,  # instead of the keywords below
    loss_type: str = "dapo",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    importance_sampling_level: str = "token",
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    log_ratio_clamp: float | None = 20.0,
    sampler_correction: str = "token_truncate",
    sampler_cap: float = 3.0,
    sampler_floor: float = 0.5,
    off_policy_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    scale_rewards: str = "group",
    advantage_eps: float = 1e-4,
    leave_one_out: bool = False,
    temperature: float = 1.0,
) -> GRPOOutput:
    """`grpo_loss` of the logits of a linear head, which never exist as a whole; see `linear_logps` for the head.

    Values and all gradients equal those of `grpo_loss(hidden @ weight.T, ...)` for every chunk size. Masked rows are
    left out before the product.
    """
    keywords = LossOptions(
        loss_type=loss_type,
        beta=beta,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        importance_sampling_level=importance_sampling_level,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        max_completion_length=max_completion_length,
        log_ratio_clamp=log_ratio_clamp,
        sampler_correction=sampler_correction,
        sampler_cap=sampler_cap,
        sampler_floor=sampler_floor,
        off_policy_threshold=off_policy_threshold,
        top_entropy_quantile=top_entropy_quantile,
        scale_rewards=scale_rewards,
        advantage_eps=advantage_eps,
        leave_one_out=leave_one_out,
        temperature=temperature,
    )
    arguments = LossArguments(
        options=choose_options(options, keywords),
        mask=mask,
        cu_seqlens=cu_seqlens,
        rewards=rewards,
        num_generations=num_generations,
        group_ids=group_ids,
        sequence_index=sequence_index,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampler_logps=sampler_logps,
        normalizer=normalizer,
    )
    check_rows("hidden", hidden, token_ids)
    check_linear(hidden, weight, bias, softcap, logit_scale, chunk_size)
    mask = _check(arguments, token_ids, weight.shape[0])
    rows = _select(hidden, mask, arguments)
    head = (softcap, logit_scale, arguments.options.temperature)
    logps, entropy = chunked_linear_logps(rows, weight, bias, token_ids[mask].long(), head, chunk_size)
    return GRPOOutput(*loss_of_tokens(logps, entropy, token_ids, mask, arguments))


def _check(arguments: LossArguments, token_ids: Tensor, vocabulary: int) -> Tensor:
    """The mask as bool, once everything but the rows is checked."""
    num_sequences = check_layout(token_ids, arguments.cu_seqlens)
    mask = check_mask(arguments.mask, token_ids)
    check_loss_arguments(arguments, token_ids, mask, num_sequences)
    check_token_ids(token_ids, vocabulary, mask)
    return mask


def _select(rows: Tensor, mask: Tensor, arguments: LossArguments) -> Tensor:
    """The rows (n, ·) of the n loss tokens; a view where no mask was given and the layout allows."""
    return rows.reshape(-1, rows.shape[-1]) if arguments.mask is None else rows[mask]


def _loss_in_triton(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    arguments: LossArguments,
    inplace: bool,
    grad_scale: float | Tensor | None,
) -> GRPOOutput:
    from .gpu import loss, rows  # triton exists on Linux only

    has_sampler = arguments.sampler_logps is not None
    if fits_one_launch(arguments.options, has_sampler) and knows_gradient(logits, grad_scale is not None):
        in_kernel = arguments.rewards is not None and rewards_use_triton(arguments.rewards)
        advantages = None if in_kernel else advantages_of(arguments)
        return GRPOOutput(*loss.one_launch_loss(logits, token_ids, mask, arguments, advantages, inplace, grad_scale))
    temperature = arguments.options.temperature
    scores = rows.score_rows(logits, token_ids, mask, temperature=temperature, inplace=inplace)
    logps, entropy = (x[mask.reshape(-1)] for x in scores)
    return GRPOOutput(*loss_of_tokens(logps, entropy, token_ids, mask, arguments))
