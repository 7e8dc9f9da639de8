"""What a run keeps: checkpoints by updates, by the clock, when it is asked to stop, and before an error ends it."""

from __future__ import annotations

import copy
import errno
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastr1.config import RunConfig
from fastr1.training.agreement import PeerError, is_on_every_rank
from fastr1.training.checkpoint import random_state, save_checkpoint
from fastr1.training.distributed import DistributedModel
from fastr1.training.stop import RESUME, SAME_COMMAND, StopRequest

logger = logging.getLogger(__name__)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(ValueError):
    """A file of the run could not be written. The message names it, the reason, and what was kept."""


class Keeper:
    """Knows the last finished update and the last checkpoint.

    Args:
        trainer_state: what a checkpoint holds beside the model, as of now.
        step: updates done by the checkpoint the run was resumed from, 0 for a new run.
        saved: that checkpoint.
        settings: what a run that goes on from a checkpoint must share.

    Attributes: step (updates finished), go_on (what to type to go on from the last checkpoint).
    """

    def __init__(
        self,
        distributed: DistributedModel,
        run: RunConfig,
        stop: StopRequest,
        trainer_state: Callable[[], dict[str, Any]],
        *,
        step: int = 0,
        saved: Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._distributed = distributed
        self._run = run
        self._stop = stop
        self._settings = settings or {}
        self._trainer_state = trainer_state
        self._saved: Path | None = None
        self._saved_at = time.monotonic()
        self.finished(step)
        self.go_on = RESUME
        if saved is not None:
            self.go_on = SAME_COMMAND  # names that checkpoint, which need not be the last one of this run's folder
            self._note_saved(saved)

    def finished(self, step: int) -> None:
        """Update `step` was applied: note all that a checkpoint of it needs and that later work will change."""
        self._distributed.finish_update()
        self.step, self._is_saved, self._has_failed = step, False, False
        self._state = copy.deepcopy(self._trainer_state())
        self._random = random_state(self._distributed)

    def is_due(self) -> bool:
        """Whether a checkpoint should be written by now, as far as this rank can tell."""
        run, minutes = self._run, (time.monotonic() - self._saved_at) / 60
        is_time = self._distributed.rank == 0 and 0 < run.save_minutes <= minutes
        return is_time or bool(run.save_steps and self.step % run.save_steps == 0)

    def save(self) -> Path:
        """Write the last finished update, unless that was done. All ranks call it.

        Raises: what writing raises, on every rank; the checkpoint before it is still there then.
        """
        if self._saved is None or not self._is_saved:
            self._has_failed = True
            folder = save_checkpoint(
                self._distributed,
                self._run.output_dir,
                self.step,
                self._state,
                save_total_limit=self._run.save_total_limit,
                generators=self._random,
                settings=self._settings,
            )
            self._has_failed = False
            self.go_on = RESUME
            self._note_saved(folder)
        assert self._saved is not None
        self._saved_at = time.monotonic()
        return self._saved

    def _note_saved(self, folder: Path) -> None:
        self._saved, self._is_saved = folder, True
        self._stop.kept = f"update {self.step} is saved in {folder}: {self.go_on}"

    def rescue(self, error: Exception) -> Exception:
        """Save the last finished update before `error` ends the run, where the state in memory is still that update's.

        Returns: what to raise: the error with what was kept in its message.
        """
        kept = self._keep(error)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = error.filename or self._run.output_dir
            disk_error = DiskError(f"cannot write {where}: {error.strerror}; free some space there. {kept}")
            disk_error.__dict__.update(error.__dict__)
            return disk_error
        if isinstance(error, ValueError) and type(error).__module__.startswith("fastr1."):
            error.args = (f"{str(error).rstrip('.')}. {kept}",)
        elif not isinstance(error, PeerError):
            logger.error("%s", kept)
        return error

    def _keep(self, error: Exception) -> str:
        """Saves if that can be done; what is there to go on from, as a sentence."""
        if self.step == 0:
            return "No update was finished: start again with the same command"
        reason = ""
        if not self._is_saved:
            reason = self._reason_not_to_save(error)
            if not reason:
                try:
                    self.save()
                except Exception as failure:  # the error that ends the run is the first one
                    reason = f"{failure}"
        if not reason:
            return f"Update {self.step} is saved in {self._saved}: {self.go_on}"
        last = (
            f"the last complete checkpoint is {self._saved}: {self.go_on}" if self._saved else "there is no checkpoint"
        )
        return f"Update {self.step} could not be saved ({reason}); {last}"

    def _reason_not_to_save(self, error: Exception) -> str:
        if self._distributed.is_updating:
            return "the next one is half done"
        if self._has_failed:
            return "writing it failed"
        if self._distributed.world_size > 1 and not is_on_every_rank(error):
            return "the error was on one rank alone"
        return ""
