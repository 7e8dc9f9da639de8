"""The loop around an update, shared by GRPO and supervised fine-tuning.

A task supplies the samples and a function for one update; this module supplies the model under DeepSpeed, the order of
samples, clips loaded ahead, evaluation, log, checkpoints, stopping and the exported model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol

import torch

from fastr1.config import DataConfig, TrainConfig, config_to_dict, save_config
from fastr1.data.ledger import BadSampleLedger, LoadedSamples, tokenize_samples
from fastr1.data.order import SampleOrder
from fastr1.evaluation.multiple_choice import summarise_answers
from fastr1.models import Processor, load_processor
from fastr1.models.devices import resolve_device
from fastr1.reporting.frames import FrameRecorder, When
from fastr1.reporting.hardware import write_hardware
from fastr1.reporting.run_log import RunLogger
from fastr1.reporting.statistics import Metrics, join_rows, mean_metrics
from fastr1.reporting.timing import PhaseTimer, machine_metrics
from fastr1.schema import S, Update
from fastr1.training.agreement import agreement, is_on_every_rank
from fastr1.training.bad_data import BadData
from fastr1.training.checkpoint import load_checkpoint
from fastr1.training.distributed import DistributedModel
from fastr1.training.export import export_model
from fastr1.training.held_out import build_evaluator
from fastr1.training.keeper import Keeper
from fastr1.training.launched import launched_world_size
from fastr1.training.policy import load_policy
from fastr1.training.preflight import check_decoder, check_run, checkpoint_to_resume, describe_run
from fastr1.training.resume import run_settings
from fastr1.training.run_folder import holding_folder
from fastr1.training.stop import SAVING, StopRequest, machine_id, process_id
from fastr1.training.updates import Updates

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
Step = Callable[[Update[S]], tuple[Metrics, Rows]]  # the metrics hold "num_tokens", the rows are for rollouts.jsonl
Tokenize = Callable[[Processor, DataConfig, S], Any]  # raises DataError where a text does not fit into the model


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
    """Model, processor and samples of a run.

    Making one checks everything that can be checked without a model. Use it as a context manager: entering it builds
    model, DeepSpeed and timer, leaving it releases DeepSpeed.

    Args:
        stop: what listens for signals already, if anything does; else `train` listens while it runs.

    Attributes: config, model, processor, distributed, samples, tokens (what `tokenize` made of each sample), order,
        bad_data, updates, timer, samples_per_rank (of an update), samples_per_step (of a step of the optimizer, on this
        rank), settings (what a resume must share).
    """

    def __init__(
        self,
        config: TrainConfig,
        load_samples: SampleLoader[S],
        tokenize: Tokenize[S],
        stop: StopRequest | None = None,
    ) -> None:
        data, optim = config.data, config.optim
        self.config = config
        self.output_dir = Path(config.run.output_dir)
        check_run(config)
        policy, bound = data.policy, data.max_bad_fraction
        read = load_samples(data.train_file, data.video_root, policy=policy, max_bad_fraction=bound)
        self.processor = load_processor(config.model.path)
        # All of them now: a text that is too long is known before the first update, not hours into the run.
        loaded, self.tokens = tokenize_samples(
            read, lambda sample: tokenize(self.processor, data, sample), policy=policy, max_bad_fraction=bound
        )
        self.samples: list[S] = loaded.samples
        self._ledger = BadSampleLedger(loaded, policy=policy, max_bad_fraction=bound)
        self._evaluator = build_evaluator(config, self.processor)
        self.samples_per_step = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
        steps = config.grpo.steps_per_generation if config.task == "grpo" else None
        self.samples_per_rank = optim.per_device_train_batch_size * (steps or optim.gradient_accumulation_steps)
        self.order = SampleOrder(
            len(self.samples),
            prompts_per_update=self.samples_per_rank * launched_world_size(),
            seed=config.run.seed,
            num_epochs=optim.num_train_epochs,
            max_steps=optim.max_steps,
        )
        for samples in (self.samples, [] if self._evaluator is None else self._evaluator.samples):
            check_decoder(samples, data, resolve_device())
        self.stop = StopRequest() if stop is None else stop
        self._open: OpenUpdate | None = None
        self._unlogged: list[Metrics] = []  # of the updates since the last row of metrics
        self.settings = run_settings(config, self.samples, launched_world_size(), self.order.prompts_per_update)
        self._checkpoint = checkpoint_to_resume(config.run, self.settings, len(self.order))

    def __enter__(self) -> TrainingRun[S]:
        config = self.config
        self.model = load_policy(config)
        steps_per_update = self.samples_per_rank // self.samples_per_step
        if config.task == "grpo":
            steps_per_update *= config.grpo.num_iterations
        num_steps = self.order.num_updates * steps_per_update
        self.distributed = DistributedModel(
            self.model, config.optim, config.deepspeed, dtype=self.model.dtype, num_steps=num_steps
        )
        self.model.train()
        self.timer = PhaseTimer(self.distributed.device)
        roots: dict[When, Path] = {"training": Path(config.data.video_root)}
        if self._evaluator is not None:
            roots["evaluation"] = Path(config.data.eval_video_root or config.data.video_root)
        ranks = {"rank": self.distributed.rank, "world_size": self.distributed.world_size}
        self._frames = FrameRecorder(self.output_dir, config.run.report_frames, roots, **ranks)
        eval_ledger = None if self._evaluator is None else self._evaluator.ledger
        self.bad_data = BadData(self.distributed, self.output_dir, self._ledger, eval_ledger)
        self.updates: Updates[S] = Updates(
            config.data,
            self.samples,
            self.order,
            self.processor,
            self.distributed,
            self.bad_data,
            self.timer,
            partial(self._frames.note, "training"),
            samples_per_rank=self.samples_per_rank,
            seed=config.run.seed,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # After an error on one of several ranks the others wait elsewhere: waiting for them here would hang.
        if error is None or self.distributed.world_size == 1 or is_on_every_rank(error):
            self.distributed.close()

    def train(self, step: Step[S]) -> Path:
        """Every remaining update; returns the folder of the exported model, or the checkpoint if asked to stop.

        Raises: what goes wrong, after saving the last finished update where that can be done; the message names it.
        """
        is_resumed = self._checkpoint is not None
        with self.stop.watching(), holding_folder(self.distributed, self.output_dir, is_resumed=is_resumed):
            start, saved = self._resume()
            keeper = Keeper(
                self.distributed,
                self.config.run,
                self.stop,
                self._state,
                step=start,
                saved=saved,
                settings=self.settings,
            )
            try:
                checkpoint = self._train(step, start, keeper)
                if checkpoint is not None:
                    if self.distributed.rank == 0:
                        logger.warning("stopped after update %d of %d: %s", keeper.step, len(self.order), keeper.go_on)
                    return checkpoint
                self.stop.answer = "all updates are done; writing the model"
                export_model(self.distributed, self.model, self.processor, self.config, self.output_dir / "final")
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
            for close in (self._frames.close, partial(log.close, has_failed=True)):
                with suppress(Exception):  # a full disk once more, in the place of what went wrong
                    close()
            raise
        with agreement(self.distributed):
            self._frames.close()
            log.close()

    def _start_log(self, start: int) -> RunLogger:
        is_main = self.distributed.rank == 0
        logger.info("%s", self.describe())
        num_unlogged = len(self._unlogged) if start < len(self.order) else 0  # a run that is over wrote its last row
        report_to, total = self.config.run.report_to, len(self.order)
        with agreement(self.distributed):
            if is_main:
                save_config(self.config, self.output_dir / "config.json")
                write_hardware(self.output_dir, self.distributed.world_size)
                self._frames.clean(is_resumed=self._checkpoint is not None)
        self.bad_data.begin()
        with agreement(self.distributed):
            self._frames.begin()
            settings, folder = config_to_dict(self.config), self.output_dir
            return RunLogger(
                folder, report_to, total, is_main, start_step=start, num_unlogged=num_unlogged, settings=settings
            )

    def _train(self, step: Step[S], start: int, keeper: Keeper) -> Path | None:
        """Every remaining update; returns the checkpoint if asked to stop before the last."""
        if launched_world_size() > 1:
            ranks = self.distributed.gather_objects((machine_id(), self.distributed.rank, process_id()))
            self.stop.watch_peers([(rank, process) for machine, rank, process in ranks if machine == machine_id()])
        # The rows of an open update may be half written: they are written again.
        with self._logging(start - (self._open is not None)) as log:
            self.distributed.barrier()
            self.stop.exits_at_once = False  # from here on ranks wait for each other
            if self._open is not None and (checkpoint := self._conclude(log, keeper)):
                return checkpoint
            for update in self.updates:
                # with nothing to train on, the update passes without a step of the optimizer
                metrics, rows = ({"num_tokens": 0.0}, []) if update.is_lost else step(update)
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
            machine = machine_metrics(self.distributed, self.timer, metrics["num_tokens"])
            self._unlogged.append({**metrics, "epoch": self.order.epoch(update.step), **machine})
            rows, is_row = join_rows(self.distributed, update.rows), update.step % run.logging_steps == 0
            with agreement(self.distributed):
                if is_row or is_last:
                    bad_samples = float(self.bad_data.num_bad)  # a count is not averaged over updates
                    log.log(update.step, {**mean_metrics(self._unlogged), "bad_samples": bad_samples})
                log.log_rollouts(update.step, rows)
            if is_row:  # else a longer run that goes on from here needs them for its next row
                self._unlogged.clear()
            self._open = None
            keeper.finished(update.step)
        if is_due:
            with self.timer.phase("checkpoint"):
                checkpoint = keeper.save()
        return checkpoint if is_stopping and (rates is None or not is_last) else None

    def describe(self) -> str:
        """The run in one line."""
        return describe_run(self.config, len(self.samples), len(self.order))

    def evaluate(self) -> Metrics | None:
        """Greedy accuracy on the held-out questions, shared among the ranks; None where a stop was asked for
        meanwhile, on any rank."""
        evaluator, ranks = self._evaluator, self.distributed
        assert evaluator is not None
        with self.timer.phase("evaluation"), ranks.gathered_parameters(), agreement(ranks):
            share = slice(ranks.rank, None, ranks.world_size)
            note = partial(self._frames.note, "evaluation")
            mine = evaluator.answer(self.model, share=share, is_cancelled=lambda: bool(self.stop), note_clip=note)
        everyone = ranks.gather_objects(mine)
        if None in everyone:
            return None
        shares = [share for share in everyone if share is not None]
        failures = [bad for _, failures in shares for bad in failures]
        self.bad_data.note("evaluation", self.order.next_update, failures)
        with agreement(ranks):
            summary = summarise_answers([answer for answers, _ in shares for answer in answers], evaluator.num_rows)
        return {f"eval/{name}": value for name, value in summary.items()}

    def fill(self, pixels: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Blank frames in the place of a skipped video, whose sample must count in no loss or metric, so that every
        rank takes the same number of steps."""
        blank = self.processor.blank_pixels(max(self.config.data.num_frames, 1)).to(self.distributed.device)
        return [blank if frames is None else frames for frames in pixels]

    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Vision features per sample, or pixel values where the tower is trained and encodes them with a graph. All
        ranks call it."""
        if "vision_tower" not in self.config.model.freeze:
            return list(pixels)
        with torch.no_grad():
            features: list[torch.Tensor] = self.distributed(lambda model: [model.encode(frames) for frames in pixels])
        return features

    def _resume(self) -> tuple[int, Path | None]:
        """Restores everything from the checkpoint named in the configuration, if any: updates done, and its folder."""
        if self._checkpoint is None:
            return 0, None
        step, state = load_checkpoint(
            self.distributed,
            self._checkpoint,
            self.output_dir,
            settings=self.settings,
            allow_changed=self.config.run.allow_changed,
        )
        self.order.load_state_dict(state["order"])
        self.bad_data.load_state_dict(state["bad_samples"])
        self._unlogged, self._open = state["unlogged"], state["open"]
        logger.info("resumed from %s at update %d", self._checkpoint, step)
        return step, self._checkpoint

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {
            "order": self.order.state_dict(),
            "bad_samples": self.bad_data.state_dict(self.order.next_update),
            "unlogged": self._unlogged,
            "open": self._open,
        }
