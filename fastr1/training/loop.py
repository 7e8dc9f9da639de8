"""The loop around an update, shared by GRPO and supervised fine-tuning.

A task supplies the samples and a function for one update; this module supplies the model under DeepSpeed, the order of
samples, clips loaded ahead, evaluation, log, checkpoints, stopping and the exported model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol

import torch

from fastr1.config import DataConfig, TrainConfig, save_config
from fastr1.data.ledger import BadRow, BadSampleLedger, LoadedSamples, tokenize_samples
from fastr1.data.order import SampleOrder
from fastr1.data.questions import load_questions
from fastr1.evaluation.multiple_choice import Evaluator, summarise_answers
from fastr1.models import Processor, VideoLanguageModel, load_model, load_processor
from fastr1.reporting.run_log import METRICS_FILE, RunLogger
from fastr1.reporting.statistics import Metrics, mean_metrics
from fastr1.reporting.timing import PhaseTimer, peak_memory_bytes
from fastr1.schema import DataError, S, Update
from fastr1.training.bad_data import BadData
from fastr1.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastr1.training.distributed import DistributedModel, launched_world_size
from fastr1.training.export import export_model
from fastr1.training.stop import StopRequest
from fastr1.video import ClipPrefetcher, VideoError, describe_backend, load_pixels

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
Step = Callable[[Update[S]], tuple[Metrics, Rows]]  # the metrics hold "num_tokens", the rows are for rollouts.jsonl
Tokenize = Callable[[Processor, DataConfig, S], Any]  # raises DataError where a text does not fit into the model


class SampleLoader(Protocol[S]):
    """`load_questions` or `load_conversations`."""

    def __call__(self, path: str, video_root: str, *, policy: str, max_bad_fraction: float) -> LoadedSamples[S]: ...


class TrainingRun(Generic[S]):
    """Model, processor and samples of a run. Use as a context manager: leaving it releases DeepSpeed.

    Attributes: config, model, processor, distributed, samples, tokens (what `tokenize` made of each sample), order,
    bad_data, timer, samples_per_rank (per update).
    """

    def __init__(self, config: TrainConfig, load_samples: SampleLoader[S], tokenize: Tokenize[S]) -> None:
        data, optim = config.data, config.optim
        self.config = config
        self.output_dir = Path(config.run.output_dir)
        if config.run.resume_from_checkpoint is None:
            _refuse_used_folder(self.output_dir)
        policy, bound = data.policy, data.max_bad_fraction
        read = load_samples(data.train_file, data.video_root, policy=policy, max_bad_fraction=bound)
        self.processor = load_processor(config.model.path)
        # All of them now: a text that is too long is known before the first update, not hours into the run.
        loaded, self.tokens = tokenize_samples(
            read, lambda sample: tokenize(self.processor, data, sample), policy=policy, max_bad_fraction=bound
        )
        self.samples: list[S] = loaded.samples
        self._evaluator = self._build_evaluator()
        self.model = load_policy(config)
        self.samples_per_rank = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
        self.order = SampleOrder(
            len(self.samples),
            prompts_per_update=self.samples_per_rank * launched_world_size(),
            seed=config.run.seed,
            num_epochs=optim.num_train_epochs,
            max_steps=optim.max_steps,
        )
        self.distributed = DistributedModel(
            self.model, optim, config.deepspeed, dtype=self.model.dtype, num_updates=self.order.num_updates
        )
        self.model.train()
        self.timer = PhaseTimer(self.distributed.device)
        ledger = BadSampleLedger(loaded, policy=policy, max_bad_fraction=bound)
        eval_ledger = None if self._evaluator is None else self._evaluator.ledger
        self.bad_data = BadData(self.distributed, self.output_dir, ledger, eval_ledger)

    def __enter__(self) -> TrainingRun[S]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # After an error on one of several ranks the others wait elsewhere: waiting for them here would hang.
        if kind is None or self.distributed.world_size == 1:
            self.distributed.close()

    def train(self, step: Step[S]) -> Path:
        """Every remaining update; returns the folder of the exported model, or the checkpoint if asked to stop."""
        run, stop = self.config.run, StopRequest()
        start = self._resume()
        is_main = self.distributed.rank == 0
        if is_main:
            save_config(self.config, self.output_dir / "config.json")
        self.bad_data.begin()
        decoder = describe_backend(self.config.data.backend)
        where = f"{self.distributed.device}, {str(self.model.dtype).removeprefix('torch.')}"
        logger.info("%d samples, %d updates on %s; videos: %s", len(self.samples), len(self.order), where, decoder)
        log = RunLogger(self.output_dir, run.report_to, len(self.order), is_main, start_step=start)
        unlogged: list[Metrics] = []
        with stop.handling_signals():
            for update in self._updates():
                # with nothing to train on, the update passes without a step of the optimizer
                metrics, rows = ({"num_tokens": 0.0}, []) if update.is_lost else step(update)
                is_last = update.step == len(self.order)
                if run.eval_steps and update.step % run.eval_steps == 0:
                    metrics.update(self.evaluate())
                unlogged.append({**metrics, **self._machine_metrics(update.step, metrics["num_tokens"])})
                is_stopping = stop.agreed(self.distributed)
                if update.step % run.logging_steps == 0 or is_last or is_stopping:
                    bad_samples = float(self.bad_data.num_bad)  # a count is not averaged over updates
                    log.log(update.step, {**mean_metrics(unlogged), "bad_samples": bad_samples})
                    unlogged.clear()
                log.log_rollouts(update.step, rows)
                if is_stopping or (run.save_steps and update.step % run.save_steps == 0):
                    checkpoint = self._save(update.step)
                if is_stopping and not is_last:
                    log.close()
                    logger.warning("stopped; go on with run.resume_from_checkpoint=%s", checkpoint)
                    return checkpoint
        log.close()
        export_model(self.distributed, self.model, self.processor, self.config, self.output_dir / "final")
        return self.output_dir / "final"

    def evaluate(self) -> Metrics:
        """Greedy accuracy on the held-out questions, shared among the ranks."""
        evaluator, ranks = self._evaluator, self.distributed
        assert evaluator is not None
        with self.timer.phase("evaluation"), ranks.gathered_parameters():
            mine = evaluator.answer(self.model, share=slice(ranks.rank, None, ranks.world_size))
        shares = ranks.gather_objects(mine)
        failures = [bad for _, failures in shares for bad in failures]
        self.bad_data.note("evaluation", self.order.next_update, failures)
        summary = summarise_answers([answer for answers, _ in shares for answer in answers], evaluator.num_rows)
        return {f"eval/{name}": value for name, value in summary.items()}

    def encode(self, pixels: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Vision features per sample, or pixel values where the tower is trained and the forward encodes them.

        Blank frames stand in for a skipped video, whose sample must count in no loss or metric, so that every rank
        takes the same number of steps. Call it inside `distributed.gathered_parameters()`.
        """
        filled = [self._blank() if frames is None else frames for frames in pixels]
        if "vision_tower" not in self.config.model.freeze:
            return filled
        with torch.no_grad():
            return [self.model.encode(frames) for frames in filled]

    def micro_batches(self, num_samples: int) -> Iterator[slice]:
        """Slices of `per_device_train_batch_size` samples."""
        size = self.config.optim.per_device_train_batch_size
        for start in range(0, num_samples, size):
            yield slice(start, start + size)

    def _build_evaluator(self) -> Evaluator | None:
        data, run = self.config.data, self.config.run
        if not run.eval_steps:
            return None
        assert data.eval_file is not None
        held_out = load_questions(
            data.eval_file,
            data.eval_video_root or data.video_root,
            policy=data.policy,
            max_bad_fraction=data.max_bad_fraction,
            limit=run.eval_samples,
        )
        return Evaluator(
            held_out,
            self.processor,
            data,
            batch_size=run.per_device_eval_batch_size,
            max_completion_length=self.config.grpo.max_completion_length,
        )

    def _blank(self) -> torch.Tensor:
        return self.processor.blank_pixels(max(self.config.data.num_frames, 1)).to(self.distributed.device)

    def _load(self, place: tuple[int, int]) -> torch.Tensor | BadRow:
        """The pixels of a sample, or why its video cannot be decoded. It is never another video."""
        sample = self.samples[place[0]]
        try:
            return load_pixels(
                sample.video_path, self.config.data, self.processor.preprocess_frames, self.distributed.device
            )
        except VideoError as error:
            return BadRow(sample.origin, error.problem)

    def _places(self) -> Iterator[tuple[int, int]]:
        """(index of the sample, key in the endless stream of samples) of this rank's share of every remaining update:
        contiguous blocks, so that rank order is sample order."""
        first = self.distributed.rank * self.samples_per_rank
        for update in range(self.order.next_update, len(self.order)):
            indices = self.order.indices(update)
            keys = range(update * len(indices), (update + 1) * len(indices))
            yield from list(zip(indices, keys, strict=True))[first : first + self.samples_per_rank]

    def _updates(self) -> Iterator[Update[S]]:
        """This rank's share of every remaining update, its clips loaded ahead. What failed counts when it is due."""
        num_threads, depth = self.config.data.num_decode_threads, 2 * self.samples_per_rank
        with ClipPrefetcher(self._load, self._places(), num_threads=num_threads, depth=depth) as clips:
            for update in range(self.order.next_update, len(self.order)):
                with self.timer.phase("decode_wait"):
                    loaded = list(itertools.islice(clips, self.samples_per_rank))
                    mine = [result for _, result in loaded if isinstance(result, BadRow)]
                    failures = [bad for share in self.distributed.gather_objects(mine) for bad in share]
                assert len(loaded) == self.samples_per_rank
                self.bad_data.note("training", update + 1, failures)
                self.order.next_update = update + 1
                places = [place for place, _ in loaded]
                pixels = [None if isinstance(result, BadRow) else result for _, result in loaded]
                indices, keys = [index for index, _ in places], [key for _, key in places]
                is_lost = len(failures) == self.order.prompts_per_update
                yield Update(update + 1, [self.samples[i] for i in indices], indices, keys, pixels, is_lost)

    def _machine_metrics(self, step: int, num_tokens: float) -> Metrics:
        """Position in the data, seconds, tokens per second of training, memory."""
        seconds = self.timer.pop_seconds()
        aside = ("time/step_seconds", "time/evaluation_seconds", "time/checkpoint_seconds")
        training_seconds = sum(value for name, value in seconds.items() if name not in aside)
        return {
            "epoch": self.order.epoch(step),
            **seconds,
            "tokens_per_second": num_tokens / training_seconds,
            "peak_memory_bytes": float(peak_memory_bytes(self.distributed.device)),
        }

    def _resume(self) -> int:
        """Updates already done: restores everything from the checkpoint named in the configuration, if any."""
        checkpoint = self.config.run.resume_from_checkpoint
        if checkpoint is None:
            return 0
        step, state = load_checkpoint(self.distributed, checkpoint, self.output_dir)
        if not {"order", "bad_samples"} <= state.keys():
            raise CheckpointError(
                f"checkpoint {checkpoint} has no order of samples or no list of bad ones: it was written by another "
                "version of fastr1; resume it there, or start a new run from an exported model (model.path)"
            )
        self.order.load_state_dict(state["order"])
        self.bad_data.load_state_dict(state["bad_samples"])
        logger.info("resumed from %s at update %d", checkpoint, step)
        return step

    def _save(self, step: int) -> Path:
        state = {"order": self.order.state_dict(), "bad_samples": self.bad_data.state_dict(step)}
        limit = self.config.run.save_total_limit
        with self.timer.phase("checkpoint"):
            return save_checkpoint(self.distributed, self.output_dir, step, state, save_total_limit=limit)


def load_policy(config: TrainConfig) -> VideoLanguageModel:
    """The model to train, its frozen parts without gradient."""
    settings = config.model
    model = load_model(settings.path, dtype=settings.dtype, attn_implementation=settings.attn_implementation)
    model.freeze(settings.freeze)
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _refuse_used_folder(folder: Path) -> None:
    """A new run would mix its log and checkpoints with those of the run before it."""
    for name in (METRICS_FILE, "checkpoints", "final"):
        if (folder / name).exists():
            raise DataError(
                f"{folder} holds an earlier run ({name}): choose another run.output_dir, delete that folder, or go on "
                "with run.resume_from_checkpoint=last"
            )
