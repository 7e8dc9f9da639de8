"""What is checked before any model is built: hours into the queue is too late to learn of a typing error."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastr1.config import DataConfig, RunConfig, TrainConfig
from fastr1.evaluation.recorded import refuse_run_folder
from fastr1.models.attention import check_attention
from fastr1.models.devices import resolve_device, resolve_dtype
from fastr1.models.liger import resolve_liger
from fastr1.models.packed_attention import choose_packed_backend
from fastr1.models.weights import check_weights
from fastr1.reporting.trackers import check_trackers
from fastr1.rewards import build_scorer
from fastr1.schema import DataError, Sample, SftSample
from fastr1.training.checkpoint import CHECKPOINTS, LAST, CheckpointError, check_checkpoint, find_checkpoint
from fastr1.training.distributed import build_deepspeed_config
from fastr1.training.run_folder import refuse_used_folder, traces_of_a_run
from fastr1.video import VideoError, describe_backend, load_clip

_NUM_TRIED = 8  # clips, where bad ones are to be skipped


def check_run(config: TrainConfig) -> None:
    """Looks up everything that a configuration only names, apart from its data: folders, weights, attention, keys of
    DeepSpeed, reward functions, decoder, trackers.

    Raises: ConfigError, CheckpointError, DataError, ModelFileError, RewardError or BackendError, with value and remedy.
    """
    device = resolve_device()
    dtype = resolve_dtype(config.model.dtype, device)
    _check_output_dir(Path(config.run.output_dir), Path(config.model.path))
    _check_used_folder(Path(config.run.output_dir), config.run.resume_from_checkpoint)
    check_trackers(config.run.report_to)
    refuse_run_folder(Path(config.model.path))
    check_weights(config.model.path)
    check_attention(config.model.attn_implementation, device, dtype)
    choose_packed_backend(config.model.packed_attn_implementation, device, dtype)
    resolve_liger(config.model.use_liger_kernel, device)
    build_deepspeed_config(config.deepspeed, config.optim, dtype)
    if config.task == "grpo":
        build_scorer(config.reward)
    describe_backend(config.data.backend)


def check_decoder(samples: Sequence[Sample | SftSample], data: DataConfig, device: torch.device) -> None:
    """Decodes the first clip; with data.policy "skip", the first good one of eight.

    Raises: VideoError where none can be decoded, BackendError where the decoder cannot be loaded.
    """
    tried = list(dict.fromkeys(sample.video_path for sample in samples))[: _NUM_TRIED if data.policy == "skip" else 1]
    for number, path in enumerate(tried, start=1):
        try:
            load_clip(path, num_frames=2, device=device, backend=data.backend)
            return
        except VideoError:
            if number == len(tried):
                raise


def checkpoint_to_resume(run: RunConfig, settings: Mapping[str, Any], num_updates: int) -> Path | None:
    """The folder to go on from, if any: whole, of a run with the same settings and no more updates.

    Raises: CheckpointError naming every difference.
    """
    if run.resume_from_checkpoint is None:
        return None
    folder = find_checkpoint(run.resume_from_checkpoint, run.output_dir)
    step = check_checkpoint(folder, settings, run.allow_changed)
    if step > num_updates:
        raise CheckpointError(
            f"{folder} has {step} updates behind it and this run only {num_updates}: raise optim.max_steps or "
            "optim.num_train_epochs, or resume from an earlier checkpoint"
        )
    return folder


def describe_run(config: TrainConfig, num_samples: int, num_updates: int) -> str:
    """Size, device, dtype and decoder of a run; and its held-out questions where none is asked, which may be meant."""
    device, run = resolve_device(), config.run
    dtype = str(resolve_dtype(config.model.dtype, device)).removeprefix("torch.")
    text = f"{num_samples} samples, {num_updates} updates on {device}, {dtype}; "
    text += f"videos: {describe_backend(config.data.backend)}"
    if config.data.eval_file is not None and not 0 < run.eval_steps <= num_updates:
        text += f"; data.eval_file is not evaluated: run.eval_steps is {run.eval_steps}"
    return text


def _check_output_dir(folder: Path, model: Path) -> None:
    """Writes a file into the folder or, where it does not exist yet, into the one that it would be made in."""
    if folder.resolve().is_relative_to(model.resolve()):
        raise DataError(
            f"run.output_dir is {folder}, in the folder of model.path, {model}, which no run may change: choose another"
        )
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
    except OSError as error:
        raise DataError(
            f"run.output_dir is {folder}, but nothing can be written to {place} ({error.strerror}): choose another "
            "folder or change its permissions"
        ) from None


def _check_used_folder(folder: Path, resume_from_checkpoint: str | None) -> None:
    """Two runs in one folder would mix their logs and checkpoints."""
    if resume_from_checkpoint is None:
        refuse_used_folder(folder)
    if resume_from_checkpoint in (None, LAST):
        return
    checkpoint = find_checkpoint(str(resume_from_checkpoint), folder)
    if (checkpoint / CHECKPOINTS).is_dir():
        raise CheckpointError(
            f"run.resume_from_checkpoint is {checkpoint}, the folder of a run: give a folder in its {CHECKPOINTS}/, or "
            f"{LAST!r} with run.output_dir={checkpoint}"
        )
    if checkpoint.resolve().parent != (folder / CHECKPOINTS).resolve() and (found := traces_of_a_run(folder)):
        raise CheckpointError(
            f"run.resume_from_checkpoint is {checkpoint}, but {folder} holds another run ({', '.join(found)}): choose "
            "another run.output_dir, or a checkpoint in that folder"
        )
