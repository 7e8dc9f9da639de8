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
from update_work import Work

from fastr1.models import VideoLanguageModel
from fastr1.schema import Batch
from fastr1.training.packing import MicroBatch
from fastr1.training.passes import OptimizerStep, completion_states, compute_logps, compute_loss, plan_steps
from fastr1.training.visual import VisualTokens
from fastr1_kernels import GRPOOutput, LossOptions, grpo_loss, linear_grpo_loss, selective_log_softmax


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


class NoVideos:
    """Stands for `VisualTokens` where the prompts are text alone."""

    is_trained = False

    def __init__(self, model: VideoLanguageModel, number: int) -> None:
        self.tokens = [torch.zeros(0, model.layout.hidden_size, device=model.device)] * number
        self.detached = self.tokens

    def backward(self) -> None:
        """Nothing is behind them."""


def see(work: Work, videos: Sequence[Tensor]) -> VisualTokens | NoVideos:
    """The videos' tokens with their graph, made once."""
    if not videos:
        return NoVideos(work.model, work.case.num_prompts)
    return VisualTokens(Ranks(work.model), videos)  # type: ignore[arg-type]


def plan(work: Work, batch: Batch) -> OptimizerStep:
    ranks = Ranks(work.model)
    (step,) = plan_steps(batch, ranks, prompts_per_step=len(batch.samples), max_tokens=work.case.max_tokens)
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
        work.model.project(
            completion_states(work.model, micro_batch, batch.prompt_ids, tokens, batch.rollout.completion_ids)
        ),
        ids.flatten()[places],
        cu_seqlens=micro_batch.cu_seqlens(ids.device),
        advantages=batch.advantages[torch.tensor(micro_batch.rows, device=ids.device)],
        ref_logps=None if batch.ref_logps is None else batch.ref_logps.flatten()[places],
        normalizer=work.normalizer,
        return_entropy=True,
        check_values=work.model.device.type == "cpu",
        options=options(work),
    )


def train_packed(work: Work, visual: VisualTokens | NoVideos, loss_of: Loss = fused_loss) -> float:
    """Forward and backward of every micro-batch, then of the connector; the loss."""
    return run_micro_batches(work, work.batch, visual.tokens, visual, loss_of)


def train_unshared(work: Work, visual: VisualTokens | NoVideos) -> float:
    """Packed, and every completion behind a prompt of its own."""
    tokens = [t for t in visual.tokens for _ in range(work.case.num_generations)]
    return run_micro_batches(work, single_rows(work.batch), tokens, visual, fused_loss)


def run_micro_batches(
    work: Work, batch: Batch, tokens: Sequence[Tensor], visual: VisualTokens | NoVideos, loss_of: Loss
) -> float:
    total = 0.0
    for micro_batch in plan(work, batch).micro_batches:
        out = loss_of(work, batch, micro_batch, tokens)
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


