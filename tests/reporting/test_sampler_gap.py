"""The distance between sampler and trainer, against its formulas by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastr1.reporting.sampler_gap import SamplerGap


class Alone:
    def sum_across_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def test_distance_is_that_of_its_formulas_over_all_that_was_added() -> None:
    gap = SamplerGap(torch.device("cpu"))
    ratios = torch.tensor([0.5, 3.0, 1.0])
    sampler = torch.tensor([-1.0, -2.0, -0.5])
    trainer = sampler + ratios.log()
    gap.add(trainer[:1], sampler[:1])
    gap.add(trainer[1:], sampler[1:])
    gap.add(trainer[:0], sampler[:0])
    assert gap.metrics(Alone()) == pytest.approx(
        {
            "sampler_gap": math.log(2 * 3) / 3,
            "sampler_k3": (0.5 - 1 + math.log(2) + 3 - 1 - math.log(3)) / 3,
            "sampler_ratio_max": 3.0,
            "sampler_ess": 4.5**2 / (3 * 10.25),
        },
        abs=1e-6,
    )


def test_nothing_is_no_distance() -> None:
    gap = SamplerGap(torch.device("cpu"))
    gap.add(torch.zeros(0), torch.zeros(0))
    assert gap.metrics(Alone()) == {
        "sampler_gap": 0.0,
        "sampler_k3": 0.0,
        "sampler_ratio_max": 1.0,
        "sampler_ess": 1.0,
    }
