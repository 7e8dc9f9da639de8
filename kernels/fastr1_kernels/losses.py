"""The GRPO family of losses, from logits or straight from hidden states: the public doors.

Only the rows of loss tokens are used: what stands in a masked row, NaN included, reaches neither loss nor gradients.
On a GPU `grpo_loss` is one Triton launch where every token's loss depends on its own row alone (`gpu.loss`). Else, and
on a CPU, rows are scored and differentiated by `rows`, with `token_loss` between. `linear_grpo_loss` computes loss and
gradients a chunk of rows at a time (`linear`, inside `torch.compile` by `linear_ops`). `dispatch` has the rules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    LossArguments,
    check_grad_scale,
    check_head,
    check_inplace,
    check_layout,
    check_loss_arguments,
    check_mask,
    check_rows,
    check_temperatures,
    check_token_ids,
)
from .dispatch import fits_one_launch, knows_gradient, may_read_values, rewards_use_triton, uses_triton
from .head import HeadOptions, HeadTensors
from .linear import linear_loss
from .linear_ops import compiled_linear_loss
from .options import LossOptions, check_count, choose_options
from .rows import score_rows
from .token_loss import TokenLoss, advantages_of


class GRPOOutput(NamedTuple):
    """What a loss returns. Only `loss` carries a gradient; nothing here waits for a GPU."""

    loss: Tensor  # 0-d float32 (float64 for float64 inputs)
    metrics: dict[str, tuple[Tensor, Tensor]]  # name → (sum, count) over loss tokens, 0-d: add up, then divide
    logps: Tensor  # shape of token_ids, 0 where masked
    entropy: Tensor | None  # the same; None where neither `return_entropy` asks for it nor the loss reads it
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
    return_entropy: bool = False,  # True: also where the loss does not read it
    check_values: bool = True,  # False: nothing waits for the device
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

    The keywords from `loss_type` on are the fields of `LossOptions`; `options` gives them all at once. Formulas and
    every keyword: the README of this package. Exactly one of `rewards` and `advantages` is given; they and all
    log-probabilities but those of `logits` are constants. `normalizer`, the loss tokens or sequences
    (`LOSSES[loss_type].counts`) of the whole update, makes the losses of its calls add up to that of one call.

    Entropies cost a row a quarter more instructions. They are computed, and are a metric, with `return_entropy`, an
    entropy bonus or an entropy quantile.

    With `check_values=False` no check reads the values of a tensor, and neither the call nor its backward pass waits
    for the device. Wrong ids, rewards and boundaries are then not noticed. It is always so inside `torch.compile`.

    With `grad_scale` the one launch writes the gradient of grad_scale · loss, and a backward pass that brings this
    factor, of loss scaling or of accumulation, has nothing left to do. Any other upstream gradient stays right at the
    cost of one more pass. It changes no value. float16 logits are scored by two launches without it: their gradient,
    written before the factor is known, would round to zeros.

    With `inplace` the gradient takes the place of the logits, which are lost then: during this call where the loss is
    one launch, during its backward pass elsewhere. Nothing is written where no gradient is wanted, nor inside
    `torch.compile`, which plans memory itself.

    Raises:
        ValueError: wrong shapes, dtypes, devices, ids, unknown or contradictory options; `inplace` for logits that are
            a leaf or overlap themselves.
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
        return_entropy=return_entropy,
        check_values=may_read_values(check_values),
    )
    check_rows("logits", logits, token_ids)
    mask = _check(arguments, token_ids, logits.shape[-1])
    check_grad_scale(grad_scale)
    if inplace and not torch.compiler.is_compiling():
        check_inplace(logits)
    return _loss_of_logits(logits, token_ids, mask, arguments, inplace, grad_scale)


def linear_grpo_loss(
    hidden: Tensor,  # (B, T, D) padded, (N, D) packed; row t predicts token t
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (B, T) padded, (N,) packed with cu_seqlens
    *,
    bias: Tensor | None = None,  # (V,)
    lora_a: Tensor | None = None,  # (r, D)
    lora_b: Tensor | None = None,  # (V, r)
    lora_scale: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    chunk_size: int | None = None,
    num_loss_tokens: int | None = None,  # with check_values=False: the number of True in mask
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
    return_entropy: bool = False,
    check_values: bool = True,
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
    temperature: float | Tensor = 1.0,  # or as token_ids
) -> GRPOOutput:
    """`grpo_loss` of the logits of a linear head, which never exist as a whole; see `linear_logps` for the head.

    Values and all gradients equal those of `grpo_loss(hidden @ weight.T, ...)` for every chunk size. The gradients are
    computed in this call, chunk by chunk; the backward pass, of which there is one, only scales them. With
    `check_values` masked rows are left out of every product, and rows that cannot have a gradient (advantage 0, without
    KL and entropy bonus) of all but the first. Without it that needs `num_loss_tokens`, for masked rows alone.
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
        temperature=1.0 if isinstance(temperature, Tensor) else temperature,
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
        return_entropy=return_entropy,
        check_values=may_read_values(check_values),
    )
    head = HeadTensors(weight, bias, lora_a, lora_b)
    head_options = HeadOptions(
        lora_scale=lora_scale,
        logits_dtype=logits_dtype,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=arguments.options.temperature,
        top_k=top_k,
        top_p=top_p,
    )
    temperatures = temperature if isinstance(temperature, Tensor) else None
    return _linear_loss(hidden, head, token_ids, temperatures, arguments, head_options, chunk_size, num_loss_tokens)


