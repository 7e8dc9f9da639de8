"""Checkpoints that resume a run exactly: `output_dir/checkpoints/step-000123/`.

    engine/            model, optimizer and schedule, written by DeepSpeed
    rank-00000.pt      random generators and trainer state, one file per process
    manifest.json      step, the settings a resume must share (see `resume.py`), and the size of every other file

A folder gets its name only once everything in it is written, so a crash while saving leaves a `.partial` folder that is
never picked up, and older checkpoints are removed only after that. All processes must share the output directory.
Refuses to resume under another setting than the checkpoint's, unless that is explicitly allowed. The files are pickles,
which run code when read: load only checkpoints you trust.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastr1.training.agreement import agreement, opened_for_torch

if TYPE_CHECKING:
    from fastr1.training.distributed import DistributedModel

LAST = "last"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
DEEPSPEED_TAG = "engine"
VERSION = 2  # of the manifest and of what the rank files hold
LIBRARIES = ("torch", "transformers", "deepspeed")  # another version may round differently
_NONE: Mapping[str, Any] = MappingProxyType({})
_MISSING = object()

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, or belongs to a different set-up. The message names both and the remedy."""


def save_checkpoint(
    distributed: DistributedModel,
    output_dir: str | Path,
    step: int,
    trainer_state: dict[str, Any],
    *,
    save_total_limit: int,
    generators: dict[str, Any] | None = None,
    settings: Mapping[str, Any] = _NONE,
) -> Path:
    """Write the state after update `step` and remove the oldest checkpoints beyond the limit. All ranks call it.

    Args:
        trainer_state: this rank's picklable state (the order of samples, …), given back by `load_checkpoint`.
        save_total_limit: complete checkpoints to keep, the new one included; 0 keeps all.
        generators: what `random_state` returned at the end of that update; None: as they are now.
        settings: JSON values that a run which goes on from here must share, under names that a user would change.

    Returns: the new checkpoint's folder, replaced if it existed.
    Raises: what writing raises on any rank, on every rank; the checkpoints there were are kept.
    """
    if save_total_limit < 0:
        raise CheckpointError(f"run.save_total_limit is {save_total_limit}; use 0 to keep all or a positive number")
    root = Path(output_dir) / CHECKPOINTS
    final = root / f"step-{step:06d}"
    partial = final.with_suffix(".partial")
    if generators is None:
        generators = random_state(distributed)
    try:
        with agreement(distributed):
            if distributed.rank == 0:
                root.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(root)
                partial.mkdir()
        distributed.save(partial, DEEPSPEED_TAG)
        with agreement(distributed), opened_for_torch(partial / _rank_file(distributed.rank)) as file:
            torch.save({"rng": generators, "trainer": trainer_state}, file)
        with agreement(distributed):
            if distributed.rank == 0:
                _write_manifest(distributed, partial, step, settings)
                if final.exists():
                    final.rename(final.with_suffix(".removed"))
                partial.rename(final)
                if save_total_limit:
                    for old in _complete_checkpoints(root)[:-save_total_limit]:
                        old.rename(old.with_suffix(".removed"))
                for error in _remove_leftovers(root):
                    logger.warning("%s cannot be removed: %s", error.filename, error.strerror)
    except Exception:
        if distributed.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk the room is needed
        raise
    return final


def load_checkpoint(
    distributed: DistributedModel,
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    settings: Mapping[str, Any] = _NONE,
    allow_changed: Sequence[str] = (),
) -> tuple[int, dict[str, Any]]:
    """Restore model, optimizer, schedule and random generators into a fresh `DistributedModel`. All ranks call it.

    Args:
        checkpoint: a folder written by `save_checkpoint`, or "last": the one saved most recently in `output_dir`.
        settings, allow_changed: as for `check_checkpoint`.

    Returns: the number of updates done, and this rank's trainer state. Settings that were allowed to change are logged.
    Raises: CheckpointError if it is missing, incomplete, or was saved under settings that this run does not share.
    """
    folder = find_checkpoint(checkpoint, output_dir)
    settings = {**settings, **_engine_settings(distributed)}
    step = check_checkpoint(folder, settings, allow_changed)
    if distributed.rank == 0:
        _log_differences(_parse_manifest(folder), settings)
    state = torch.load(folder / _rank_file(distributed.rank), map_location="cpu", weights_only=False)
    distributed.load(folder, DEEPSPEED_TAG)
    _restore_rng(distributed, state["rng"])
    return step, state["trainer"]


def check_checkpoint(folder: Path, settings: Mapping[str, Any], allow_changed: Sequence[str] = ()) -> int:
    """The number of updates done in a checkpoint, which must be whole and share every one of the settings.

    Args:
        settings: those of this run, JSON values by name.
        allow_changed: names of settings that may differ.

    Raises: CheckpointError naming every other difference with both values; also for a name in `allow_changed` that is
        no setting or that no checkpoint can do without.
    """
    manifest = _read_manifest(folder)
    saved = manifest["settings"]
    _check_names(allow_changed, {*saved, *settings})
    changes = {name: text for name, text in _differences(saved, settings).items() if name not in allow_changed}
    if changes:
        names = [*allow_changed, *(name for name in changes if name not in FIXED)]
        list_them = f"list what is meant to change (run.allow_changed={json.dumps(names)}), "
        raise CheckpointError(
            f"{folder} cannot be resumed exactly: {'; '.join(changes.values())}. Restore the first value of each, "
            f"{'' if changes.keys() <= set(FIXED) else list_them}or start a new run from an exported model (model.path)"
        )
    return int(manifest["step"])


