"""Gradients of one update and log-probabilities of the reference, computed in different ways from the same work.

Ours is what the trainer does. The ablations take one thing away from it each. "before" is how the trainer did it at
commit 2c9de69; "original" is the schedule of TinyLLaVA-Video-R1: nothing is shared between completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from update_work import Work

from fastr1.models import VideoLanguageModel
from fastr1.schema import Batch, Rollout
from fastr1.training.packing import MicroBatch
from fastr1.training.passes import OptimizerStep, completion_states, compute_logps, compute_loss, plan_steps
from fastr1.training.visual import VisualTokens
from fastr1_kernels import GRPOOutput, LossOptions, grpo_loss, linear_grpo_loss, linear_logps, selective_log_softmax

MAX_TOKENS = 8192  # of a micro-batch, the trainer's default


class Ranks:
    """Verbs of `DistributedModel` in one process, without DeepSpeed and its optimizer."""

    def __init__(self, model: VideoLanguageModel) -> None:
        self.model = model

    def __call__(self, compute: Callable[[VideoLanguageModel], Any]) -> Any:
        return self.model(compute)

    def backward_from(self, outputs: Any, grads: Any) -> None:
        torch.autograd.backward(outputs, grads)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def options(work: Work) -> LossOptions:
    return LossOptions(loss_type="dapo", beta=work.case.beta)


def plan(model: VideoLanguageModel, batch: Batch) -> OptimizerStep:
    (step,) = plan_steps(batch, Ranks(model), prompts_per_step=len(batch.samples), max_tokens=MAX_TOKENS)
    return step


Loss = Callable[[Work, Batch, MicroBatch, Sequence[Tensor]], GRPOOutput]


def fused_loss(work: Work, batch: Batch, micro_batch: MicroBatch, tokens: Sequence[Tensor]) -> GRPOOutput:
    return compute_loss(
        work.model,
        batch,
        micro_batch,
        tokens,
        normalizer=work.normalizer,
        options=options(work),
        corrects_sampler=False,
        check_values=work.model.device.type == "cpu",
    )


def loss_of_logits(work: Work, batch: Batch, micro_batch: MicroBatch, tokens: Sequence[Tensor]) -> GRPOOutput:
    """The same from all logits of the micro-batch."""
    ids = batch.rollout.completion_ids
    places = micro_batch.places(ids.shape[1], ids.device)
    return grpo_loss(
        work.model.project(completion_states(work.model, batch, micro_batch, tokens)),
        ids.flatten()[places],
        cu_seqlens=micro_batch.cu_seqlens(ids.device),
        advantages=batch.advantages[torch.tensor(micro_batch.rows, device=ids.device)],
        ref_logps=None if batch.ref_logps is None else batch.ref_logps[places],
        normalizer=work.normalizer,
        check_values=work.model.device.type == "cpu",
        options=options(work),
    )


def train_packed(work: Work, videos: Sequence[Tensor], loss_of: Loss = fused_loss) -> float:
    """Forward and backward of every micro-batch, then of the connector; the loss."""
    visual = VisualTokens(Ranks(work.model), videos)  # type: ignore[arg-type]
    total = 0.0
    for micro_batch in plan(work.model, work.batch).micro_batches:
        out = loss_of(work, work.batch, micro_batch, visual.tokens)
        out.loss.backward()
        total += out.loss.item()
    visual.backward()
    return total


def train_unshared(work: Work, videos: Sequence[Tensor]) -> float:
    """Packed, and every completion behind a prompt of its own."""
    visual = VisualTokens(Ranks(work.model), videos)  # type: ignore[arg-type]
    batch, group = single_rows(work.batch), work.case.num_generations
    tokens = [t for t in visual.tokens for _ in range(group)]
    total = 0.0
    for micro_batch in plan(work.model, batch).micro_batches:
        out = fused_loss(work, batch, micro_batch, tokens)
        out.loss.backward()
        total += out.loss.item()
    visual.backward()
    return total


def single_rows(batch: Batch) -> Batch:
    """B·G prompts with one completion each."""
    group = len(batch.lengths) // len(batch.samples)

    def each(values: list[Any]) -> list[Any]:
        return [value for value in values for _ in range(group)]

    names = ("samples", "prompt_ids", "prompt_lengths", "is_valid")
    return replace(batch, **{name: each(getattr(batch, name)) for name in names})


def micro_batches(work: Work) -> list[slice]:
    """Prompts that padded micro-batches of at most `MAX_TOKENS` places hold, shared prompts counted per completion; one
    at least."""
    case = work.case
    number = max(1, MAX_TOKENS // (case.num_generations * (case.prompt_length + max(work.batch.lengths))))
    return [slice(i, min(i + number, case.num_prompts)) for i in range(0, case.num_prompts, number)]


def rows_of(work: Work, prompts: slice) -> slice:
    return slice(prompts.start * work.case.num_generations, prompts.stop * work.case.num_generations)


def train_padded(work: Work, videos: Sequence[Tensor]) -> float:
    """Every completion a padded row behind its own prompt; the head is fused with the loss."""
    visual = VisualTokens(Ranks(work.model), videos)  # type: ignore[arg-type]
    total = 0.0
    for prompts in micro_batches(work):
        rows = rows_of(work, prompts)
        ids, mask = padded(work, rows)
        given = ids, mask
        hidden = padded_states(work.model, work.batch.prompt_ids[prompts], visual.tokens[prompts], *given)
        out = linear_grpo_loss(
            hidden, work.model.head[0], ids, **loss_arguments(work, rows, mask)
        )
        out.loss.backward()
        total += out.loss.item()
    visual.backward()
    return total


def padded(work: Work, rows: slice) -> tuple[Tensor, Tensor]:
    """Completions and their mask, cut at the longest of the rows."""
    longest = max(work.batch.lengths[rows])
    rollout: Rollout = work.batch.rollout
    return rollout.completion_ids[rows, :longest], rollout.completion_mask[rows, :longest]


def loss_arguments(work: Work, rows: slice, mask: Tensor) -> dict[str, Any]:
    batch = work.batch
    ref_logps = batch.ref_logps
    if ref_logps is not None:
        ref_logps = ref_logps.view(batch.rollout.completion_ids.shape)[rows, : mask.shape[1]]
    given = {"mask": mask, "advantages": batch.advantages[rows], "ref_logps": ref_logps}
    return {**given, "normalizer": work.normalizer, "options": options(work)}


def padded_states(
    model: VideoLanguageModel, prompt_ids: Sequence[Tensor], tokens: Sequence[Tensor], ids: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states (R, T, D) that predict the completions (R, T): transformers' own forward, nothing shared."""
    embeds, prompt_mask = model.embed_prompts(prompt_ids, tokens)
    repeats = ids.shape[0] // len(prompt_ids)
    rows = [embeds.repeat_interleave(repeats, dim=0), model.decoder.embed_tokens(ids)[:, :-1]]
    mask = torch.cat([prompt_mask.repeat_interleave(repeats, dim=0), mask[:, :-1].long()], dim=1)
    inputs: dict[str, Any] = {"inputs_embeds": torch.cat(rows, dim=1), "attention_mask": mask, "use_cache": False}
    out = model.decoder(**inputs, position_ids=model.positions(mask))
    hidden: Tensor = out.last_hidden_state[:, embeds.shape[1] - 1 :]
    return hidden