def padded_micro_batches(work: Work) -> list[slice]:
    """As many prompts as have, with all their padded rows, no more places than a micro-batch; one at least."""
    case = work.case
    places = case.num_generations * (case.prompt_length + max(work.batch.lengths))
    number = max(1, case.max_tokens // places)
    return [slice(i, min(i + number, case.num_prompts)) for i in range(0, case.num_prompts, number)]


def train_padded(work: Work, visual: VisualTokens | NoVideos) -> float:
    """Every completion a padded row behind its own prompt; the head is fused with the loss."""
    total = 0.0
    for prompts in padded_micro_batches(work):
        rows = work.rows_of(prompts)
        ids, mask = padded(work, rows)
        hidden = padded_states(work.model, work.batch.prompt_ids[prompts], visual.tokens[prompts], ids, mask)
        hidden = hidden[:, -ids.shape[1] :]
        out = linear_grpo_loss(hidden, work.model.head[0], ids, **loss_arguments(work, rows, mask))
        out.loss.backward()
        total += out.loss.item()
    visual.backward()
    return total


def padded(work: Work, rows: slice) -> tuple[Tensor, Tensor]:
    """Completions and their mask, cut at the longest of the rows."""
    longest = max(work.batch.lengths[rows])
    rollout = work.batch.rollout
    return rollout.completion_ids[rows, :longest], rollout.completion_mask[rows, :longest]


def loss_arguments(work: Work, rows: slice, mask: Tensor) -> dict[str, Any]:
    batch = work.batch
    ref_logps = None if batch.ref_logps is None else batch.ref_logps[rows, : mask.shape[1]]
    given = {"mask": mask, "advantages": batch.advantages[rows], "ref_logps": ref_logps}
    return {**given, "normalizer": work.normalizer, "return_entropy": True, "options": options(work)}


def padded_states(
    model: VideoLanguageModel, prompt_ids: Sequence[Tensor], tokens: Sequence[Tensor], ids: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states (R, P + T - 1, D), the last T of which predict the completions (R, T): transformers' own forward,
    nothing shared. As many prompts as rows, or each for its group."""
    embeds, prompt_mask = model.embed_prompts(prompt_ids, tokens)
    repeats = ids.shape[0] // len(prompt_ids)
    rows = [embeds.repeat_interleave(repeats, dim=0), model.decoder.embed_tokens(ids)[:, :-1]]
    mask = torch.cat([prompt_mask.repeat_interleave(repeats, dim=0), mask[:, :-1].long()], dim=1)
    inputs: dict[str, Any] = {"inputs_embeds": torch.cat(rows, dim=1), "attention_mask": mask, "use_cache": False}
    hidden: Tensor = model.decoder(**inputs, position_ids=model.positions(mask)).last_hidden_state
    return hidden


def before_logits(
    model: VideoLanguageModel, prompt_ids: Sequence[Tensor], videos: Sequence[Tensor], ids: Tensor, mask: Tensor
) -> Tensor:
    """Logits (R, T, V) as at commit 2c9de69: the prompts' cache is copied for every completion, which are padded; the
    connector runs here."""
    tokens = model.visual_tokens(videos) if videos else NoVideos(model, len(prompt_ids)).tokens
    embeds, prompt_mask = model.embed_prompts(prompt_ids, tokens)
    group = ids.shape[0] // len(prompt_ids)
    cache, last = model.prefill(embeds, prompt_mask, group)
    if ids.shape[1] == 1:
        return model.project(last)
    whole = torch.cat([prompt_mask.repeat_interleave(group, dim=0), mask.long()], dim=1)
    hidden = model.extend(ids[:, :-1], whole[:, :-1], cache)
    return model.project(torch.cat([last, hidden], dim=1))


def before_micro_batches(work: Work) -> list[slice]:
    """All prompts in one, as the demo had it; one prompt at a time of the full model."""
    number = work.case.num_prompts
    return [slice(0, number)] if work.case.model == "demo" else [slice(i, i + 1) for i in range(number)]


def train_before(work: Work, videos: Sequence[Tensor]) -> float:
    """Without prefix sharing where layers are checkpointed: they keep no cache."""
    total = 0.0
    for prompts in before_micro_batches(work):
        rows = work.rows_of(prompts)
        ids, mask = padded(work, rows)
        given = work.batch.prompt_ids[prompts], videos[prompts]
        logits = (
            unshared_logits(work, *given, ids, mask)
            if work.case.checkpointing
            else before_logits(work.model, *given, ids, mask)
        )
        out = grpo_loss(logits, ids, **loss_arguments(work, rows, mask))
        out.loss.backward()
        total += out.loss.item()
    return total


def unshared_logits(
    work: Work, prompt_ids: Sequence[Tensor], videos: Sequence[Tensor], ids: Tensor, mask: Tensor
) -> Tensor:
    model = work.model
    tokens = model.visual_tokens(videos) if videos else NoVideos(model, len(prompt_ids)).tokens
    return model.project(padded_states(model, prompt_ids, tokens, ids, mask)[:, -ids.shape[1] :])


@torch.no_grad()
def logps_packed(work: Work, tokens: Sequence[Tensor]) -> Tensor:
    """Log-probabilities (B·G, T) of the reference, zeros behind the completions."""
    assert work.reference is not None
    logps = compute_logps(
        work.reference,
        work.batch,
        plan(work, work.batch).micro_batches,
        tokens,
        temperature=1.0,
        check_values=work.model.device.type == "cpu",
    )
    return logps.view(work.batch.rollout.completion_ids.shape)


@torch.no_grad()
def logps_before(work: Work, videos: Sequence[Tensor]) -> Tensor:
    assert work.reference is not None
    found = []
    for prompts in before_micro_batches(work):
        ids, mask = work.batch.rollout.completion_ids, work.batch.rollout.completion_mask
        ids, mask = (x[work.rows_of(prompts)] for x in (ids, mask))
        logits = before_logits(work.reference, work.batch.prompt_ids[prompts], videos[prompts], ids, mask)
        found.append(selective_log_softmax(logits, ids).masked_fill(~mask, 0.0))
    return torch.cat(found)
