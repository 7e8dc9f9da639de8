"""Checkpoints that resume a run exactly: `output_dir/checkpoints/step-000123/`.

    engine/            model, optimizer and schedule, written by DeepSpeed
    rank-00000.pt      random generators and trainer state, one file per process
    manifest.json      step, the settings a resume must share, and the size of every other file

A folder gets its name only once everything in it is written, so a crash while saving leaves a `.partial` folder that is
never picked up, and older checkpoints are removed only after that. All processes must share the output directory.
Refuses to resume with another world size, ZeRO stage, dtype or optimizer setting than the checkpoint's. The files are
pickles, which run code when read: load only checkpoints you trust.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastr1.training.agreement import agreement, opened_for_torch

if TYPE_CHECKING:
    from fastr1.training.distributed import DistributedModel

LAST = "last"
MANIFEST = "manifest.json"
DEEPSPEED_TAG = "engine"
# DeepSpeed restores these from the checkpoint and ignores the new configuration, so they must agree.
RESTORED_OPTIM_FIELDS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)


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
) -> Path:
    """Write the state after update `step` and remove the oldest checkpoints beyond the limit. All ranks call it.

    Args:
        trainer_state: this rank's picklable state (the order of samples, …), given back by `load_checkpoint`.
        save_total_limit: complete checkpoints to keep, the new one included; 0 keeps all.
        generators: what `random_state` returned at the end of that update; None: as they are now.

    Returns: the new checkpoint's folder, replaced if it existed.
    Raises: what writing raises on any rank, on every rank; the checkpoints there were are kept.
    """
    if save_total_limit < 0:
        raise CheckpointError(f"run.save_total_limit is {save_total_limit}; use 0 to keep all or a positive number")
    root = Path(output_dir) / "checkpoints"
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
                _write_manifest(distributed, partial, step)
                if final.exists():
                    final.rename(final.with_suffix(".removed"))
                partial.rename(final)
                if save_total_limit:
                    for old in _complete_checkpoints(root)[:-save_total_limit]:
                        old.rename(old.with_suffix(".removed"))
                _remove_leftovers(root)
    except Exception:
        if distributed.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk the room is needed
        raise
    return final


def load_checkpoint(
    distributed: DistributedModel, checkpoint: str | Path, output_dir: str | Path
) -> tuple[int, dict[str, Any]]:
    """Restore model, optimizer, schedule and random generators into a fresh `DistributedModel`. All ranks call it.

    Args:
        checkpoint: a folder written by `save_checkpoint`, or "last": the one saved most recently in `output_dir`.

    Returns: the number of updates done, and this rank's trainer state.
    Raises: CheckpointError if it is missing, incomplete, or was saved under settings that this run does not share.
    """
    folder = find_last_checkpoint(output_dir) if checkpoint == LAST else Path(checkpoint)
    manifest = _read_manifest(folder)
    _require_same_settings(folder, manifest["settings"], _settings(distributed))
    state = torch.load(folder / _rank_file(distributed.rank), map_location="cpu", weights_only=False)
    distributed.load(folder, DEEPSPEED_TAG)
    _restore_rng(distributed, state["rng"])
    return manifest["step"], state["trainer"]


def find_last_checkpoint(output_dir: str | Path) -> Path:
    """The complete checkpoint saved most recently: after a restart from an earlier one, not the highest step."""
    checkpoints = _complete_checkpoints(Path(output_dir) / "checkpoints")
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


def _settings(distributed: DistributedModel) -> dict[str, Any]:
    """What a resume must share with the run that saved, under the names a user would change."""
    optim = asdict(distributed.optim)
    return {
        "world size (number of processes)": distributed.world_size,
        "deepspeed.zero_optimization.stage": distributed.zero_stage,
        "model.dtype": str(distributed.dtype).removeprefix("torch."),
        "device type": distributed.device.type,
        **{f"optim.{name}": optim[name] for name in RESTORED_OPTIM_FIELDS},
    }


def _require_same_settings(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    differences = [
        f"{name} was {saved.get(name)!r} and is {value!r} now"
        for name, value in current.items()
        if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{folder} cannot be resumed exactly: {'; '.join(differences)}. Restore the first value of each, "
            "or start a new run from an exported model (model.path)"
        )


def _write_manifest(distributed: DistributedModel, folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    missing = [_rank_file(rank) for rank in range(distributed.world_size) if _rank_file(rank) not in files]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing}; put run.output_dir on a disk that all processes share")
    manifest = {"step": step, "saved_at_ns": time.time_ns(), "settings": _settings(distributed), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _parse_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking every file it lists."""
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist; give an existing folder, or {LAST!r}")
    if not _is_complete(folder):
        raise CheckpointError(f"checkpoint {folder} has no whole {MANIFEST}: saving did not finish; use an earlier one")
    manifest = _parse_manifest(folder)
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


def _remove_leftovers(root: Path) -> None:
    """Remove unfinished and outdated folders, which are renamed first: half a folder never has a checkpoint's name."""
    for suffix in (".partial", ".removed"):
        for path in root.glob(f"step-*{suffix}"):
            shutil.rmtree(path)