def before_logits(
    model: VideoLanguageModel, prompt_ids: Sequence[Tensor], videos: Sequence[Tensor], ids: Tensor, mask: Tensor
) -> Tensor:
    """Logits (R, T, V) as at commit 2c9de69: the prompts' cache is copied for every completion, which are padded."""
    embeds, prompt_mask = model.embed_prompts(prompt_ids, model.visual_tokens(videos))
    group = ids.shape[0] // len(prompt_ids)
    cache, last = model.prefill(embeds, prompt_mask, group)
    if ids.shape[1] == 1:
        return model.project(last)
    whole = torch.cat([prompt_mask.repeat_interleave(group, dim=0), mask.long()], dim=1)
    hidden = model.extend(ids[:, :-1], whole[:, :-1], cache)
    return model.project(torch.cat([last, hidden], dim=1))


def train_before(work: Work, videos: Sequence[Tensor]) -> float:
    """All prompts in one padded micro-batch, as the demo had it; the connector runs inside the forward."""
    total = 0.0
    rows = slice(0, len(work.batch.lengths))
    ids, mask = padded(work, rows)
    logits = before_logits(work.model, work.batch.prompt_ids, videos, ids, mask)
    out = grpo_loss(logits, ids, **loss_arguments(work, rows, mask))
    out.loss.backward()
    total += out.loss.item()
    return total


@torch.no_grad()
def logps_packed(work: Work, tokens: Sequence[Tensor]) -> Tensor:
    """(B·G·T,) of the reference."""
    assert work.reference is not None
    return compute_logps(
        work.reference,
        work.batch,
        plan(work.reference, work.batch).micro_batches,
        tokens,
        temperature=1.0,
        check_values=work.model.device.type == "cpu",
    )


@torch.no_grad()
def logps_before(work: Work, videos: Sequence[Tensor]) -> Tensor:
    rows = slice(0, len(work.batch.lengths))
    ids, mask = padded(work, rows)
    logits = before_logits(work.reference, work.batch.prompt_ids, videos, ids, mask)
    return selective_log_softmax(logits, ids).masked_fill(~mask, 0.0).flatten()
