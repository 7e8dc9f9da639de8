"""Whether a run may use a folder, and what to type where it may not."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from fastr1.reporting.run_log import METRICS_FILE, ROLLOUTS_FILE
from fastr1.schema import DataError
from fastr1.training.agreement import agreement
from fastr1.training.checkpoint import CheckpointError, find_last_checkpoint
from fastr1.training.distributed import DistributedModel

LOCK_FILE = ".lock"  # locked while a run writes the folder; holds its process and machine

logger = logging.getLogger(__name__)


@contextmanager
def holding_folder(distributed: DistributedModel, folder: Path, *, is_resumed: bool) -> Iterator[None]:
    """Keep other runs out of the folder, which is made if needed. All ranks enter it.

    Raises: DataError where another run writes there, or has written there since the checks before the model.
    """
    with ExitStack() as held:
        with agreement(distributed):
            if distributed.rank == 0:
                held.enter_context(_lock(folder))
                if not is_resumed:
                    refuse_used_folder(folder)
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """The lock belongs to the process: one that is killed leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"another run is writing {folder} ({file.read().strip()}): wait for it or stop it, or choose another "
                "run.output_dir"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s: %s; nothing keeps another run out of it", folder / LOCK_FILE, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
