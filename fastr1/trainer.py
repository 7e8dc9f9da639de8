"""GRPO for video language models, top to bottom.

    prompts → clips → vision features → G completions each → rewards → advantages → loss → update

Departures from the textbook: one on-policy update per rollout, so the ratio is 1 and no old log-probabilities are kept;
the denominator of the loss is a global count fixed before the first micro-step, so accumulation, micro-batch size and
number of ranks do not change the objective; the vision tower, frozen by default, runs once per prompt and update, and
each prompt is forwarded once for its G completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastr1.config import TrainConfig
from fastr1.data.prompts import build_prompt_ids
from fastr1.data.records import load_grpo_samples
from fastr1.loop import Metrics, Rows, TrainingRun, Update
from fastr1.reporting.statistics import TokenSums, rollout_rows, summarise_rollout
from fastr1.rewards import Scored, build_scorer
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.runtime import load_policy
from fastr1.schema import DataError, Rollout, Sample
from fastr1_kernels import GRPOOutput, group_advantages, grpo_loss, selective_log_softmax


@dataclass
class Batch:
    """What became of this rank's share of an update: B prompts, G completions each."""

    prompt_ids: list[torch.Tensor]  # B × (L_i,)
    videos: list[torch.Tensor]  # B × vision features, or pixel values where the tower is trained
    is_valid: torch.Tensor  # (B,) bool on the CPU; False: the video could not be decoded and is skipped
    rollout: Rollout  # B·G rows
    scored: Scored  # B·G rows
    advantages: torch.Tensor  # (B·G,)
    loss_mask: torch.Tensor  # (B·G, T) bool
    ref_logps: torch.Tensor | None = None  # (B·G, T)


def run_grpo(config: TrainConfig) -> Path:
    """Train `config.model.path` with GRPO and write the run folder.

    Returns: the folder of the exported model, or the checkpoint where a signal stopped the run early.
    """
    with TrainingRun[Sample](config, load_grpo_samples) as run:
        return run.train(GRPOTrainer(run).step)


