"""The loop around an update, shared by GRPO and supervised fine-tuning.

A task supplies the samples and a function for one update; this module supplies model, engine, order of samples, clips
loaded ahead, evaluation, log, checkpoints, stopping and the exported model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastr1.checkpoint import load_checkpoint, save_checkpoint
from fastr1.config import TrainConfig, save_config
from fastr1.data.records import BadSampleLedger, LoadedSamples, load_grpo_samples
from fastr1.data.sampler import PromptSampler
from fastr1.engine import Engine, launched_world_size
from fastr1.evaluate import evaluate_samples, summarise_answers
from fastr1.reporting.run_log import METRICS_FILE, PhaseTimer, RunLogger, peak_memory_bytes
from fastr1.runtime import StopRequest, export_model, image_size_of, load_policy, pixel_loader
from fastr1.schema import DataError, Sample, SftSample
from fastr1.video import ClipPrefetcher, describe_backend

logger = logging.getLogger(__name__)

S = TypeVar("S", Sample, SftSample)

Metrics = dict[str, float]
Rows = list[dict[str, Any]]


@dataclass
class Update(Generic[S]):
    """This rank's share of the samples of one update."""

    step: int  # from 1
    samples: list[S]  # B
    keys: list[int]  # B places in the endless stream of samples, which do not depend on the number of ranks
    pixels: list[torch.Tensor | None]  # B × (F, 3, S, S); None: undecodable and to be skipped

    @property
    def is_valid(self) -> torch.Tensor:
        """(B,) bool on the CPU."""
        return torch.tensor([pixels is not None for pixels in self.pixels])


Step = Callable[[Update[S]], tuple[Metrics, Rows]]


class SampleLoader(Protocol[S]):
    """`load_grpo_samples` or `load_sft_samples`."""

    def __call__(self, path: str, video_root: str, *, policy: str, max_bad_fraction: float) -> LoadedSamples[S]: ...


