"""Liger-Kernel's GRPO signatures (0.8): `LigerFusedLinearGRPOLoss`, `triton_grpo_loss`, `fused_selective_log_softmax`.

Where both know a loss, values and gradients agree. Different on purpose:
- masked rows reach nothing, NaN and ids outside the vocabulary included;
- `luspo` is TRL's: the masked sum of each sequence, at sequence level only;
- `delta` must exceed 1 + the upper epsilon, and is refused where the loss does not read it;
- `vespo` and `use_bias_correction_kl` are refused;
- KL without reference log-probabilities is an error, not a KL of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_inplace
from ..logps import linear_logps, selective_log_softmax
from ..losses import GRPOOutput, grpo_loss, linear_grpo_loss
from ..options import LOSSES, LossOptions, check_count, check_number, require


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Loss of a linear head: `(hidden, weight, ids, mask, advantages, …)` to `(loss, metrics)`.

    `compiled` and `chunk_size` say how the work is done and change no result: nothing is compiled here, and a
    `chunk_size` above 1 scores the rows of that many sequences at a time; 1 leaves the number to this package.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        vespo = (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        _refuse_unknown(use_bias_correction_kl, vespo)
        require(isinstance(compiled, bool), f"compiled={compiled!r}: give a bool")
        check_count("chunk_size", chunk_size)
        self.options = _options(
            loss_type,
            beta=beta,
            epsilon=epsilon_low,
            epsilon_high=epsilon_high,
            max_completion_length=max_completion_length,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            temperature=temperature,
            delta=delta,
        )
        require(
            use_ref_model or not beta,
            f"use_ref_model={use_ref_model} with beta={beta} is a KL of 0 to nothing: give beta=0, or a reference",
        )
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,  # (B, T, D)
        lin_weight: Tensor,  # (V, D)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T), 0 or 1
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, D), with ref_weight and ref_bias: instead of ref_per_token_logps
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,  # (B, T) or (B, 1)
        num_items_in_batch: float | Tensor | None = None,  # read by dapo and cispo
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """metrics: the mean KL first where beta ≠ 0, the share of clipped tokens last."""
        mask = attention_mask.bool()
        token_ids = torch.where(mask, selected_token_ids, 0)
        if self.options.beta and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("beta needs ref_per_token_logps, or ref_input with ref_weight")
            with torch.no_grad():
                ref_per_token_logps = linear_logps(
                    ref_input,
                    ref_weight.to(ref_input.dtype),
                    token_ids,
                    bias=None if ref_bias is None else ref_bias.to(ref_input.dtype),
                    temperature=self.options.temperature,
                )
        output = linear_grpo_loss(
            _input,
            lin_weight.to(_input.dtype),
            token_ids,
            bias=None if bias is None else bias.to(_input.dtype),
            chunk_size=None if self.chunk_size == 1 else max(self.chunk_size * mask.shape[1], 1),
            mask=mask,
            advantages=_weighted(advantages, vllm_is_ratio, mask),
            old_logps=old_per_token_logps,
            ref_logps=ref_per_token_logps if self.options.beta else None,
            normalizer=_normalizer(self.options, mask, num_items_in_batch),
            options=self.options,
        )
        return output.loss, tuple(_metrics(output, self.options))


def triton_grpo_loss(
    logits: Tensor,  # (B, T + 1, V); row t predicts completion token t, the last row nothing
    old_logp: Tensor | None,  # (B, T)
    ref_logp: Tensor | None,  # (B, T)
    completion_ids: Tensor,  # (B, T)
    advantages: Tensor,  # (B,)
    completion_mask: Tensor | None = None,  # (B, T), 0 or 1
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,  # (B, T), (B, 1) or (B,)
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,  # read by dapo and cispo, with reduce
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """With `reduce` (loss, [mean KL where beta ≠ 0, share of clipped tokens]); else (loss, KL or None, clipped) of each
    token, all (B, T), of which the loss carries the gradient and, as in Liger, the KL none.

    `inplace` permits the gradient to take the place of the logits. It does so with `reduce` where the logits are no
    leaf and do not overlap: during this call where the loss is one launch, else during the backward pass, as in Liger.
    """
    _refuse_unknown(use_bias_correction_kl, (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg))
    if loss_type == "dr_grpo" and max_completion_length is None:
        max_completion_length = completion_ids.shape[1]
    options = _options(
        loss_type,
        beta=beta,
        epsilon=eps_low,
        epsilon_high=eps_high,
        max_completion_length=max_completion_length,
        importance_sampling_level=importance_sampling_level,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        temperature=temperature,
        delta=delta,
    )
    require(not beta or ref_logp is not None, f"beta={beta} needs ref_logp: give it, or beta=0")
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask.bool()
    rows, token_ids = logits[:, :-1], torch.where(mask, completion_ids, 0)
    weighted = _weighted(advantages, vllm_is_ratio, mask)
    if not reduce:
        return _token_losses(rows, token_ids, mask, weighted, old_logp, ref_logp, options)
    output = grpo_loss(
        rows,
        token_ids,
        inplace=inplace and _can_overwrite(rows, logits),
        mask=mask,
        advantages=weighted,
        old_logps=old_logp,
        ref_logps=ref_logp if beta else None,
        normalizer=_normalizer(options, mask, num_items_in_batch),
        options=options,
    )
    return output.loss, _metrics(output, options)


def fused_selective_log_softmax(
    logits: Tensor,  # (B, T + 1, V)
    input_ids: Tensor,  # (B, T or more), of which the last T are read
    temperature: float = 0.9,
    mask: Tensor | None = None,  # as input_ids
) -> Tensor:
    """Log-probabilities (B, T) in float32, 0 where masked, without gradient."""
    length = logits.shape[1] - 1
    token_ids = input_ids[:, input_ids.shape[1] - length :]
    if mask is not None:
        mask = mask[:, mask.shape[1] - length :].bool()
        token_ids = torch.where(mask, token_ids, 0)
    with torch.no_grad():
        logps = selective_log_softmax(logits[:, :-1], token_ids, temperature=temperature)
    return logps if mask is None else torch.where(mask, logps, 0.0)


def _options(loss_type: str, **fields: object) -> LossOptions:
    """Liger's epsilons: 1 + epsilon_high is the largest ratio, but for cispo epsilon_high itself, as here; sapo has
    none."""
    require(loss_type in LOSSES and loss_type != "tinyllava_video_r1", f"loss_type={loss_type!r} is not supported")
    if loss_type == "sapo":
        del fields["epsilon_high"]
    options = LossOptions(loss_type=loss_type, log_ratio_clamp=None, **fields)  # type: ignore[arg-type]
    options.check()
    return options


def _refuse_unknown(use_bias_correction_kl: bool, vespo: tuple[float, float, float, float]) -> None:
    require(not use_bias_correction_kl, "use_bias_correction_kl=True is not supported: the KL is not weighted here")
    require(vespo == (2.0, 3.0, 3.0, 2.0), f"vespo_* = {vespo}: loss_type='vespo' is not supported, leave them out")


def _weighted(advantages: Tensor, ratio: Tensor | None, mask: Tensor) -> Tensor:
    """The policy term is linear in the advantage, so a weight ≥ 0 of the term is one of the advantage. The KL is not
    weighted. A token of weight 0 does not count as clipped."""
    shape, length = (mask.shape[0],), mask.shape[1]
    require(tuple(advantages.shape) == shape, f"advantages has shape {tuple(advantages.shape)}: expected {shape}")
    if ratio is None:
        return advantages
    ratio = ratio[:, None] if ratio.dim() == 1 else ratio
    fits = ratio.dim() == 2 and ratio.shape[0] == shape[0] and ratio.shape[1] in (1, length)
    require(fits, f"vllm_is_ratio has shape {tuple(ratio.shape)}: give (B, T) or (B, 1)")
    return torch.where(mask, reference.upcast(advantages)[:, None] * ratio, 0.0)


def _normalizer(options: LossOptions, mask: Tensor, num_items: float | Tensor | None) -> Tensor | None:
    """Loss tokens per process: gradients are averaged over processes."""
    if "normalizer" not in options.loss.needs:
        return None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_processes = torch.distributed.get_world_size() if distributed else 1
    if isinstance(num_items, Tensor):
        total = num_items.to(device=mask.device, dtype=torch.float64)
    elif num_items is not None:
        check_number("num_items_in_batch", num_items, at_least=0)
        total = torch.full((), float(num_items), device=mask.device, dtype=torch.float64)
    else:
        total = mask.sum().double()
        if distributed:
            torch.distributed.all_reduce(total)
    return (total / num_processes).clamp(min=1)


def _metrics(output: GRPOOutput, options: LossOptions) -> list[Tensor]:
    count = output.metrics["ratio"][1].clamp(min=1)
    clipped = [output.metrics[name][0] for name in options.loss.clip_metrics]
    share = sum(clipped, torch.zeros_like(output.loss.detach())) / count
    return [output.metrics["kl"][0] / count, share] if options.beta else [share]


def _can_overwrite(rows: Tensor, logits: Tensor) -> bool:
    try:
        check_inplace(rows)
    except ValueError:
        return False
    return not logits.is_leaf


def _token_losses(
    rows: Tensor,  # (B, T, V)
    token_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,  # (B,) or (B, T)
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor | None, Tensor]:
    require(options.loss_type != "luspo", "luspo is a sum over sequences: use reduce=True")
    logps = torch.where(mask, selective_log_softmax(rows, token_ids, temperature=options.temperature), 0.0)
    old = logps.detach() if old_logps is None else torch.where(mask, old_logps.detach(), 0.0)
    log_ratio = logps - old
    if options.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    limit = reference.exponent_limit(logps.dtype, None)
    ratio = log_ratio.clamp(-limit, limit).exp()
    advantages = reference.upcast(advantages)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    loss = reference.policy_term(ratio, logps, advantages, options)
    low, high = reference.clip_range(options)
    names = options.loss.clip_metrics
    clipped = (ratio > high) & (advantages > 0) & ("clip_high" in names)
    clipped = (clipped | ((ratio < low) & (advantages < 0) & ("clip_low" in names))) & mask
    kl = None
    if options.beta:
        assert ref_logps is not None
        kl = reference.kl_divergence(logps, torch.where(mask, ref_logps.detach(), 0.0), "k3", None)
        loss = loss + options.beta * kl
        kl = torch.where(mask, kl.detach(), 0.0)
    return torch.where(mask, loss, 0.0), kl, clipped.float()
