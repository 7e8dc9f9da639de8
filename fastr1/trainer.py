"""GRPO for video language models, top to bottom.

    prompts → clips → vision features → G completions each → rewards → advantages → loss → update

Departures from the textbook: one on-policy update per rollout, so the ratio is 1 and no old log-probabilities are kept;
the denominator of the loss is a global count fixed before the first micro-step, so accumulation, micro-batch size and
number of ranks do not change the objective; the vision tower, frozen by default, runs once per prompt and update, and
each prompt is forwarded once for its G completions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastr1_kernels import group_advantages, grpo_loss, selective_log_softmax
from transformers import PreTrainedTokenizerBase

from fastr1.checkpoint import load_checkpoint, save_checkpoint
from fastr1.config import TrainConfig
from fastr1.config_io import save_config
from fastr1.data.prompts import build_prompt, tokenize_with_image
from fastr1.data.records import BadSampleLedger, load_grpo_samples
from fastr1.data.sampler import PromptSampler
from fastr1.engine import Engine, launched_world_size
from fastr1.evaluate import evaluate_samples, summarise_answers
from fastr1.metrics import PhaseTimer, RunLogger, peak_memory_bytes
from fastr1.models import TinyLlavaVideo
from fastr1.rewards import Scored, Scorer, build_scorer
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.runtime import StopRequest, export_model, load_policy, pixel_loader
from fastr1.schema import Rollout, Sample
from fastr1.video import ClipPrefetcher, describe_backend

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """The prompts of one update that belong to this rank, and what became of them."""

    samples: list[Sample]  # B
    is_valid: torch.Tensor  # (B,) bool; False: the video could not be decoded and the policy is to skip
    prompt_ids: list[torch.Tensor]  # B × (L_i,)
    videos: list[torch.Tensor]  # B × vision features, or pixel values where the tower is trained
    rollout: Rollout  # B·G rows
    scored: Scored  # B·G rows
    advantages: torch.Tensor  # (B·G,)
    loss_mask: torch.Tensor  # (B·G, T) bool
    ref_logps: torch.Tensor | None = None  # (B·G, T)


def run_grpo(config: TrainConfig) -> Path:
    """Train `config.model.path` on `config.data` and write the run folder; returns the folder of the final model."""
    trainer = GRPOTrainer(config)
    try:
        return trainer.train()
    finally:
        trainer.engine.close()


class GRPOTrainer:
    """Holds the parts of a run; `train` is the loop, `step` one update."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output_dir = Path(config.run.output_dir)
        self.scorer: Scorer = build_scorer(config.reward)
        loaded = load_grpo_samples(
            config.data.train_file,
            config.data.video_root,
            policy=config.data.policy,
            max_bad_fraction=config.data.max_bad_fraction,
        )
        self.samples = loaded.samples
        self.ledger = BadSampleLedger(
            loaded.num_rows,
            policy=config.data.policy,
            max_bad_fraction=config.data.max_bad_fraction,
            num_bad_rows=len(loaded.bad_rows),
        )
        self.model, self.tokenizer = load_policy(config)
        self.reference = load_policy(config)[0].requires_grad_(False) if config.grpo.beta else None
        world_size = launched_world_size()
        self.prompts_per_rank = config.optim.per_device_train_batch_size * config.optim.gradient_accumulation_steps
        self.sampler = PromptSampler(
            len(self.samples),
            prompts_per_update=self.prompts_per_rank * world_size,
            seed=config.run.seed,
            num_epochs=config.optim.num_train_epochs,
            max_steps=config.optim.max_steps,
        )
        self.engine = Engine(
            self.model,
            config.optim,
            config.deepspeed,
            dtype=self.model.dtype,
            num_updates=self.sampler.num_updates,
        )
        self.timer = PhaseTimer(self.engine.device)
        self.sampling = SamplingParams(
            config.grpo.max_completion_length, config.grpo.temperature, config.grpo.top_k, config.grpo.top_p
        )
        self.stop = StopRequest()
        self.eval_samples: list[Sample] | None = None

    def train(self) -> Path:
        """Every remaining update, with evaluation and checkpoints on the way, then the exported model."""
        config, run, engine = self.config, self.config.run, self.engine
        start = self._resume()
        if engine.rank == 0:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.output_dir / "config.json")
        logger.info("%d samples, %d updates, video decoding: %s", len(self.samples), len(self.sampler), describe_backend())
        log = RunLogger(self.output_dir, run.report_to, len(self.sampler), engine.rank == 0, start_step=start)
        load = pixel_loader(config.data, self.model.config.vision.image_size, engine.device, self.ledger)
        prefetcher = ClipPrefetcher(
            load,
            self._upcoming_samples(start),
            num_threads=config.data.num_decode_threads,
            depth=2 * self.prompts_per_rank,
        )
        step = start
        with prefetcher as clips, self.stop.handling_signals():
            for indices in self.sampler:
                step = self.sampler.next_update
                metrics, rows = self.step([self.samples[i] for i in self._share_of(indices)], indices, clips, step)
                if run.eval_steps and step % run.eval_steps == 0:
                    metrics.update(self.evaluate())
                log.log(step, metrics)
                log.log_rollouts(step, rows)
                stopping = self.stop.agreed(engine)
                if stopping or (run.save_steps and step % run.save_steps == 0):
                    self._save(step)
                if stopping:
                    break
        log.close()
        if step < len(self.sampler):
            logger.warning("stopped after update %d of %d; resume with run.resume_from_checkpoint=last", step, len(self.sampler))
            return self.output_dir / "checkpoints"
        export_model(engine, self.tokenizer, self.output_dir / "final")
        return self.output_dir / "final"

    def step(
        self, samples: list[Sample], indices: Sequence[int], clips: Iterator[torch.Tensor | None], step: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One update on this rank's `samples`; `indices` are those of all ranks. Returns metrics and rollout rows."""
        with self.timer.phase("decode_wait"):
            pixels = [next(clips) for _ in samples]
        with self.timer.phase("vision"):
            is_valid, videos = self._encode(pixels)
        prompt_ids = [self._tokenize(sample) for sample in samples]
        with self.timer.phase("rollout"), self.engine.gathered_parameters():
            rollout = self._roll_out(prompt_ids, videos, self._share_of(indices), step)
        with self.timer.phase("reward"):
            batch = self._score(samples, is_valid, prompt_ids, videos, rollout, step)
        if self.reference is not None:
            with self.timer.phase("reference"):
                batch.ref_logps = self._score_with_reference(batch)
        metrics = self._update(batch)
        metrics.update(self._summarise(batch))
        return metrics, [] if self.engine.rank else self._rows(batch)

    def evaluate(self) -> dict[str, float]:
        """Greedy accuracy on the held-out questions, shared among the ranks."""
        data, run = self.config.data, self.config.run
        if self.eval_samples is None:
            assert data.eval_file is not None
            loaded = load_grpo_samples(data.eval_file, data.eval_video_root or data.video_root)
            self.eval_samples = loaded.samples[: run.eval_samples]
        rank, world = self.engine.rank, self.engine.world_size
        with self.timer.phase("evaluation"), self.engine.gathered_parameters():
            mine = evaluate_samples(
                self.model,
                self.tokenizer,
                self.eval_samples[rank::world],
                data,
                max_completion_length=self.config.grpo.max_completion_length,
            )
        answers = [answer for answers in self.engine.gather_objects(mine) for answer in answers]
        return {f"eval/{name}": value for name, value in summarise_answers(answers).items()}

    def _resume(self) -> int:
        """Updates already done: restores everything from the checkpoint named in the configuration, if any."""
        checkpoint = self.config.run.resume_from_checkpoint
        if checkpoint is None:
            return 0
        step, state = load_checkpoint(self.engine, checkpoint, self.output_dir)
        self.sampler.load_state_dict(state["sampler"])
        logger.info("resumed from %s at update %d", checkpoint, step)
        return step

    def _save(self, step: int) -> None:
        state = {"sampler": self.sampler.state_dict()}
        save_checkpoint(self.engine, self.output_dir, step, state, save_total_limit=self.config.run.save_total_limit)

    def _share_of(self, indices: Sequence[int]) -> Sequence[int]:
        """This rank's contiguous block of an update's sample indices, so that rank order is prompt order."""
        first = self.engine.rank * self.prompts_per_rank
        return indices[first : first + self.prompts_per_rank]

    def _upcoming_samples(self, start: int) -> Iterator[Sample]:
        for update in range(start, len(self.sampler)):
            yield from (self.samples[i] for i in self._share_of(self.sampler.indices(update)))

    def _tokenize(self, sample: Sample) -> torch.Tensor:
        prompt = build_prompt(sample.problem, instruction=self.config.data.instruction)
        return torch.tensor(tokenize_with_image(prompt, self.tokenizer), device=self.engine.device)

    def _encode(self, pixels: list[torch.Tensor | None]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Vision features per prompt (pixel values where the tower is trained); zeros stand in for a skipped video,
        whose completions count in no loss, reward or metric, so that every rank takes the same number of steps."""
        is_valid = torch.tensor([p is not None for p in pixels])
        size = self.model.config.vision.image_size
        blank = torch.zeros(max(self.config.data.num_frames, 1), 3, size, size, device=self.engine.device)
        filled = [blank if p is None else p for p in pixels]
        if "vision_tower" not in self.config.model.freeze:
            return is_valid, filled
        with torch.no_grad(), self.engine.gathered_parameters():
            return is_valid, [self.model.encode_frames(p) for p in filled]

    def _roll_out(
        self, prompt_ids: list[torch.Tensor], videos: list[torch.Tensor], keys: Sequence[int], step: int
    ) -> Rollout:
        self.model.eval()
        rollout = sample_completions(
            self.model,
            self.tokenizer,
            prompt_ids,
            videos,
            self.sampling,
            num_generations=self.config.grpo.num_generations,
            seed=self.config.run.seed * 1_000_003 + step,
            prompt_keys=keys,
        )
        self.model.train()
        return rollout

    def _score(
        self,
        samples: list[Sample],
        is_valid: torch.Tensor,
        prompt_ids: list[torch.Tensor],
        videos: list[torch.Tensor],
        rollout: Rollout,
        step: int,
    ) -> Batch:
        """Rewards of this rank's completions, and advantages from the rewards of all ranks."""
        grpo = self.config.grpo
        repeated = [sample for sample in samples for _ in range(grpo.num_generations)]
        scored = self.scorer.score(rollout.texts, repeated)
        row_valid = is_valid.repeat_interleave(grpo.num_generations)
        rewards = torch.tensor(scored.rewards).masked_fill(~row_valid, torch.nan)  # NaN: takes no part in statistics
        everyone = torch.cat(self.engine.gather_objects(rewards))
        advantages = group_advantages(
            everyone,
            grpo.num_generations,
            scale_rewards=grpo.scale_rewards,
            eps=grpo.advantage_eps,
            leave_one_out=grpo.leave_one_out,
            noise_std=grpo.advantage_noise_std,
            generator=torch.Generator().manual_seed(self.config.run.seed + step),
        )
        mine = advantages.chunk(self.engine.world_size)[self.engine.rank].to(self.engine.device)
        loss_mask = rollout.completion_mask & row_valid.to(self.engine.device)[:, None]
        if grpo.mask_truncated_completions:
            loss_mask = loss_mask & ~rollout.is_truncated[:, None]
        return Batch(samples, is_valid, prompt_ids, videos, rollout, scored, mine, loss_mask)

    @torch.no_grad()
    def _score_with_reference(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities (B·G, T) of the completions under the frozen initial model."""
        reference, ids = self.reference, batch.rollout.completion_ids
        assert reference is not None
        rows = []
        for prompts, completions in self._micro_batches(len(batch.samples)):
            logits = reference(
                batch.prompt_ids[prompts], batch.videos[prompts], ids[completions], batch.rollout.completion_mask[completions]
            )
            rows.append(selective_log_softmax(logits, ids[completions], temperature=self.config.grpo.temperature))
        return torch.cat(rows)

    def _update(self, batch: Batch) -> dict[str, float]:
        """Forward and backward per micro-batch, then one optimizer step. Sums over micro-batches and ranks equal the
        loss of the whole update, because the denominator is fixed here."""
        grpo, ids = self.config.grpo, batch.rollout.completion_ids
        normalizer = self._normalizer(batch)
        sums: dict[str, torch.Tensor] = {}
        with self.timer.phase("train"):
            for prompts, completions in self._micro_batches(len(batch.samples)):
                logits = self.engine(
                    batch.prompt_ids[prompts],
                    batch.videos[prompts],
                    ids[completions],
                    batch.rollout.completion_mask[completions],
                    share_prefix=not self.config.model.gradient_checkpointing,
                )
                out = grpo_loss(
                    logits,
                    ids[completions],
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
                self.engine.backward(out.loss)
                gap = (out.logps - batch.rollout.sampler_logps[completions]).abs() * batch.loss_mask[completions]
                parts = {**out.metrics, "sampler_gap": (gap.sum(), batch.loss_mask[completions].sum())}
                parts["loss"] = (out.loss.detach(), torch.zeros_like(out.loss))
                for name, pair in parts.items():
                    sums[name] = sums.get(name, 0) + torch.stack([x.double() for x in pair])
        with self.timer.phase("optimizer"):
            learning_rate = self.engine.learning_rate
            grad_norm = self.engine.step()
        names = sorted(sums)
        totals = self.engine.sum_across_ranks(torch.stack([sums[name] for name in names])).tolist()
        means = {name: total / (1.0 if name == "loss" else max(count, 1.0)) for name, (total, count) in zip(names, totals, strict=True)}
        return {**means, "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _micro_batches(self, num_prompts: int) -> Iterator[tuple[slice, slice]]:
        """Slices of prompts and of their completions, `per_device_train_batch_size` prompts each."""
        size, group = self.config.optim.per_device_train_batch_size, self.config.grpo.num_generations
        for start in range(0, num_prompts, size):
            yield slice(start, start + size), slice(start * group, (start + size) * group)

    def _normalizer(self, batch: Batch) -> float:
        """The global denominator: loss tokens for dapo and bnpo, completions for the other losses."""
        by_tokens = self.config.grpo.loss_type in ("dapo", "bnpo")
        local = batch.loss_mask.sum() if by_tokens else batch.is_valid.sum() * self.config.grpo.num_generations
        return self.engine.sum_across_ranks(local.double()).item()

    def _summarise(self, batch: Batch) -> dict[str, float]:
        """Rewards, lengths and speed over the valid completions of all ranks."""
        group = self.config.grpo.num_generations
        valid = batch.is_valid.repeat_interleave(group)
        lengths = batch.rollout.completion_mask.sum(dim=1).cpu()
        columns = {
            "reward": torch.tensor(batch.scored.rewards),
            **{f"rewards/{name}": torch.tensor(values) for name, values in batch.scored.parts.items()},
            "completion_length": lengths.float(),
            "completion_clipped_ratio": batch.rollout.is_truncated.cpu().float(),
            "advantage_abs": batch.advantages.cpu().abs(),
        }
        gathered = self.engine.gather_objects((valid, columns))
        valid = torch.cat([v for v, _ in gathered])
        merged = {name: torch.cat([c[name] for _, c in gathered])[valid] for name in columns}
        if not len(merged["reward"]):
            raise ValueError("no video of this update could be decoded; see data.policy and the warnings above")
        metrics = {name: values.mean().item() for name, values in merged.items()}
        groups = merged["reward"].reshape(-1, group)
        metrics["reward_std"] = groups.std(dim=1).mean().item()
        metrics["frac_reward_zero_std"] = (groups.max(1).values == groups.min(1).values).float().mean().item()
        metrics["completion_length_max"] = merged["completion_length"].max().item()
        metrics["epoch"] = self.sampler.epoch(self.sampler.next_update)
        metrics["bad_samples"] = float(self.ledger.num_bad_samples)
        metrics.update(self.timer.pop_seconds())
        metrics["tokens_per_second"] = merged["completion_length"].sum().item() / metrics["time/step_seconds"]
        metrics["peak_memory_bytes"] = float(peak_memory_bytes(self.engine.device))
        return metrics

    def _rows(self, batch: Batch) -> list[dict[str, Any]]:
        group = self.config.grpo.num_generations
        rows = []
        for i, text in enumerate(batch.rollout.texts):
            sample = batch.samples[i // group]
            rows.append(
                {
                    "sample_id": sample.sample_id,
                    "video": str(sample.video_path),
                    "question": sample.problem,
                    "solution": sample.solution,
                    "completion": text,
                    "reward": batch.scored.rewards[i],
                    "rewards": {name: values[i] for name, values in batch.scored.parts.items()},
                    "advantage": batch.advantages[i].item(),
                    "valid": bool(batch.is_valid[i // group]),
                }
            )
        return rows
