"""Ending a run early without losing it: signals become a request that all ranks agree on between two updates."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from fastr1.training.distributed import DistributedModel

logger = logging.getLogger(__name__)


class StopRequest:
    """Set by Ctrl-C or SIGTERM: the loop finishes its step, saves and leaves. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Install the handlers for the duration of the loop."""
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {s: signal.signal(s, self._handle) for s in signals}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        logger.warning("%s received: finishing this step, then saving", self.signal_name)

    def agreed(self, distributed: DistributedModel) -> bool:
        """Whether any rank was asked to stop; every rank calls this after each update."""
        return distributed.sum_across_ranks(torch.tensor(float(bool(self)))).item() > 0
