"""The loop around an update, shared by GRPO and supervised fine-tuning.

A task supplies the samples and a function for one update; this module supplies the model under DeepSpeed, the order of
samples, clips loaded ahead, evaluation, log, checkpoints, stopping and the exported model.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol

import torch

from fastr1.config import TrainConfig, save_config
from fastr1.data.ledger import BadSampleLedger, LoadedSamples
from fastr1.data.order import SampleOrder
from fastr1.data.questions import load_questions
from fastr1.evaluation.multiple_choice import Evaluator, summarise_answers
from fastr1.models import VideoLanguageModel, load_model, load_processor
from fastr1.reporting.run_log import RunLogger
from fastr1.reporting.statistics import Metrics, mean_metrics
from fastr1.reporting.timing import PhaseTimer, peak_memory_bytes
from fastr1.schema import S, Update
from fastr1.training.agreement import agreement, is_on_every_rank
from fastr1.training.checkpoint import LAST, CheckpointError, find_last_checkpoint, load_checkpoint
from fastr1.training.distributed import DistributedModel, launched_world_size
from fastr1.training.export import export_model
from fastr1.training.keeper import Keeper
from fastr1.training.run_folder import refuse_used_folder
from fastr1.training.stop import RESUME, SAVING, StopRequest, machine_id, process_id
from fastr1.video import ClipPrefetcher, VideoError, describe_backend, load_pixels

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
Step = Callable[[Update[S]], tuple[Metrics, Rows]]  # the metrics hold "num_tokens", the rows are for rollouts.jsonl


@dataclass
class OpenUpdate:
    """An update that was applied but neither evaluated nor logged yet. A checkpoint may hold it."""

    step: int
    metrics: Metrics
    rows: Rows


class SampleLoader(Protocol[S]):
    """`load_questions` or `load_conversations`."""

    def __call__(self, path: str, video_root: str, *, policy: str, max_bad_fraction: float) -> LoadedSamples[S]: ...


class TrainingRun(Generic[S]):
    """Model, processor and samples of a run. Use as a context manager: leaving it releases DeepSpeed.

    Args:
        stop: what listens for signals already, if anything does; else `train` listens while it runs.

    Attributes: config, model, processor, distributed, samples, order, ledger, timer, samples_per_rank (per update).
    """

    def __init__(self, config: TrainConfig, load_samples: SampleLoader[S], stop: StopRequest | None = None) -> None:
        data, optim = config.data, config.optim
        self.config = config
        self.output_dir = Path(config.run.output_dir)
        if config.run.resume_from_checkpoint is None:
            refuse_used_folder(self.output_dir)
        policy, bound = data.policy, data.max_bad_fraction
        loaded = load_samples(data.train_file, data.video_root, policy=policy, max_bad_fraction=bound)
        self.samples: list[S] = loaded.samples
        self.ledger = BadSampleLedger(
            loaded.num_rows, num_bad_rows=len(loaded.bad_rows), policy=policy, max_bad_fraction=bound
        )
        self.processor = load_processor(config.model.path)
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
        self.stop = StopRequest() if stop is None else stop
        self._open: OpenUpdate | None = None
        self._unlogged: list[Metrics] = []

    def __enter__(self) -> TrainingRun[S]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # After an error on one of several ranks the others wait elsewhere: waiting for them here would hang.
        if error is None or self.distributed.world_size == 1 or is_on_every_rank(error):
            self.distributed.close()

    def train(self, step: Step[S]) -> Path:
        """Every remaining update; returns the folder of the exported model, or the checkpoint if asked to stop.

        Raises: what goes wrong, after saving the last finished update where that can be done; the message names it.
        """
        with self.stop.watching():
            start, saved = self._resume()
            keeper = Keeper(self.distributed, self.config.run, self.stop, self._state, step=start, saved=saved)
            try:
                checkpoint = self._train(step, start, keeper)
                if checkpoint is not None:
                    if self.distributed.rank == 0:
                        logger.warning("stopped after update %d of %d: %s", keeper.step, len(self.order), RESUME)
                    return checkpoint
                self.stop.answer = "all updates are done; writing the model"
                export_model(self.distributed, self.model, self.processor, self.output_dir / "final")
                return self.output_dir / "final"
            except Exception as error:
                raised = keeper.rescue(error)
                raise raised from (error.__cause__ if raised is error else error)

    @contextmanager
    def _logging(self, start: int) -> Iterator[RunLogger]:
        """The log of the run, open."""
        log = self._start_log(start)
        try:
            yield log
        except BaseException:
            with suppress(OSError):  # of a full disk once more, in the place of what went wrong
                log.close()
            raise
        with agreement(self.distributed):
            log.close()

    def _start_log(self, start: int) -> RunLogger:
        is_main = self.distributed.rank == 0
        decoder = describe_backend(self.config.data.backend)
        where = f"{self.distributed.device}, {str(self.model.dtype).removeprefix('torch.')}"
        logger.info("%d samples, %d updates on %s; videos: %s", len(self.samples), len(self.order), where, decoder)
        with agreement(self.distributed):
            if is_main:
                save_config(self.config, self.output_dir / "config.json")
            log = RunLogger(self.output_dir, self.config.run.report_to, len(self.order), is_main, start_step=start)
        return log

    def _train(self, step: Step[S], start: int, keeper: Keeper) -> Path | None:
        """Every remaining update; returns the checkpoint if asked to stop before the last."""
        if launched_world_size() > 1:
            ranks = self.distributed.gather_objects((machine_id(), self.distributed.rank, process_id()))
            self.stop.watch_peers([(rank, process) for machine, rank, process in ranks if machine == machine_id()])
        with self._logging(start - (self._open is not None)) as log:  # whose rows may be half written
            self.distributed.barrier()
            self.stop.exits_at_once = False  # from here on ranks wait for each other
            if self._open is not None and (checkpoint := self._conclude(log, keeper)):
                return checkpoint
            for update in self._updates():
                metrics, rows = step(update)
                self._open = OpenUpdate(update.step, metrics, rows)
                keeper.finished(update.step)
                if checkpoint := self._conclude(log, keeper):
                    return checkpoint
        return None

    def _conclude(self, log: RunLogger, keeper: Keeper) -> Path | None:
        """Evaluate, log and save after an update as they are due; returns the checkpoint if asked to stop here."""
        run, update = self.config.run, self._open
        assert update is not None
        is_last = update.step == len(self.order)
        rates: Metrics | None = {}
        if run.eval_steps and update.step % run.eval_steps == 0:
            self.stop.answer = "leaving the evaluation, which is repeated after a resume, then saving"
            rates = self.evaluate()
            self.stop.answer = SAVING
        votes = self.distributed.sum_across_ranks(torch.tensor([float(bool(self.stop)), float(keeper.is_due())]))
        is_stopping, is_due = votes[0].item() > 0, votes.sum().item() > 0
        if rates is not None:
            metrics = {**update.metrics, **rates}
            self._unlogged.append({**metrics, **self._machine_metrics(update.step, metrics["num_tokens"])})
            with agreement(self.distributed):
                if update.step % run.logging_steps == 0 or is_last or is_stopping:
                    log.log(update.step, mean_metrics(self._unlogged))
                    self._unlogged.clear()
                log.log_rollouts(update.step, update.rows)
            self._open = None
            keeper.finished(update.step)
        if is_due:
            with self.timer.phase("checkpoint"):
                checkpoint = keeper.save()
        if is_stopping and (rates is None or not is_last):
            return checkpoint
        return None

    def evaluate(self) -> Metrics | None:
        """Greedy accuracy on the held-out questions, shared among the ranks; None where a stop was asked for
        meanwhile, on any rank."""
        assert self._evaluator is not None
        ranks = self.distributed
        with self.timer.phase("evaluation"), ranks.gathered_parameters(), agreement(ranks):
            share = slice(ranks.rank, None, ranks.world_size)
            mine = self._evaluator.answer(self.model, share=share, is_cancelled=lambda: bool(self.stop))
        everyone = ranks.gather_objects(mine)
        if None in everyone:
            return None
        answers = [answer for answers in everyone for answer in answers]
        return {f"eval/{name}": value for name, value in summarise_answers(answers).items()}

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
        held_out = load_questions(data.eval_file, data.eval_video_root or data.video_root).samples[: run.eval_samples]
        return Evaluator(
            held_out,
            self.processor,
            data,
            batch_size=run.per_device_eval_batch_size,
            max_completion_length=self.config.grpo.max_completion_length,
        )

    def _blank(self) -> torch.Tensor:
        return self.processor.blank_pixels(max(self.config.data.num_frames, 1)).to(self.distributed.device)

    def _load(self, place: tuple[int, int]) -> torch.Tensor | None:
        """The pixels of a sample, or None where its video cannot be decoded and the ledger lets it be skipped. It is
        never another video."""
        sample = self.samples[place[0]]
        try:
            return load_pixels(
                sample.video_path, self.config.data, self.processor.preprocess_frames, self.distributed.device
            )
        except VideoError as error:
            self.ledger.record(sample.origin, str(error))
            return None

    def _places(self) -> Iterator[tuple[int, int]]:
        """(index of the sample, key in the endless stream of samples) of this rank's share of every remaining update:
        contiguous blocks, so that rank order is sample order."""
        first = self.distributed.rank * self.samples_per_rank
        for update in range(self.order.next_update, len(self.order)):
            indices = self.order.indices(update)
            keys = range(update * len(indices), (update + 1) * len(indices))
            yield from list(zip(indices, keys, strict=True))[first : first + self.samples_per_rank]

    def _updates(self) -> Iterator[Update[S]]:
        """This rank's share of every remaining update, its clips loaded ahead."""
        num_threads, depth = self.config.data.num_decode_threads, 2 * self.samples_per_rank
        with ClipPrefetcher(self._load, self._places(), num_threads=num_threads, depth=depth) as clips:
            for update in range(self.order.next_update, len(self.order)):
                with self.timer.phase("decode_wait"), agreement(self.distributed):
                    loaded = list(itertools.islice(clips, self.samples_per_rank))
                assert len(loaded) == self.samples_per_rank
                self.order.next_update = update + 1
                places, pixels = [place for place, _ in loaded], [frames for _, frames in loaded]
                indices, keys = [index for index, _ in places], [key for _, key in places]
                yield Update(update + 1, [self.samples[i] for i in indices], indices, keys, pixels)

    def _machine_metrics(self, step: int, num_tokens: float) -> Metrics:
        """Position in the data, bad samples of all ranks, seconds, tokens per second of training, memory."""
        seconds = self.timer.pop_seconds()
        aside = ("time/step_seconds", "time/evaluation_seconds", "time/checkpoint_seconds")
        # none for an update that was done before a resume
        training_seconds = sum(value for name, value in seconds.items() if name not in aside)
        bad_samples = self.distributed.sum_across_ranks(torch.tensor(float(self.ledger.num_bad_samples)))
        return {
            "epoch": self.order.epoch(step),
            "bad_samples": bad_samples.item(),
            **seconds,
            "tokens_per_second": num_tokens / training_seconds
            if training_seconds
            else math.nan,  # done before a resume
            "peak_memory_bytes": float(peak_memory_bytes(self.distributed.device)),
        }

    def _resume(self) -> tuple[int, Path | None]:
        """Restores everything from the checkpoint named in the configuration, if any: updates done, and its folder."""
        checkpoint = self.config.run.resume_from_checkpoint
        if checkpoint is None:
            return 0, None
        folder = find_last_checkpoint(self.output_dir) if checkpoint == LAST else Path(checkpoint)
        step, state = load_checkpoint(self.distributed, folder, self.output_dir)
        if "order" not in state:
            raise CheckpointError(
                f"checkpoint {checkpoint} has no order of samples: it was written by another version of fastr1; resume "
                "it there, or start a new run from an exported model (model.path)"
            )
        self.order.load_state_dict(state["order"])
        self._open = state.get("open")
        logger.info("resumed from %s at update %d", folder, step)
        return step, folder

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {"order": self.order.state_dict(), "open": self._open}


def load_policy(config: TrainConfig) -> VideoLanguageModel:
    """The model to train, its frozen parts without gradient."""
    settings = config.model
    model = load_model(settings.path, dtype=settings.dtype, attn_implementation=settings.attn_implementation)
    model.freeze(settings.freeze)
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model
