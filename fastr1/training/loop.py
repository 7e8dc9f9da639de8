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

from fastr1.config import TrainConfig, save_config
from fastr1.data.ledger import BadSampleLedger, LoadedSamples
from fastr1.data.order import SampleOrder
from fastr1.data.questions import load_questions
from fastr1.evaluation.multiple_choice import Evaluator, summarise_answers
from fastr1.models import VideoLanguageModel, load_model, load_processor
from fastr1.models.devices import resolve_device
from fastr1.reporting.run_log import RunLogger
from fastr1.reporting.statistics import Metrics, join_rows, mean_metrics
from fastr1.reporting.timing import PhaseTimer, machine_metrics
from fastr1.schema import S, Update
from fastr1.training.checkpoint import load_checkpoint, save_checkpoint
from fastr1.training.distributed import DistributedModel, launched_world_size
from fastr1.training.export import export_model
from fastr1.training.preflight import check_decoder, check_run, checkpoint_to_resume, describe_machine
from fastr1.training.resume import run_settings
from fastr1.training.stop import StopRequest
from fastr1.video import ClipPrefetcher, VideoError, load_pixels

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
Step = Callable[[Update[S]], tuple[Metrics, Rows]]  # the metrics hold "num_tokens", the rows are for rollouts.jsonl


class SampleLoader(Protocol[S]):
    """`load_questions` or `load_conversations`."""

    def __call__(self, path: str, video_root: str, *, policy: str, max_bad_fraction: float) -> LoadedSamples[S]: ...


