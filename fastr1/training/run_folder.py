"""Whether a new run may use a folder, and what to type where it may not."""

from __future__ import annotations

import shlex
from itertools import count
from pathlib import Path

from fastr1.reporting.run_log import METRICS_FILE, ROLLOUTS_FILE
from fastr1.schema import DataError
from fastr1.training.checkpoint import CheckpointError, find_last_checkpoint


def refuse_used_folder(folder: Path) -> None:
    """A new run would mix its log and checkpoints with those of the run before it. A run that finished no update left
    neither.

    Raises: DataError with the options to type.
    """
    found = traces_of_a_run(folder)
    if not found:
        return
    elsewhere = next(name for number in count(2) if not (name := Path(f"{folder}-{number}")).exists())
    try:
        last = None if (folder / "final").exists() else find_last_checkpoint(folder)
    except CheckpointError:
        last = None
    go_on = f", or --set run.resume_from_checkpoint=last to go on with it from {last.name}" if last else ""
    keep, remove = (shlex.quote(str(path)) for path in (elsewhere, folder))
    raise DataError(
        f"{folder} holds an earlier run ({', '.join(found)}): add --set run.output_dir={keep} to the command to keep "
        f"it{go_on}, or remove it first: rm -r {remove}"
    )


def traces_of_a_run(folder: Path) -> list[str]:
    """What a run that finished an update left there, as names below the folder."""
    found = [name for name in (METRICS_FILE, ROLLOUTS_FILE) if _has_content(folder / name)]
    found += [f"checkpoints/{path.name}" for path in (folder / "checkpoints").glob("step-*") if not path.suffix]
    return found + ["final"] * (folder / "final").exists()


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