def _linear_loss(
    hidden: Tensor,
    head: HeadTensors,
    token_ids: Tensor,
    temperatures: Tensor | None,  # as token_ids
    arguments: LossArguments,
    options: HeadOptions,
    chunk_size: int | None,
    num_loss_tokens: int | None,
) -> GRPOOutput:
    check_rows("hidden", hidden, token_ids)
    check_head(hidden, head, options, chunk_size)
    mask = _check(arguments, token_ids, head.weight.shape[0])
    if temperatures is not None:
        check_temperatures(temperatures, token_ids, mask, arguments.check_values)
        if options.temperature != 1.0:
            raise ValueError(f"options.temperature={options.temperature} and temperature: give one of them")
    if num_loss_tokens is not None:
        check_count("num_loss_tokens", num_loss_tokens)
        if arguments.check_values and (number := int(mask.sum())) != num_loss_tokens:
            raise ValueError(f"num_loss_tokens={num_loss_tokens}, but mask has {number} loss tokens")
    inputs = (hidden, head, token_ids, mask, temperatures, arguments, options, chunk_size, num_loss_tokens)
    if torch.compiler.is_compiling():
        return GRPOOutput(*compiled_linear_loss(*inputs))
    output, _ = linear_loss(*inputs)
    return GRPOOutput(*output)


def _check(arguments: LossArguments, token_ids: Tensor, vocabulary: int) -> Tensor:
    """The mask as bool, once everything but the rows is checked."""
    check_values = arguments.check_values
    num_sequences = check_layout(token_ids, arguments.cu_seqlens, check_values)
    mask = check_mask(arguments.mask, token_ids, check_values)
    check_loss_arguments(arguments, token_ids, mask, num_sequences)
    if check_values:
        check_token_ids(token_ids, vocabulary, mask)
    return mask


def _loss_of_logits(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    arguments: LossArguments,
    inplace: bool,
    grad_scale: float | Tensor | None,
) -> GRPOOutput:
    is_one_launch = fits_one_launch(arguments.options, arguments.sampler_logps is not None)
    if is_one_launch and uses_triton(logits) and knows_gradient(logits, grad_scale is not None):
        from .gpu.loss import one_launch_loss  # triton exists on Linux only

        in_kernel = arguments.rewards is not None and rewards_use_triton(arguments.rewards)
        advantages = None if in_kernel else advantages_of(arguments)
        return GRPOOutput(*one_launch_loss(logits, token_ids, mask, arguments, advantages, inplace, grad_scale))
    live = None if arguments.mask is None else mask
    scores = score_rows(
        logits,
        token_ids,
        live,
        temperature=arguments.options.temperature,
        inplace=inplace,
        compute_entropy=arguments.has_entropy,
    )
    return GRPOOutput(*TokenLoss(token_ids, mask, arguments).output(*scores))