class TrainingRun(Generic[S]):
    """Model, processor and samples of a run.

    Making one checks everything that can be checked without a model. Use it as a context manager: entering it builds
    model, DeepSpeed and timer, leaving it releases DeepSpeed.

    Attributes: config, model, processor, distributed, samples, order, ledger, timer, samples_per_rank (per update),
        settings (what a resume must share).
    """

    def __init__(self, config: TrainConfig, load_samples: SampleLoader[S]) -> None:
        data, optim = config.data, config.optim
        self.config = config
        self.output_dir = Path(config.run.output_dir)
        check_run(config)
        policy, bound = data.policy, data.max_bad_fraction
        loaded = load_samples(data.train_file, data.video_root, policy=policy, max_bad_fraction=bound)
        self.samples: list[S] = loaded.samples
        self.ledger = BadSampleLedger(
            loaded.num_rows, num_bad_rows=len(loaded.bad_rows), policy=policy, max_bad_fraction=bound
        )
        self.processor = load_processor(config.model.path)
        self._evaluator = self._build_evaluator()
        self.samples_per_rank = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
        self.order = SampleOrder(
            len(self.samples),
            prompts_per_update=self.samples_per_rank * launched_world_size(),
            seed=config.run.seed,
            num_epochs=optim.num_train_epochs,
            max_steps=optim.max_steps,
        )
        check_decoder(self.samples, data, resolve_device())
        self._unlogged: list[Metrics] = []  # of the updates since the last row of metrics
        self.settings = run_settings(config, self.samples, launched_world_size(), self.order.prompts_per_update)
        self._checkpoint = checkpoint_to_resume(config.run, self.settings, len(self.order))

    def __enter__(self) -> TrainingRun[S]:
        config = self.config
        self.model = load_policy(config)
        self.distributed = DistributedModel(
            self.model, config.optim, config.deepspeed, dtype=self.model.dtype, num_updates=self.order.num_updates
        )
        self.model.train()
        self.timer = PhaseTimer(self.distributed.device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # After an error on one of several ranks the others wait elsewhere: waiting for them here would hang.
        if kind is None or self.distributed.world_size == 1:
            self.distributed.close()

    def train(self, step: Step[S]) -> Path:
        """Every remaining update; returns the folder of the exported model, or the checkpoint if asked to stop."""
        run, stop = self.config.run, StopRequest()
        start = self._resume()
        num_unlogged = len(self._unlogged) if start < len(self.order) else 0  # a run that is over wrote its last row
        is_main = self.distributed.rank == 0
        if is_main:
            save_config(self.config, self.output_dir / "config.json")
        logger.info("%s", self.describe())
        log = RunLogger(
            self.output_dir, run.report_to, len(self.order), is_main, start_step=start, num_unlogged=num_unlogged
        )
        with stop.handling_signals():
            for update in self._updates():
                metrics, rows = step(update)
                is_last = update.step == len(self.order)
                if run.eval_steps and update.step % run.eval_steps == 0:
                    metrics.update(self.evaluate())
                machine = machine_metrics(self.distributed, self.timer, metrics["num_tokens"])
                self._unlogged.append({**metrics, **self._position(update.step), **machine})
                is_stopping = stop.agreed(self.distributed)
                is_due = update.step % run.logging_steps == 0
                if is_due or is_last:
                    log.log(update.step, mean_metrics(self._unlogged))
                if is_due:  # else a longer run that goes on from here needs them for its next row
                    self._unlogged.clear()
                log.log_rollouts(update.step, join_rows(self.distributed, rows))
                if is_stopping or (run.save_steps and update.step % run.save_steps == 0):
                    checkpoint = self._save(update.step)
                if is_stopping and not is_last:
                    log.close()
                    logger.warning("stopped; go on with run.resume_from_checkpoint=%s", checkpoint)
                    return checkpoint
        log.close()
        export_model(self.distributed, self.model, self.processor, self.output_dir / "final")
        return self.output_dir / "final"

    def describe(self) -> str:
        """Size of the run, where it runs and what decodes its videos, in one line."""
        return f"{len(self.samples)} samples, {len(self.order)} updates {describe_machine(self.config)}"

    def evaluate(self) -> Metrics:
        """Greedy accuracy on the held-out questions, shared among the ranks."""
        assert self._evaluator is not None
        ranks = self.distributed
        with self.timer.phase("evaluation"), ranks.gathered_parameters():
            mine = self._evaluator.answer(self.model, share=slice(ranks.rank, None, ranks.world_size))
        answers = [answer for answers in ranks.gather_objects(mine) for answer in answers]
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
                with self.timer.phase("decode_wait"):
                    loaded = list(itertools.islice(clips, self.samples_per_rank))
                assert len(loaded) == self.samples_per_rank
                self.order.next_update = update + 1
                places, pixels = [place for place, _ in loaded], [frames for _, frames in loaded]
                indices, keys = [index for index, _ in places], [key for _, key in places]
                yield Update(update + 1, [self.samples[i] for i in indices], indices, keys, pixels)

    def _position(self, step: int) -> Metrics:
        """Epochs seen, and bad samples of all ranks."""
        bad_samples = self.distributed.sum_across_ranks(torch.tensor(float(self.ledger.num_bad_samples)))
        return {"epoch": self.order.epoch(step), "bad_samples": bad_samples.item()}

    def _resume(self) -> int:
        """Updates already done: restores everything from the checkpoint named in the configuration, if any."""
        if self._checkpoint is None:
            return 0
        step, state = load_checkpoint(
            self.distributed,
            self._checkpoint,
            self.output_dir,
            settings=self.settings,
            allow_changed=self.config.run.allow_changed,
        )
        self.order.load_state_dict(state["order"])
        self.ledger.load_state_dict(state["ledger"])
        self._unlogged = state["unlogged"]
        logger.info("resumed from %s at update %d", self._checkpoint, step)
        return step

    def _save(self, step: int) -> Path:
        state = {
            "order": self.order.state_dict(),
            "ledger": self.ledger.state_dict(),
            "unlogged": self._unlogged,
        }
        limit = self.config.run.save_total_limit
        with self.timer.phase("checkpoint"):
            return save_checkpoint(
                self.distributed, self.output_dir, step, state, save_total_limit=limit, settings=self.settings
            )


def load_policy(config: TrainConfig) -> VideoLanguageModel:
    """The model to train, its frozen parts without gradient."""
    settings = config.model
    model = load_model(settings.path, dtype=settings.dtype, attn_implementation=settings.attn_implementation)
    model.freeze(settings.freeze)
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model