class GRPOTrainer:
    """One GRPO update after another; `step` tells the story, the other methods are its chapters."""

    def __init__(self, run: TrainingRun[Sample]) -> None:
        self.run = run
        self.config = run.config
        self.grpo = run.config.grpo
        self.engine = run.engine
        self.timer = run.timer
        self.scorer = build_scorer(run.config.reward)
        self.reference = load_policy(run.config)[0].requires_grad_(False) if self.grpo.beta else None
        for sample in run.samples:
            self._tokenize(sample)  # a prompt that is too long is an error now, not hours into the run
        self.sampling = SamplingParams(
            self.grpo.max_completion_length, self.grpo.temperature, self.grpo.top_k, self.grpo.top_p
        )

    def step(self, update: Update[Sample]) -> tuple[Metrics, Rows]:
        """One update on this rank's share of the prompts. Returns metrics of all ranks and this rank's rollout rows."""
        prompt_ids = [self._tokenize(sample) for sample in update.samples]
        with self.engine.gathered_parameters():
            with self.timer.phase("vision"):
                videos = self.run.encode(update.pixels)
            with self.timer.phase("rollout"):
                rollout = self._roll_out(prompt_ids, videos, update.keys)
        with self.timer.phase("reward"):
            batch = self._score(update, prompt_ids, videos, rollout)
        if self.reference is not None:
            with self.timer.phase("reference"):
                batch.ref_logps = self._score_with_reference(batch)
        with self.timer.phase("train"):
            sums = self._accumulate_gradients(batch)
        with self.timer.phase("optimizer"):
            learning_rate = self.engine.learning_rate
            grad_norm = self.engine.step()
        judged = (rollout, batch.scored, batch.advantages, batch.is_valid)
        metrics = {
            **sums.means(self.engine),
            **summarise_rollout(self.engine, *judged),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }
        return metrics, rollout_rows(update.samples, *judged)

    def _tokenize(self, sample: Sample) -> torch.Tensor:
        ids = build_prompt_ids(
            sample.problem,
            self.run.tokenizer,
            instruction=self.config.data.instruction,
            max_tokens=self.run.model.config.max_prompt_tokens,
            origin=sample.origin,
        )
        return torch.tensor(ids, device=self.engine.device)

    def _roll_out(self, prompt_ids: list[torch.Tensor], videos: list[torch.Tensor], keys: list[int]) -> Rollout:
        model = self.run.model.eval()  # in training mode, gradient checkpointing would switch the cache off
        rollout = sample_completions(
            model,
            self.run.tokenizer,
            prompt_ids,
            videos,
            self.sampling,
            num_generations=self.grpo.num_generations,
            seed=self.config.run.seed,
            prompt_keys=keys,
        )
        model.train()
        return rollout

    def _score(
        self, update: Update[Sample], prompt_ids: list[torch.Tensor], videos: list[torch.Tensor], rollout: Rollout
    ) -> Batch:
        """Rewards of this rank's completions, and advantages from the rewards of all ranks."""
        grpo, device = self.grpo, self.engine.device
        scored = self.scorer.score(rollout.texts, [s for s in update.samples for _ in range(grpo.num_generations)])
        row_valid = update.is_valid.repeat_interleave(grpo.num_generations)
        # NaN: takes no part in the statistics.
        rewards = torch.tensor(scored.rewards, dtype=torch.float64).masked_fill(~row_valid, torch.nan)
        everyone = torch.cat(self.engine.gather_objects(rewards))
        if everyone.isnan().all():
            raise DataError(
                f"update {update.step}: no video could be decoded, the first is {update.samples[0].video_path}; "
                'repair the videos or set data.policy to "error" to see the reason'
            )
        advantages = group_advantages(
            everyone,
            grpo.num_generations,
            scale_rewards=grpo.scale_rewards,
            eps=grpo.advantage_eps,
            leave_one_out=grpo.leave_one_out,
            noise_std=grpo.advantage_noise_std,
            generator=torch.Generator().manual_seed(self.config.run.seed + update.step),
        )
        mine = advantages.chunk(self.engine.world_size)[self.engine.rank].to(device, torch.float32)
        loss_mask = rollout.completion_mask & row_valid.to(device)[:, None]
        if grpo.mask_truncated_completions:
            loss_mask = loss_mask & ~rollout.is_truncated[:, None]
        return Batch(prompt_ids, videos, update.is_valid, rollout, scored, mine, loss_mask)

    @torch.no_grad()
    def _score_with_reference(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities (B·G, T) of the completions under the frozen initial model."""
        rows = []
        for prompts, completions in self._micro_batches(batch):
            logits = self._forward(self.reference, batch, prompts, completions, share_prefix=True)
            ids = batch.rollout.completion_ids[completions]
            rows.append(selective_log_softmax(logits, ids, temperature=self.grpo.temperature))
        return torch.cat(rows)

    def _accumulate_gradients(self, batch: Batch) -> TokenSums:
        """Forward and backward of every micro-batch. Sums over micro-batches and ranks equal the loss of the whole
        update, because the denominator is fixed before the first of them."""
        normalizer = self._normalizer(batch)
        sums = TokenSums()
        for prompts, completions in self._micro_batches(batch):
            share_prefix = not self.config.model.gradient_checkpointing
            logits = self._forward(self.engine, batch, prompts, completions, share_prefix)
            out = self._compute_loss(logits, batch, completions, normalizer)
            self.engine.backward(out.loss)
            mask = batch.loss_mask[completions]
            gap = (out.logps - batch.rollout.sampler_logps[completions]).abs().masked_fill(~mask, 0.0)
            whole = torch.zeros_like(out.loss)  # the parts of the loss add up; they are not averaged
            sums.add({**out.metrics, "sampler_gap": (gap.sum(), mask.sum()), "loss": (out.loss, whole)})
        return sums

    def _forward(
        self, model: Any, batch: Batch, prompts: slice, completions: slice, share_prefix: bool
    ) -> torch.Tensor:
        """Logits (b·G, T, V) that predict the completion tokens of some of the prompts."""
        rollout = batch.rollout
        return model(
            batch.prompt_ids[prompts],
            batch.videos[prompts],
            rollout.completion_ids[completions],
            rollout.completion_mask[completions],
            share_prefix=share_prefix,
        )

    def _compute_loss(self, logits: torch.Tensor, batch: Batch, completions: slice, normalizer: float) -> GRPOOutput:
        grpo = self.grpo
        return grpo_loss(
            logits,
            batch.rollout.completion_ids[completions],
            mask=batch.loss_mask[completions],
            advantages=batch.advantages[completions],
            ref_logps=None if batch.ref_logps is None else batch.ref_logps[completions],
            loss_type=grpo.loss_type,
            beta=grpo.beta,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon_high,
            delta=grpo.delta,
            importance_sampling_level=grpo.importance_sampling_level,
            temperature=grpo.temperature,
            max_completion_length=grpo.max_completion_length,
            normalizer=normalizer,
        )

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[slice, slice]]:
        """Slices of prompts and of their completions."""
        group = self.grpo.num_generations
        for prompts in self.run.micro_batches(len(batch.prompt_ids)):
            yield prompts, slice(prompts.start * group, prompts.stop * group)

    def _normalizer(self, batch: Batch) -> float:
        """The global denominator: loss tokens for dapo and bnpo, completions for the other losses; at least 1."""
        if self.grpo.loss_type in ("dapo", "bnpo"):
            local = batch.loss_mask.sum()
        else:
            local = batch.is_valid.sum() * self.grpo.num_generations
        return max(self.engine.sum_across_ranks(local.double()).item(), 1.0)