class TrainingRun(Generic[S]):
    """Model, engine and samples of a run. Use as a context manager: leaving it releases the engine.

    Attributes: config, model, tokenizer, engine, samples, sampler, ledger, timer, samples_per_rank (per update).
    """

    def __init__(self, config: TrainConfig, load_samples: SampleLoader[S]) -> None:
        data, optim = config.data, config.optim
        self.config = config
        self.output_dir = Path(config.run.output_dir)
        if config.run.resume_from_checkpoint is None:
            _refuse_used_folder(self.output_dir)
        bad = {"policy": data.policy, "max_bad_fraction": data.max_bad_fraction}
        loaded = load_samples(data.train_file, data.video_root, **bad)  # type: ignore[arg-type]
        self.samples: list[S] = loaded.samples
        self.ledger = BadSampleLedger(loaded.num_rows, num_bad_rows=len(loaded.bad_rows), **bad)  # type: ignore[arg-type]
        self._eval_samples: list[Sample] = []
        if config.run.eval_steps:
            assert data.eval_file is not None
            held_out = load_grpo_samples(data.eval_file, data.eval_video_root or data.video_root)
            self._eval_samples = held_out.samples[: config.run.eval_samples]
        self.model, self.tokenizer = load_policy(config)
        self.samples_per_rank = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
        self.sampler = PromptSampler(
            len(self.samples),
            prompts_per_update=self.samples_per_rank * launched_world_size(),
            seed=config.run.seed,
            num_epochs=optim.num_train_epochs,
            max_steps=optim.max_steps,
        )
        self.engine = Engine(
            self.model, optim, config.deepspeed, dtype=self.model.dtype, num_updates=self.sampler.num_updates
        )
        self.model.train()
        self.timer = PhaseTimer(self.engine.device)

    def __enter__(self) -> TrainingRun[S]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # After an error on one of several ranks the others wait elsewhere: waiting for them here would hang.
        if kind is None or self.engine.world_size == 1:
            self.engine.close()

    def train(self, step: Step[S]) -> Path:
        """Every remaining update; returns the folder of the exported model, or the checkpoint if asked to stop."""
        run, stop = self.config.run, StopRequest()
        start = self._resume()
        if self.engine.rank == 0:
            save_config(self.config, self.output_dir / "config.json")
        decoder = describe_backend(self.config.data.backend)
        logger.info("%d samples, %d updates, video decoding: %s", len(self.samples), len(self.sampler), decoder)
        log = RunLogger(self.output_dir, run.report_to, len(self.sampler), self.engine.rank == 0, start_step=start)
        unlogged: list[Metrics] = []
        with stop.handling_signals():
            for update in self._updates():
                metrics, rows = step(update)
                is_last = update.step == len(self.sampler)
                if run.eval_steps and update.step % run.eval_steps == 0:
                    metrics.update(self.evaluate())
                unlogged.append({**metrics, **self._machine_metrics(update.step, metrics["num_tokens"])})
                is_stopping = stop.agreed(self.engine)
                if update.step % run.logging_steps == 0 or is_last or is_stopping:
                    log.log(update.step, mean_metrics(unlogged))
                    unlogged.clear()
                log.log_rollouts(update.step, rows)
                if is_stopping or (run.save_steps and update.step % run.save_steps == 0):
                    checkpoint = self._save(update.step)
                if is_stopping and not is_last:
                    log.close()
                    logger.warning("stopped; go on with run.resume_from_checkpoint=%s", checkpoint)
                    return checkpoint
        log.close()
        export_model(self.engine, self.tokenizer, self.output_dir / "final")
        return self.output_dir / "final"

    def evaluate(self) -> Metrics:
        """Greedy accuracy on the held-out questions, shared among the ranks."""
        with self.timer.phase("evaluation"), self.engine.gathered_parameters():
            mine = evaluate_samples(
                self.model,
                self.tokenizer,
                self._eval_samples[self.engine.rank :: self.engine.world_size],
                self.config.data,
                max_completion_length=self.config.grpo.max_completion_length,
            )
        answers = [answer for answers in self.engine.gather_objects(mine) for answer in answers]
        return {f"eval/{name}": value for name, value in summarise_answers(answers).items()}

    def encode(self, pixels: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Vision features per sample, or pixel values where the tower is trained and the forward encodes them.

        Zeros stand in for a skipped video, whose sample must count in no loss or metric, so that every rank takes the
        same number of steps. Call it inside `engine.gathered_parameters()`.
        """
        size = image_size_of(self.model)
        blank = torch.zeros(max(self.config.data.num_frames, 1), 3, size, size, device=self.engine.device)
        filled = [blank if frames is None else frames for frames in pixels]
        if "vision_tower" not in self.config.model.freeze:
            return filled
        with torch.no_grad():
            return [self.model.encode_frames(frames) for frames in filled]

    def micro_batches(self, num_samples: int) -> Iterator[slice]:
        """Slices of `per_device_train_batch_size` samples."""
        size = self.config.optim.per_device_train_batch_size
        for start in range(0, num_samples, size):
            yield slice(start, start + size)

    def _updates(self) -> Iterator[Update[S]]:
        """This rank's share of every remaining update: contiguous blocks, so that rank order is sample order."""
        first = self.engine.rank * self.samples_per_rank
        share = slice(first, first + self.samples_per_rank)
        remaining = range(self.sampler.next_update, len(self.sampler))
        upcoming = (self.samples[i] for update in remaining for i in self.sampler.indices(update)[share])
        load = pixel_loader(self.config.data, self.model, self.ledger)
        num_threads, depth = self.config.data.num_decode_threads, 2 * self.samples_per_rank
        with ClipPrefetcher(load, upcoming, num_threads=num_threads, depth=depth) as clips:
            for indices in self.sampler:
                step = self.sampler.next_update
                start = (step - 1) * len(indices)
                with self.timer.phase("decode_wait"):
                    pixels = [next(clips) for _ in indices[share]]
                keys = list(range(start, start + len(indices)))[share]
                yield Update(step, [self.samples[i] for i in indices[share]], keys, pixels)

    def _machine_metrics(self, step: int, num_tokens: float) -> Metrics:
        """Position in the data, bad samples of all ranks, seconds, tokens per second of training, memory."""
        seconds = self.timer.pop_seconds()
        aside = ("time/step_seconds", "time/evaluation_seconds", "time/checkpoint_seconds")
        training_seconds = sum(value for name, value in seconds.items() if name not in aside)
        bad_samples = self.engine.sum_across_ranks(torch.tensor(float(self.ledger.num_bad_samples)))
        return {
            "epoch": self.sampler.epoch(step),
            "bad_samples": bad_samples.item(),
            **seconds,
            "tokens_per_second": num_tokens / training_seconds,
            "peak_memory_bytes": float(peak_memory_bytes(self.engine.device)),
        }

    def _resume(self) -> int:
        """Updates already done: restores everything from the checkpoint named in the configuration, if any."""
        checkpoint = self.config.run.resume_from_checkpoint
        if checkpoint is None:
            return 0
        step, state = load_checkpoint(self.engine, checkpoint, self.output_dir)
        self.sampler.load_state_dict(state["sampler"])
        logger.info("resumed from %s at update %d", checkpoint, step)
        return step

    def _save(self, step: int) -> Path:
        state, limit = {"sampler": self.sampler.state_dict()}, self.config.run.save_total_limit
        with self.timer.phase("checkpoint"):
            return save_checkpoint(self.engine, self.output_dir, step, state, save_total_limit=limit)


def _refuse_used_folder(folder: Path) -> None:
    """A new run would mix its log and checkpoints with those of the run before it."""
    for name in (METRICS_FILE, "checkpoints", "final"):
        if (folder / name).exists():
            raise DataError(
                f"{folder} holds an earlier run ({name}): choose another run.output_dir, delete that folder, or go on "
                "with run.resume_from_checkpoint=last"
            )


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The mean of every metric over the rows that have it."""
    names = {name: None for row in rows for name in row}
    return {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows) for name in names}
