"""The accuracy of a model folder on a question file, by one process or several.

Several processes take whole batches in turn: every batch holds the questions it would hold with one, and so the answers
are those of one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException

from fastr1.config import ConfigError, Control, DataConfig, GRPOConfig, ModelConfig, Policy, RunConfig
from fastr1.data.ledger import BadRow, BadSampleLedger, LoadedSamples
from fastr1.data.questions import load_questions
from fastr1.evaluation.multiple_choice import Evaluator, summarise_answers
from fastr1.evaluation.recorded import data_settings, stop_strings
from fastr1.models import load_model, load_processor, parse_device
from fastr1.schema import Answer, Clip, DataError, Sample

NoteClip = Callable[[Sample, Clip], None]
Recording = Callable[[int, int], AbstractContextManager[NoteClip]]  # of a rank and their number

logger = logging.getLogger(__name__)


def _nothing_noted(rank: int, num_processes: int) -> AbstractContextManager[NoteClip]:
    return contextlib.nullcontext(lambda sample, clip: None)


def evaluate_checkpoint(
    *,
    model_path: str | Path,
    data_file: str | Path,
    video_root: str | Path,
    num_frames: int | None = None,
    max_frames: int | None = None,
    instruction: str | None = None,
    backend: str | None = None,
    batch_size: int = RunConfig.per_device_eval_batch_size,
    max_completion_length: int = GRPOConfig.max_completion_length,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    control: Control | None = None,
    policy: Policy = DataConfig.policy,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
    dtype: str = ModelConfig.dtype,
    device: str | None = None,
    num_processes: int = 1,
    output: str | Path | None = None,
    recording: Recording = _nothing_noted,
) -> dict[str, float]:
    """Load a model, answer the questions of a file and return the rates of `summarise_answers`.

    Args:
        num_frames, max_frames, instruction, backend: how the questions are asked; None is as in the model's training,
            where its folder records that (see `recorded.py`), as are the stop strings.
        temperature, top_p, seed: of the sampling; a temperature of 0 takes the likeliest token.
        control: one of `CONTROLS`, shown in the place of every clip; None: the clip.
        policy: "error" stops at a question that cannot be used, naming file and line; "skip" leaves it out.
        max_bad_fraction: with "skip", stop when more than this share of the questions is left out.
        num_processes: one per GPU, or any number on a CPU. The answers do not depend on it.
        output: write the summary, every answer and what was left out there as JSON.
        recording: opened by every process with its rank and their number; is given every clip.
    Raises: ConfigError where `output` cannot be written, before a model is loaded.
    """
    if output is not None:
        _check_output(Path(output))
    asked = data_settings(
        model_path, num_frames=num_frames, max_frames=max_frames, instruction=instruction, backend=backend
    )
    job = _Job(
        str(model_path),
        load_questions(data_file, video_root, policy=policy, max_bad_fraction=max_bad_fraction, limit=limit),
        dataclasses.replace(asked, policy=policy, max_bad_fraction=max_bad_fraction),
        control,
        dtype,
        _devices(device, num_processes),
        batch_size,
        {
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stop_strings": stop_strings(model_path),
        },
        recording,
    )
    evaluator = job.build_evaluator()
    if num_processes == 1:
        answers, failures = job.answer_share(evaluator, 0)
    else:
        answers, failures = _answer_in_processes(job, evaluator.samples)
    _check_failures(evaluator.ledger, failures)
    summary = summarise_answers(answers, evaluator.num_rows)
    if output is not None:
        _write_answers(Path(output), summary, answers, evaluator.ledger)
    return summary


def _check_failures(ledger: BadSampleLedger, failures: list[BadRow]) -> None:
    """Name what was left out. Raises DataError where it is too much."""
    ledger.record(failures, step=0, when="evaluation")
    for row in ledger.rows:
        logger.warning("%s, line %d is left out: %s", row.file, row.line, row.reason)
    ledger.check_bound()


def _write_answers(file: Path, summary: dict[str, float], answers: list[Answer], ledger: BadSampleLedger) -> None:
    content = {
        "summary": summary,
        "answers": [asdict(answer) for answer in answers],
        "left_out": [asdict(row) for row in ledger.rows],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reason = f"{file} could not be written ({error.strerror})"
        raise DataError(f"{reason}; the answers are lost, their summary is {json.dumps(summary)}") from error


def _check_output(file: Path) -> None:
    """Refuses it now rather than after the last question. A file that is already there keeps its content."""
    is_new = not file.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab"):
            pass
    except OSError as error:
        raise ConfigError(f"--output {file} cannot be written ({error.strerror}): choose another file") from error
    if is_new:
        file.unlink()


@dataclass(frozen=True)
class _Job:
    """Everything that a process needs to answer its share."""

    model_path: str
    loaded: LoadedSamples[Sample]
    data: DataConfig
    control: Control | None
    dtype: str
    devices: list[torch.device]  # one per process
    batch_size: int
    sampling: dict[str, Any]
    recording: Recording = _nothing_noted

    def build_evaluator(self) -> Evaluator:
        processor = load_processor(self.model_path)
        return Evaluator(self.loaded, processor, self.data, batch_size=self.batch_size, **self.sampling)

    def share(self, num_samples: int, rank: int) -> list[int]:
        """The places of the questions that a process answers: every n-th batch."""
        return [i for i in range(num_samples) if i // self.batch_size % len(self.devices) == rank]

    def answer_share(self, evaluator: Evaluator, rank: int) -> tuple[list[Answer], list[BadRow]]:
        model = load_model(self.model_path, dtype=self.dtype, device=self.devices[rank])
        share = self.share(len(evaluator.samples), rank)
        with self.recording(rank, len(self.devices)) as note_clip:
            answered = evaluator.answer(model, share=share, control=self.control, note_clip=note_clip)
        assert answered is not None
        return answered


def _devices(device: str | None, num_processes: int) -> list[torch.device]:
    """The device of every process. Raises: ConfigError where there are not as many GPUs."""
    if num_processes < 1:
        raise ConfigError(f"num_processes is {num_processes}; use 1 or more")
    first = parse_device(device)
    if num_processes == 1 or first.type == "cpu":
        return [first] * num_processes
    count = torch.cuda.device_count()
    if device not in (None, "cuda") or num_processes > count:
        wanted = f"num_processes is {num_processes} with device {device or 'cuda'!r}"
        raise ConfigError(f"{wanted}, and this machine has {count} GPUs: use one process per GPU, or --device cpu")
    return [torch.device("cuda", index) for index in range(num_processes)]


def _answer_in_processes(job: _Job, samples: list[Sample]) -> tuple[list[Answer], list[BadRow]]:
    """The answers in the order of the samples, and the failures, of all processes."""
    num_processes = len(job.devices)
    num_threads = max(1, torch.get_num_threads() // num_processes)
    with tempfile.TemporaryDirectory(prefix="fastr1-eval-") as folder:
        try:
            arguments = (job, num_threads, Path(folder), os.getpid())
            with _ctrl_c_held_back():  # it would make each process print a traceback while it imports
                # daemons: they end with this one
                started = multiprocessing.spawn(_run_process, arguments, nprocs=num_processes, join=False, daemon=True)
            while not started.join():
                pass
        except ProcessExitedException as error:
            for refusal in sorted(Path(folder).glob("*.error")):
                raise DataError(refusal.read_text()) from None
            raise DataError(
                f"process {error.error_index} of the evaluation ended with {error.signal_name or error.exit_code}; if "
                "memory was short, use a smaller --num-processes or --batch-size"
            ) from error
        parts = [pickle.loads((Path(folder) / f"{rank}.answers").read_bytes()) for rank in range(num_processes)]
    failures = [bad for _, bad_rows in parts for bad in bad_rows]
    failed = {bad.origin for bad in failures}
    placed: dict[int, Answer] = {}
    for rank, (answers, bad_rows) in enumerate(parts):
        if bad_rows and job.data.policy == "error":
            continue  # it stopped there, and so will the caller
        answered = [place for place in job.share(len(samples), rank) if samples[place].origin not in failed]
        placed.update(zip(answered, answers, strict=True))
    return [placed[place] for place in sorted(placed)], sorted(failures, key=lambda bad: bad.line)


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Delivered when this is left; a process that is started inside does not hear it before it unblocks it."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _run_process(rank: int, job: _Job, num_threads: int, folder: Path, parent: int) -> None:
    """Answers the share of one process; what fastr1 refuses is left as text and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, and what torch has sent when the parent dies
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if os.getppid() != parent:  # it ended while this process was starting; torch sees to what comes later
        return
    torch.set_num_threads(num_threads)
    try:
        part = job.answer_share(job.build_evaluator(), rank)
    except ValueError as error:
        if not type(error).__module__.startswith("fastr1."):
            raise
        (folder / f"{rank}.error").write_text(str(error))
        sys.exit(2)
    (folder / f"{rank}.answers").write_bytes(pickle.dumps(part))
