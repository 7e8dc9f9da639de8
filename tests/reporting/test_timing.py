"""Seconds per phase and peak memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from fastr1.reporting.timing import PhaseTimer, peak_memory_bytes


def test_phases_add_up_and_are_reset_by_reading() -> None:
    timer = PhaseTimer("cpu")
    for _ in range(2):
        with timer.phase("vision"):
            time.sleep(0.02)
    with timer.phase("train"):
        time.sleep(0.01)
    time.sleep(0.03)  # in no phase
    first = timer.pop_seconds()
    assert set(first) == {"time/vision_seconds", "time/train_seconds", "time/step_seconds"}
    assert first["time/vision_seconds"] >= 0.04
    assert 0.01 <= first["time/train_seconds"] < first["time/vision_seconds"]
    assert first["time/step_seconds"] >= first["time/vision_seconds"] + first["time/train_seconds"] + 0.03
    second = timer.pop_seconds()
    assert set(second) == {"time/step_seconds"}
    assert second["time/step_seconds"] < first["time/step_seconds"]


def fail_after_a_while() -> None:
    time.sleep(0.01)
    raise KeyError


def test_a_phase_that_fails_is_counted_and_closed() -> None:
    timer = PhaseTimer("cpu")
    with pytest.raises(KeyError), timer.phase("reward"):
        fail_after_a_while()
    with timer.phase("train"):
        pass
    assert timer.pop_seconds()["time/reward_seconds"] >= 0.01


def test_phases_do_not_nest() -> None:
    timer = PhaseTimer("cpu")
    with timer.phase("a"), pytest.raises(AssertionError, match="b"), timer.phase("b"):
        pass


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of resident pages")
def test_peak_memory_of_a_process_is_in_bytes_and_at_least_what_it_holds() -> None:
    block = torch.ones(8 << 20)  # 32 MiB, touched
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = peak_memory_bytes("cpu")
    assert block.nbytes < resident <= peak + (1 << 20)  # the kernel counts pages in batches
    assert peak < 100 * resident  # KiB taken for bytes, or the reverse, would be a factor of 1024
