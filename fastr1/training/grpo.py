"""GRPO for video language models, top to bottom.

    prompts → clips → vision features → G completions each → rewards → advantages → packed batch → loss → update

What the speed comes from: vision tower and connector run once per prompt and update (with several steps of the
optimizer the connector, and a trained tower, once more per step), the connector's gradient flows once per step; a
prompt is forwarded and back-propagated once for its completions in a micro-batch, packed behind it without padding;
completions that nothing can be learned from are not forwarded at all; the logits exist a chunk at a time.

What keeps the objective: the denominator of the loss is a global count fixed before the first micro-step, so packing,
accumulation and number of ranks do not change it. With one step of the optimizer per rollout the ratio is 1 and no old
log-probabilities are kept; with several they are computed before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from fastr1.config import TrainConfig, loss_options
from fastr1.data.questions import load_questions
from fastr1.models import VideoLanguageModel
from fastr1.models.family import read_config
from fastr1.models.texts import prompt_ids
from fastr1.reporting.sampler_gap import SamplerGap
from fastr1.reporting.statistics import Metrics, TokenSums, mean_metrics, rollout_rows, summarise_rollout
from fastr1.rewards import build_scorer
from fastr1.rollout import SamplingParams, build_sampler
from fastr1.roofline import GroupWork, StepLimit, StepWork, describe_model, probe_machine
from fastr1.schema import Batch, Rollout, Sample, Update
from fastr1.training.agreement import agreement
from fastr1.training.longest import check_longest
from fastr1.training.loop import Rows, TrainingRun
from fastr1.training.oversampling import choose_groups, groups_with_signal, refill
from fastr1.training.packing import MicroBatch, check_fits
from fastr1.training.passes import OptimizerStep, compute_logps, compute_loss, plan_steps
from fastr1.training.policy import load_policy
from fastr1.training.stop import StopRequest
from fastr1.training.visual import VisualTokens
from fastr1_kernels import GRPOOutput, group_advantages


def run_grpo(config: TrainConfig, stop: StopRequest | None = None) -> Path:
    """Train `config.model.path` with GRPO and write the run folder. `stop` listens for signals already.

    Returns: the folder of the exported model, or the checkpoint where a signal stopped the run early.
    """
    with prepare_grpo(config, stop) as run, closing(GRPOTrainer(run)) as trainer:
        return run.train(trainer.step)


def prepare_grpo(config: TrainConfig, stop: StopRequest | None = None) -> TrainingRun[Sample]:
    """The run before a model is built; making it checks all that it will need."""
    return TrainingRun[Sample](config, load_questions, prompt_ids, stop)


def group_work(batch: Batch, prompt: int) -> GroupWork:
    """What one of the batch's groups costs."""
    group = batch.num_generations
    rows = range(prompt * group, (prompt + 1) * group)
    return GroupWork(
        batch.prompt_lengths[prompt],
        tuple(batch.lengths[row] for row in rows),
        batch.pixel_shapes[prompt],
        trained_lengths=tuple(batch.lengths[row] for row in rows if batch.has_signal[row]),
    )


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
        # Ids and lengths come from the rollout and are right; looking at their values would wait for a GPU.
        self.check_values = self.distributed.device.type == "cpu"
        self.reference = load_policy(run.config).requires_grad_(False) if self.grpo.beta else None
        self.rollout_metrics: Metrics = {}  # of this rank's last rollout
        self.limit: StepLimit | None = None
        if run.config.run.roofline:
            shape = describe_model(run.model, read_config(run.config.model.path))
            self.limit = StepLimit(shape, probe_machine(self.distributed.device, run.model.dtype))
        names = ("max_completion_length", "temperature", "top_k", "top_p", "min_p", "stop_strings")
        params = SamplingParams(**{name: getattr(self.grpo, name) for name in names})
        check_longest(run, [(ids, self.grpo.max_completion_length) for ids in run.tokens])
        self.sample = build_sampler(run.model, run.processor, params, run.config.rollout)

    def step(self, update: Update[Sample]) -> tuple[Metrics, Rows]:
        """One update on this rank's share of the prompts. Returns metrics of all ranks and this rank's rollout rows."""
        batch, visual = self._sample(update)
        batch, dropped = self._replace_groups(update, batch, visual)
        steps = plan_steps(
            batch,
            self.distributed,
            prompts_per_step=self.run.samples_per_step,
            max_tokens=self.config.optim.max_tokens_per_micro_batch,
        )
        if len(steps) * self.grpo.num_iterations > 1:
            with self.timer.phase("old_policy"), self.distributed.gathered_parameters():
                batch.old_logps = self._compute_logps(self.run.model, batch, steps, visual.detached)
        if self.reference is not None:
            with self.timer.phase("reference"):
                # Its connector is the initial one: the tokens are the policy's only where that is frozen.
                tokens = self._connect_reference(visual.videos) if visual.is_trained else visual.detached
                batch.ref_logps = self._compute_logps(self.reference, batch, steps, tokens)
        metrics = {**self._optimize(batch, steps, visual), **summarise_rollout(self.distributed, batch)}
        metrics |= mean_metrics(self.distributed.gather_objects(self.rollout_metrics))
        metrics["extra_groups"] = float(len(dropped) * self.distributed.world_size)
        num_steps = len(steps) * self.grpo.num_iterations
        return {**metrics, **self._distance_to_limit(batch, num_steps, dropped)}, rollout_rows(batch)

    def close(self) -> None:
        """End what the reward functions run in."""
        self.scorer.close()

    def _sample(self, update: Update[Sample]) -> tuple[Batch, VisualTokens]:
        """Videos, completions, rewards and advantages of this rank's prompts. All ranks call it."""
        prompt_ids = [self.run.tokens[i].to(self.distributed.device) for i in update.indices]
        with self.timer.phase("vision"):
            pixels = self.run.fill(update.pixels)
            visual = VisualTokens(self.distributed, self.run.encode(pixels))
        with self.timer.phase("rollout"), self.distributed.gathered_parameters():
            prompt_lengths = self._measure_prompts(update.samples, prompt_ids, visual.detached)
            rollout = self._roll_out(prompt_ids, visual.detached, update.keys)
        with self.timer.phase("reward"):
            shapes = [tuple(frames.shape) for frames in pixels]
            batch = self._score(update, prompt_ids, prompt_lengths, shapes, rollout)
            self._weigh(batch, update.step)
        return batch, visual

    def _replace_groups(
        self, update: Update[Sample], batch: Batch, visual: VisualTokens
    ) -> tuple[Batch, list[GroupWork]]:
        """Further prompts in the place of those whose completions teach nothing, until none is left or the tries are
        used up; and what was drawn in vain, as many groups as were drawn. All ranks draw alike."""
        dropped: list[GroupWork] = []
        for attempt in range(1, self.grpo.max_num_gen_batches):
            missing = max(self.distributed.gather_objects(groups_with_signal(batch).count(False)))
            if missing == 0:
                break
            further = self.run.updates.further(update.step, attempt, missing)
            if further.is_lost:
                continue
            more, more_visual = self._sample(further)
            chosen = choose_groups(groups_with_signal(batch), groups_with_signal(more))
            for source, first in ((batch, 0), (more, len(batch.samples))):
                left = [i for i in range(len(source.samples)) if first + i not in chosen]
                dropped += [replace(group_work(source, i), trained_lengths=()) for i in left]
            batch = refill(batch, more, chosen, self.run.processor.pad_token_id)
            visual.refill(more_visual, chosen)
            self._weigh(batch, update.step)
        return batch, dropped

    def _measure_prompts(
        self, samples: Sequence[Sample], prompt_ids: list[torch.Tensor], visual_tokens: list[torch.Tensor]
    ) -> list[int]:
        """Tokens of every prompt, video included, once it is sure that it can be trained on."""
        grpo, budget = self.grpo, self.config.optim.max_tokens_per_micro_batch
        lengths = self.run.model.prompt_lengths(prompt_ids, visual_tokens)
        with agreement(self.distributed):
            for sample, length in zip(samples, lengths, strict=True):
                check_fits(length, grpo.max_completion_length, budget, origin=sample.origin)
        return lengths

    def _roll_out(self, prompt_ids: list[torch.Tensor], visual_tokens: list[torch.Tensor], keys: list[int]) -> Rollout:
        model = self.run.model.eval()  # in training mode, gradient checkpointing would switch the cache off
        with agreement(self.distributed):
            rollout = self.sample(
                prompt_ids,
                visual_tokens,
                num_generations=self.grpo.num_generations,
                seed=self.config.run.seed,
                prompt_keys=keys,
            )
        model.train()
        self.rollout_metrics = {f"rollout/{name}": value for name, value in rollout.metrics.items()}
        return rollout

    def _score(
        self,
        update: Update[Sample],
        prompt_ids: list[torch.Tensor],
        prompt_lengths: list[int],
        pixel_shapes: list[tuple[int, ...]],
        rollout: Rollout,
    ) -> Batch:
        """Rewards of this rank's completions; their advantages are set by `_weigh`."""
        group = self.grpo.num_generations
        with agreement(self.distributed):
            scored = self.scorer.score(rollout.texts, [s for s in update.samples for _ in range(group)])
        is_counted = torch.tensor(update.is_valid).repeat_interleave(group)
        if self.grpo.mask_truncated_completions:
            is_counted = is_counted & ~rollout.is_truncated.cpu()
        return Batch(
            samples=update.samples,
            prompt_ids=prompt_ids,
            prompt_lengths=prompt_lengths,
            pixel_shapes=pixel_shapes,
            is_valid=update.is_valid,
            rollout=rollout,
            lengths=rollout.completion_mask.sum(dim=1).tolist(),
            scored=scored,
            advantages=torch.zeros(len(rollout.texts), device=self.distributed.device),
            is_counted=is_counted.tolist(),
            has_signal=is_counted.tolist(),
        )

    def _weigh(self, batch: Batch, step: int) -> None:
        """Set advantages, from the rewards of all ranks, and what has a signal."""
        grpo = self.grpo
        is_valid = torch.tensor(batch.is_valid).repeat_interleave(grpo.num_generations)
        # NaN: takes no part in the statistics.
        rewards = torch.tensor(batch.scored.rewards, dtype=torch.float64).masked_fill(~is_valid, torch.nan)
        everyone = torch.cat(self.distributed.gather_objects(rewards))
        advantages = group_advantages(
            everyone,
            grpo.num_generations,
            scale_rewards=grpo.scale_rewards,
            eps=grpo.advantage_eps,
            leave_one_out=grpo.leave_one_out,
            noise_std=grpo.advantage_noise_std,
            generator=torch.Generator().manual_seed(self.config.run.seed + step),
        )
        mine = advantages.chunk(self.distributed.world_size)[self.distributed.rank].to(torch.float32)
        # Every objective is a multiple of the advantage: without KL and bonus there is nothing to learn where it is 0.
        learns_from_all = grpo.beta != 0 or grpo.entropy_coef != 0
        batch.advantages = mine.to(self.distributed.device)
        batch.has_signal = (torch.tensor(batch.is_counted) & ((mine != 0) | learns_from_all)).tolist()

    @torch.no_grad()
    def _connect_reference(self, videos: list[torch.Tensor]) -> list[torch.Tensor]:
        assert self.reference is not None
        return list(self.reference.visual_tokens(videos))

    def _compute_logps(
        self,
        model: VideoLanguageModel,
        batch: Batch,
        steps: list[OptimizerStep],
        visual_tokens: list[torch.Tensor],
    ) -> torch.Tensor:
        """Log-probabilities (B·G·T,) of everything that is trained on, under a model that is not."""
        micro_batches = [
            micro_batch for step in steps for micro_batch in step.micro_batches if not micro_batch.is_blank
        ]
        return compute_logps(
            model,
            batch,
            micro_batches,
            visual_tokens,
            temperature=self.grpo.temperature,
            check_values=self.check_values,
        )

    def _optimize(self, batch: Batch, steps: list[OptimizerStep], visual: VisualTokens) -> Metrics:
        """Every step of the optimizer on this rollout; means of their metrics over the ranks."""
        schedule = steps * self.grpo.num_iterations
        learning_rate = self.distributed.learning_rate
        sums, gap = TokenSums(), SamplerGap(self.distributed.device)
        grad_norms = []
        for number, step in enumerate(schedule):
            with self.timer.phase("train"):
                if number > 0:
                    visual.remake(step.prompts)
                self._accumulate_gradients(batch, step, visual, sums, gap, share=1 / len(schedule))
            with self.timer.phase("optimizer"):
                grad_norms.append(self.distributed.step())
        return {
            **sums.means(self.distributed),
            **gap.metrics(self.distributed),
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "learning_rate": learning_rate,
        }

    def _accumulate_gradients(
        self,
        batch: Batch,
        step: OptimizerStep,
        visual: VisualTokens,
        sums: TokenSums,
        gap: SamplerGap,
        share: float,
    ) -> None:
        """Forward and backward of every micro-batch. Sums over micro-batches and ranks equal the loss of the whole
        step, because the denominator is fixed before the first of them."""
        normalizer = self._normalizer(step)
        for micro_batch in step.micro_batches:
            out = GRPOOutput(*self.distributed(self._loss_of(batch, micro_batch, visual, normalizer)))
            self.distributed.backward(out.loss)
            places = micro_batch.places(batch.rollout.completion_ids.shape[1], out.logps.device)
            places = places[:0] if micro_batch.is_blank else places
            before = out.logps[: len(places)] if batch.old_logps is None else batch.old_logps[places]
            gap.add(before, batch.rollout.full_logps.flatten()[places])
            no_count = torch.zeros_like(out.loss)  # the parts of the loss add up; they are not averaged
            sums.add({**out.metrics, "loss": (out.loss * share, no_count)})
        visual.backward()

    def _loss_of(
        self, batch: Batch, micro_batch: MicroBatch, visual: VisualTokens, normalizer: float
    ) -> Callable[[VideoLanguageModel], GRPOOutput]:
        return lambda model: compute_loss(
            model,
            batch,
            micro_batch,
            visual.tokens,
            normalizer=normalizer,
            options=self.loss_options,
            corrects_sampler=self.grpo.sampler_correction != "none",
            check_values=self.check_values,
        )

    def _distance_to_limit(self, batch: Batch, num_steps: int, dropped: list[GroupWork]) -> Metrics:
        """Of the update's phases so far, mean over the ranks."""
        if self.limit is None:
            return {}
        work = StepWork(
            [*(group_work(batch, i) for i in range(len(batch.samples))), *dropped],
            has_reference=self.reference is not None,
            has_old_policy=batch.old_logps is not None,
            num_iterations=self.grpo.num_iterations,
            num_steps=num_steps,
            is_checkpointed=self.config.model.gradient_checkpointing,
            num_ranks=self.distributed.world_size,
        )
        return mean_metrics(self.distributed.gather_objects(self.limit.metrics(work, self.timer.seconds)))

    def _normalizer(self, step: OptimizerStep) -> float:
        """The global denominator, of what the loss counts: its loss tokens or its completions; at least 1."""
        local = step.num_loss_tokens if self.loss_options.loss.counts == "tokens" else step.num_sequences
        return max(self.distributed.sum_across_ranks(torch.tensor(float(local), dtype=torch.float64)).item(), 1.0)