def find_checkpoint(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """The folder that run.resume_from_checkpoint means: "last" is the one saved most recently in `output_dir`."""
    return find_last_checkpoint(output_dir) if checkpoint == LAST else Path(checkpoint)


def find_last_checkpoint(output_dir: str | Path) -> Path:
    """The complete checkpoint saved most recently: after a restart from an earlier one, not the highest step."""
    checkpoints = _complete_checkpoints(Path(output_dir) / CHECKPOINTS)
    if not checkpoints:
        raise CheckpointError(
            f"no complete checkpoint in {Path(output_dir) / 'checkpoints'}; check run.output_dir, "
            "or leave out run.resume_from_checkpoint to start a new run"
        )
    return checkpoints[-1]


def _complete_checkpoints(root: Path) -> list[Path]:
    """Oldest save first."""
    folders = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    complete = [path for path in folders if _is_complete(path)]
    return sorted(complete, key=lambda path: _parse_manifest(path)["saved_at_ns"])


def _is_complete(folder: Path) -> bool:
    """Whether the manifest, written last, is there and whole."""
    try:
        return "saved_at_ns" in _parse_manifest(folder)
    except (OSError, ValueError):
        return False


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


_ENGINE = ("world size (number of processes)", "deepspeed.zero_optimization.stage", "model.dtype", "device type")
# What the files of a checkpoint are made for, and what the place in the stream of samples is counted in.
FIXED = (*_ENGINE, "model.freeze", "prompts per update")


def engine_settings(num_processes: int, zero_stage: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The settings that follow from the machine and from DeepSpeed's configuration."""
    return dict(zip(_ENGINE, (num_processes, zero_stage, str(dtype).removeprefix("torch."), device.type), strict=True))


def _engine_settings(distributed: DistributedModel) -> dict[str, Any]:
    return engine_settings(distributed.world_size, distributed.zero_stage, distributed.dtype, distributed.device)


def _check_names(allow_changed: Sequence[str], known: set[str]) -> None:
    for name in allow_changed:
        if name in FIXED:
            raise CheckpointError(
                f"run.allow_changed names {name!r}, which cannot change: the files of a checkpoint are made for it; "
                "start a new run from an exported model (model.path)"
            )
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(sorted(known))}"
            raise CheckpointError(f"run.allow_changed names {name!r}, which is not compared with a checkpoint; {meant}")


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Name → both values in words, of every setting that is not the same."""
    differing = [name for name in {**current, **saved} if saved.get(name, _MISSING) != current.get(name, _MISSING)]
    before = {name: f"was {saved[name]!r}" if name in saved else "was not recorded" for name in differing}
    after = {name: f"is {current[name]!r} now" if name in current else "does not exist now" for name in differing}
    return {name: f"{name} {before[name]} and {after[name]}" for name in differing}


def _log_differences(manifest: dict[str, Any], settings: Mapping[str, Any]) -> None:
    changes = _differences(manifest["settings"], settings)
    if changes:
        logger.warning("as run.allow_changed says, the run goes on differently: %s", "; ".join(changes.values()))
    versions = _differences(manifest["versions"], _versions())
    if versions:
        logger.warning("the run goes on exactly but for rounding: %s", "; ".join(versions.values()))


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def _write_manifest(distributed: DistributedModel, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    missing = [_rank_file(rank) for rank in range(distributed.world_size) if _rank_file(rank) not in files]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing}; put run.output_dir on a disk that all processes share")
    manifest = {
        "version": VERSION,
        "step": step,
        "saved_at_ns": time.time_ns(),
        "versions": _versions(),
        "settings": {**settings, **_engine_settings(distributed)},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _parse_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking every file it lists."""
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist; give an existing folder, or {LAST!r}")
    if not _is_complete(folder):
        raise CheckpointError(
            f"checkpoint {folder} has no whole {MANIFEST}: saving did not finish, or it is no checkpoint; use "
            f"an earlier {CHECKPOINTS}/step-* of the run, or {LAST!r}"
        )
    manifest = _parse_manifest(folder)
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {folder} was written by another version of fastr1 (format {manifest.get('version')}, this one "
            f"reads {VERSION}): resume it there, or start a new run from an exported model (model.path)"
        )
    for name, num_bytes in manifest["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != num_bytes:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {found} bytes instead of {num_bytes}; use an earlier one"
            )
    return manifest


def random_state(distributed: DistributedModel) -> dict[str, Any]:
    """The states of all random generators of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(distributed.device) if distributed.device.type == "cuda" else None,
    }


def _restore_rng(distributed: DistributedModel, state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if distributed.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], distributed.device)


def _remove_leftovers(root: Path) -> list[OSError]:
    """Remove unfinished and outdated folders, which are renamed first: half a folder never has a checkpoint's name.

    Returns: why one is still there, which must not cost the run: it may be write-protected, to be kept.
    """
    errors = []
    for suffix in (".partial", ".removed"):
        for path in root.glob(f"step-*{suffix}"):
            try:
                shutil.rmtree(path)
            except OSError as error:
                errors.append(OSError(error.errno, error.strerror, str(path)))
    return errors
