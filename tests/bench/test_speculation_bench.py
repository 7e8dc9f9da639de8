"""The bench of speculation compares like with like, and counts what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastr1.config import PACKAGE
from fastr1.models import load_model, load_processor

# The benches are no package. At the end of the path: a conftest is there too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
bench = pytest.importorskip("speculation", reason="bench/ is not there")


def test_a_second_epoch_is_the_same_and_takes_fewer_steps() -> None:
    folder = PACKAGE / "demo" / "base_model"
    model, processor = load_model(folder, device="cpu", dtype="float32").eval(), load_processor(folder)
    side = model.config.vision.image_size
    generator = torch.Generator().manual_seed(0)
    updates = [
        ([processor.prompt_ids(question)], [torch.randn(8, 3, side, side, generator=generator)])
        for question in ("Which shape moves first?", "How often does the red shape flash?")
    ]
    found = bench.measure(model, model, processor, updates, 4)
    assert found["same_completions"] == found["completions"] == bench.GROUP
    assert found["tokens"] == found["decoded"] + bench.GROUP
    assert found["rows"] == pytest.approx(found["forwards"] + found["guessed"])
    assert found["decoded"] == pytest.approx(found["forwards"] + found["right"])
    assert 1 < found["mean_acceptance_length"] < 5
    assert found["plain_steps"] > found["speculative_steps"]
    assert found["time_over_plain"] == pytest.approx(found["speculative_ms"] / found["plain_ms"])
