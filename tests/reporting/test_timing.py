"""Seconds per phase and peak memory."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastr1.reporting.timing import PhaseTimer, machine_metrics, peak_memory_bytes


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


class TwoRanks:
    """Ranks of which the other one needed this much."""

    def __init__(self, **other: float) -> None:
        self.other = other

    def gather_objects(self, value: dict[str, float]) -> list[dict[str, float]]:
        return [value, {**dict.fromkeys(value, 0.0), **self.other}]

    def sum_across_ranks(self, tensor: Any) -> Any:
        raise AssertionError("a maximum is asked for")


def test_the_rank_that_needed_most_is_reported() -> None:
    timer = PhaseTimer("cpu")
    with timer.phase("train"):
        time.sleep(0.02)
    ranks = TwoRanks(**{"time/step_seconds": 9.0, "peak_memory_bytes": float(1 << 60), "training": 8.0})
    metrics = machine_metrics(ranks, timer, num_tokens=16.0)
    assert metrics["peak_memory_bytes"] == 1 << 60
    assert metrics["time/step_seconds"] == 9
    assert metrics["time/train_seconds"] >= 0.02  # here this rank was the slower one
    assert metrics["tokens_per_second"] == 2
    assert set(metrics) == {"peak_memory_bytes", "time/step_seconds", "time/train_seconds", "tokens_per_second"}


def test_tokens_per_second_without_any_training_is_no_number() -> None:
    metrics = machine_metrics(TwoRanks(), PhaseTimer("cpu"), num_tokens=16.0)
    assert math.isnan(metrics["tokens_per_second"])
