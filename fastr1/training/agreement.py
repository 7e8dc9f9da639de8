"""An error on one rank becomes an error on every rank, at places where all ranks meet.

A rank that leaves alone leaves the others waiting in their next collective operation, and a checkpoint needs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import torch

if TYPE_CHECKING:
    from fastr1.training.distributed import DistributedModel

E = TypeVar("E", bound=Exception)


class PeerError(ValueError):
    """Another rank failed, and reports it; the message repeats what it said."""


@contextmanager
def agreement(distributed: DistributedModel) -> Iterator[None]:
    """Work that may fail on one rank alone, with no collective operation inside. All ranks enter it.

    Raises: on the lowest rank that failed its error, on the others PeerError; `is_on_every_rank` is true of both.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    if distributed.world_size > 1:
        if not distributed.sum_across_ranks(torch.tensor(float(error is not None))).item():
            return
        texts = distributed.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        first = next(rank for rank, text in enumerate(texts) if text is not None)
        if first != distributed.rank:
            raise on_every_rank(PeerError(f"rank {first} failed: {texts[first]}")) from error
    if error is not None:
        raise on_every_rank(error)


def on_every_rank(error: E) -> E:
    """The error, marked as one that every rank raises at the same place."""
    error.__dict__["is_on_every_rank"] = True
    return error


def is_on_every_rank(error: BaseException) -> bool:
    """Whether all ranks know of it, so that they can go on to do something together."""
    return bool(getattr(error, "is_on_every_rank", False))


@contextmanager
def collected_write_errors(engine: Any) -> Iterator[list[Exception]]:
    """The errors of a DeepSpeed engine's writing, to be looked at after it: it waits for all ranks between two files,
    so none may leave. After the first error the rest is not written."""
    errors: list[Exception] = []
    writer, save, copy = engine.checkpoint_engine, engine.checkpoint_engine.save, engine._copy_recovery_script

    def guarded(write: Callable[..., Any]) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                if not errors:
                    write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return attempt

    def save_to_file(state_dict: Any, path: str) -> None:
        with opened_for_torch(path) as file:
            save(state_dict, file)

    is_torch = type(writer).__name__ == "TorchCheckpointEngine"
    writer.save, engine._copy_recovery_script = guarded(save_to_file if is_torch else save), guarded(copy)
    try:
        yield errors
    finally:
        del writer.save, engine._copy_recovery_script


@contextmanager
def opened_for_torch(path: str | Path) -> Iterator[BinaryIO]:
    """A new file for `torch.save`, which hides why it could not write: no space left, quota exceeded.

    Raises: OSError with the reason and the path.
    """
    try:
        with open(path, "wb") as file:
            yield file
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise
