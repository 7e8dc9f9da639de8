"""GRPO for video language models, top to bottom.

    prompts → clips → vision features → G completions each → rewards → advantages → loss → update

Departures from the textbook: one on-policy update per rollout, so the ratio is 1 and no old log-probabilities are kept;
the denominator of the loss is a global count fixed before the first micro-step, so accumulation, micro-batch size and
number of ranks do not change the objective; the vision tower, frozen by default, runs once per prompt and update; a
prompt is forwarded once for its G completions (with gradient checkpointing, once for each).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastr1.config import TrainConfig, loss_options
from fastr1.data.bad_samples import BAD_SAMPLES_FILE
from fastr1.data.questions import load_questions
from fastr1.models.texts import prompt_ids
from fastr1.reporting.statistics import Metrics, TokenSums, rollout_rows, summarise_rollout
from fastr1.rewards import build_scorer
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.schema import Batch, DataError, Rollout, Sample, Update
from fastr1.training.agreement import agreement, on_every_rank
from fastr1.training.loop import Rows, TrainingRun, load_policy
from fastr1.training.stop import StopRequest
from fastr1_kernels import GRPOOutput, group_advantages, grpo_loss, selective_log_softmax


def run_grpo(config: TrainConfig, stop: StopRequest | None = None) -> Path:
    """Train `config.model.path` with GRPO and write the run folder. `stop` listens for signals already.

    Returns: the folder of the exported model, or the checkpoint where a signal stopped the run early.
    """
    with prepare_grpo(config, stop) as run, closing(GRPOTrainer(run)) as trainer:
        return run.train(trainer.step)


def prepare_grpo(config: TrainConfig, stop: StopRequest | None = None) -> TrainingRun[Sample]:
    """The run before a model is built; making it checks all that it will need."""
    return TrainingRun[Sample](config, load_questions, prompt_ids, stop)


class GRPOTrainer:
    """One GRPO update after another; `step` tells the story, the other methods are its chapters."""

    def __init__(self, run: TrainingRun[Sample]) -> None:
        self.run = run
        self.config = run.config
        self.grpo = run.config.grpo
        self.distributed = run.distributed
        self.timer = run.timer
        self.scorer = build_scorer(run.config.reward)
        self.loss_options = loss_options(self.grpo)
        # Ids and masks come from the rollout and are right; looking at their values would wait for a GPU.
        self.waits_cost = self.distributed.device.type != "cpu"
        self.reference = load_policy(run.config).requires_grad_(False) if self.grpo.beta else None
        self.sampling = SamplingParams(
            self.grpo.max_completion_length, self.grpo.temperature, self.grpo.top_k, self.grpo.top_p
        )

    def step(self, update: Update[Sample]) -> tuple[Metrics, Rows]:
        """One update on this rank's share of the prompts. Returns metrics of all ranks and this rank's rollout rows."""
        prompt_ids = [self.run.tokens[i].to(self.distributed.device) for i in update.indices]
        with self.distributed.gathered_parameters():
            with self.timer.phase("vision"):
                videos = self.run.encode(update.pixels)
            with self.timer.phase("rollout"):
                rollout = self._roll_out(prompt_ids, videos, update.keys)
        with self.timer.phase("reward"):
            batch = self._score(update, prompt_ids, videos, rollout)
        if self.reference is not None:
            with self.timer.phase("reference"):
                batch.ref_logps = self._compute_ref_logps(batch)
        with self.timer.phase("train"):
            sums = self._accumulate_gradients(batch)
        with self.timer.phase("optimizer"):
            learning_rate = self.distributed.learning_rate
            grad_norm = self.distributed.step()
        metrics = {
            **sums.means(self.distributed),
            **summarise_rollout(self.distributed, batch),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }
        return metrics, rollout_rows(batch)

    def close(self) -> None:
        """End what the reward functions run in."""
        self.scorer.close()

    def _roll_out(self, prompt_ids: list[torch.Tensor], videos: list[torch.Tensor], keys: list[int]) -> Rollout:
        model = self.run.model.eval()  # in training mode, gradient checkpointing would switch the cache off
        rollout = sample_completions(
            model,
            self.run.processor,
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
        grpo, device = self.grpo, self.distributed.device
        with agreement(self.distributed):
            scored = self.scorer.score(rollout.texts, [s for s in update.samples for _ in range(grpo.num_generations)])
        is_valid = update.is_valid
        row_valid = is_valid.repeat_interleave(grpo.num_generations)
        # NaN: takes no part in the statistics.
        rewards = torch.tensor(scored.rewards, dtype=torch.float64).masked_fill(~row_valid, torch.nan)
        everyone = torch.cat(self.distributed.gather_objects(rewards))
        if everyone.isnan().all():
            error = DataError(
                f"update {update.step}: no video could be decoded, the first is {update.samples[0].video_path}; repair "
                f"the videos, {self.run.output_dir / BAD_SAMPLES_FILE} has the reasons"
            )
            raise on_every_rank(error)
        advantages = group_advantages(
            everyone,
            grpo.num_generations,
            scale_rewards=grpo.scale_rewards,
            eps=grpo.advantage_eps,
            leave_one_out=grpo.leave_one_out,
            noise_std=grpo.advantage_noise_std,
            generator=torch.Generator().manual_seed(self.config.run.seed + update.step),
        )
        mine = advantages.chunk(self.distributed.world_size)[self.distributed.rank].to(device, torch.float32)
        loss_mask = rollout.completion_mask & row_valid.to(device)[:, None]
        if grpo.mask_truncated_completions:
            loss_mask = loss_mask & ~rollout.is_truncated[:, None]
        return Batch(update.samples, prompt_ids, videos, is_valid, rollout, scored, mine, loss_mask)

    @torch.no_grad()
    def _compute_ref_logps(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities (B·G, T) of the completions under the frozen initial model."""
        rows, temperature = [], self.grpo.temperature
        for prompts, completions in self._micro_batches(batch):
            logits = self._forward(self.reference, batch, prompts, completions, share_prefix=True)
            ids = batch.rollout.completion_ids[completions]
            rows.append(selective_log_softmax(logits, ids, temperature=temperature, check_values=not self.waits_cost))
        return torch.cat(rows)

    def _accumulate_gradients(self, batch: Batch) -> TokenSums:
        """Forward and backward of every micro-batch. Sums over micro-batches and ranks equal the loss of the whole
        update, because the denominator is fixed before the first of them."""
        normalizer = self._normalizer(batch)
        sums = TokenSums()
        for prompts, completions in self._micro_batches(batch):
            share_prefix = not self.config.model.gradient_checkpointing
            logits = self._forward(self.distributed, batch, prompts, completions, share_prefix)
            out = self._compute_loss(logits, batch, completions, normalizer)
            self.distributed.backward(out.loss)
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
        return grpo_loss(
            logits,
            batch.rollout.completion_ids[completions],
            mask=batch.loss_mask[completions],
            advantages=batch.advantages[completions],
            ref_logps=None if batch.ref_logps is None else batch.ref_logps[completions],
            normalizer=normalizer,
            check_values=not self.waits_cost,
            options=self.loss_options,
        )

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[slice, slice]]:
        """Slices of prompts and of their completions."""
        group = self.grpo.num_generations
        for prompts in self.run.micro_batches(len(batch.prompt_ids)):
            yield prompts, slice(prompts.start * group, prompts.stop * group)

    def _normalizer(self, batch: Batch) -> float:
        """The global denominator, of what the loss counts: its loss tokens or its completions; at least 1."""
        if self.loss_options.loss.counts == "tokens":
            local = batch.loss_mask.sum()
        else:
            local = batch.is_valid.sum() * self.grpo.num_generations
        return max(self.distributed.sum_across_ranks(local.double()).item(), 1.0)
