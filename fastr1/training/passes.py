"""Passes of a model over the packed completions of a rollout: their log-probabilities, and the loss.

Values of tokens are kept as rows of the rollout, flattened: (B·G·T,). A micro-batch knows the places of its tokens
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastr1.models import VideoLanguageModel
from fastr1.schema import Batch
from fastr1.training.packing import MicroBatch, Ranks, keep_step, pack_groups
from fastr1_kernels import GRPOOutput, LossOptions, linear_grpo_loss, linear_logps


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """What one step of the optimizer trains on."""

    prompts: range  # places in the batch
    micro_batches: list[MicroBatch]  # of what has signal; as many on every rank, one at least
    num_loss_tokens: int  # of this rank that the loss counts
    num_sequences: int  # of this rank that the loss counts, whatever is masked in them


def plan_steps(batch: Batch, ranks: Ranks, *, prompts_per_step: int, max_tokens: int) -> list[OptimizerStep]:
    """The steps that one pass over the rollout takes, `prompts_per_step` prompts of this rank each. All ranks call it.

    That every prompt fits into `max_tokens` with its longest completion is the caller's to check.
    """
    num_prompts, group = len(batch.samples), batch.num_generations
    steps = []
    for start in range(0, num_prompts, prompts_per_step):
        prompts = range(start, min(start + prompts_per_step, num_prompts))
        rows = range(start * group, prompts.stop * group)
        trained = {p: [r for r in range(p * group, (p + 1) * group) if batch.has_signal[r]] for p in prompts}
        packed = pack_groups(batch.prompt_lengths, trained, batch.lengths, max_tokens)
        micro_batches = keep_step(ranks, packed, batch.prompt_lengths, prompts)
        num_loss_tokens = sum(batch.lengths[row] for row in rows if batch.is_counted[row])
        num_sequences = sum(batch.is_valid[prompts.start : prompts.stop]) * group
        steps.append(OptimizerStep(prompts, micro_batches, num_loss_tokens, num_sequences))
    return steps


def completion_states(
    model: VideoLanguageModel,
    micro_batch: MicroBatch,
    prompt_ids: Sequence[torch.Tensor],  # B × (L_i,)
    visual_tokens: Sequence[torch.Tensor],  # B × (Q, D)
    ids: torch.Tensor,  # (rows of the rollout, T) int64
) -> torch.Tensor:
    """Hidden states (N, D) that predict the tokens of a micro-batch, out of all prompts and completions."""
    inputs = micro_batch.places(ids.shape[1], ids.device, inputs=True)
    return model.completion_states(
        [prompt_ids[prompt] for prompt in micro_batch.prompts],
        [visual_tokens[prompt] for prompt in micro_batch.prompts],
        ids.flatten()[inputs],
        micro_batch.layout,
    )


@torch.no_grad()
def compute_logps(
    model: VideoLanguageModel,
    batch: Batch,
    micro_batches: Sequence[MicroBatch],
    visual_tokens: Sequence[torch.Tensor],
    *,
    temperature: float,
    check_values: bool,
) -> torch.Tensor:
    """Log-probabilities (B·G·T,) of the tokens of these micro-batches, zeros elsewhere."""
    ids = batch.rollout.completion_ids
    weight, bias = model.head
    logps = torch.zeros(ids.numel(), device=ids.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    for micro_batch in micro_batches:
        places = micro_batch.places(ids.shape[1], ids.device)
        states = completion_states(model, micro_batch, batch.prompt_ids, visual_tokens, ids)
        logps[places] = linear_logps(
            states, weight, ids.flatten()[places], bias=bias, temperature=temperature, check_values=check_values
        )
    return logps


def compute_loss(
    model: VideoLanguageModel,
    batch: Batch,
    micro_batch: MicroBatch,
    visual_tokens: Sequence[torch.Tensor],
    *,
    normalizer: float,
    options: LossOptions,
    corrects_sampler: bool,
    check_values: bool,
) -> GRPOOutput:
    """This micro-batch's part of the loss; token values are (N,). A blank micro-batch has loss 0 and gradients of 0."""
    ids = batch.rollout.completion_ids
    places = micro_batch.places(ids.shape[1], ids.device)
    rows = torch.tensor(micro_batch.rows, device=ids.device)

    def of_tokens(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.flatten()[places]

    weight, bias = model.head
    return linear_grpo_loss(
        completion_states(model, micro_batch, batch.prompt_ids, visual_tokens, ids),
        weight,
        ids.flatten()[places],
        bias=bias,
        cu_seqlens=micro_batch.cu_seqlens(ids.device),
        mask=torch.zeros(len(places), dtype=torch.bool, device=ids.device) if micro_batch.is_blank else None,
        advantages=batch.advantages[rows],
        old_logps=of_tokens(batch.old_logps),
        ref_logps=of_tokens(batch.ref_logps),
        sampler_logps=of_tokens(batch.rollout.sampler_logps if corrects_sampler else None),
        normalizer=normalizer,
        return_entropy=True,
        check_values=check_values,
        options=options,
    )
