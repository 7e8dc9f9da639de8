"""Helpers shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from shared_data import shared_path  # noqa: F401  # for the tests of the kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@pytest.fixture(params=KERNEL_DEVICES)
def kernel_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where Triton kernels run. New memory is filled with NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)
