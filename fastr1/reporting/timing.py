"""Seconds per phase of a step, peak memory, and the largest of both over the ranks."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastr1.reporting.statistics import Metrics, Ranks, maxima


class PhaseTimer:
    """Seconds spent in each named phase of a step, e.g. vision, rollout, reward, reference, train, optimizer.

    On a CUDA device the queue is drained at both ends of a phase, so that a phase is charged for its own kernels.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._seconds: dict[str, float] = {}
        self._is_open = False
        self._step_start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`. Phases do not nest: seconds would count twice."""
        assert not self._is_open, f"phase {name!r} was opened inside another phase"
        self._is_open = True
        start = self._now()
        try:
            yield
        finally:
            self._is_open = False
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    @property
    def seconds(self) -> dict[str, float]:
        """`time/<phase>_seconds` of every phase since the last call of `pop_seconds`."""
        return {f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()}

    def pop_seconds(self) -> dict[str, float]:
        """`seconds`, and `time/step_seconds`, all time since the last call; starts anew."""
        now = self._now()
        result = {**self.seconds, "time/step_seconds": now - self._step_start}
        self._seconds = {}
        self._step_start = now
        return result

    @property
    def device(self) -> torch.device:
        """What is timed."""
        return self._device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def machine_metrics(ranks: Ranks, timer: PhaseTimer, num_tokens: float) -> Metrics:
    """Seconds since the last call and peak memory, of the rank that needed most; tokens per second of training, which
    is as fast as the slowest rank (not a number where nothing was trained). All ranks call it."""
    seconds = timer.pop_seconds()
    training = training_seconds(seconds)
    most = maxima(ranks, {**seconds, "training": training, "peak_memory_bytes": float(peak_memory_bytes(timer.device))})
    training = most.pop("training")
    return {"tokens_per_second": num_tokens / training if training else math.nan, **most}


def training_seconds(seconds: Mapping[str, float]) -> float:
    """The phases of `PhaseTimer.pop_seconds` that an update consists of, added up."""
    aside = ("time/step_seconds", "time/evaluation_seconds", "time/checkpoint_seconds")
    return sum(taken for name, taken in seconds.items() if name.startswith("time/") and name not in aside)


def peak_memory_bytes(device: torch.device | str) -> int:
    """Peak memory so far: torch's allocations on a CUDA device (since its last reset), the process's RSS on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux KiB
