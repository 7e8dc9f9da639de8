"""Helpers shared by the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from quick_interpreter import hurry_interpreter

gc.disable()  # until all tests are collected
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    hurry_interpreter()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@dataclass(frozen=True)
class Backend:
    """What computes: plain torch, in float64, or the Triton kernels, in float32."""

    name: str  # torch | triton
    device: str
    dtype: torch.dtype
    tolerances: dict[str, float]  # for equal results that were added up in another order

    @property
    def has_kernels(self) -> bool:
        return self.name == "triton"

    def put(self, x: Any) -> Any:
        """Floats in the precision of the backend, other tensors as they are, both on its device."""
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(self.device, self.dtype) if x.is_floating_point() else x.to(self.device)

    def assert_close(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(got.cpu(), expected.cpu(), check_dtype=False, **self.tolerances)


TORCH = Backend("torch", "cpu", torch.float64, {"rtol": 1e-13, "atol": 1e-16})
INTERPRETER, GPU = (Backend("triton", d, torch.float32, {"rtol": 3e-6, "atol": 1e-7}) for d in ("cpu", "cuda"))
# The interpreter is chosen when triton is imported, so it has a process of its own: see losses/test_interpreter.py.
BACKENDS = [INTERPRETER] if INTERPRETED else [TORCH, pytest.param(GPU, marks=ON_GPU)]
KERNELS = [INTERPRETER] if INTERPRETED else [pytest.param(GPU, marks=ON_GPU)]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory is filled with NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS, ids=lambda backend: f"{backend.name}-{backend.device}")
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> Backend:
    """For tests of what torch and the kernels must both do."""
    return request.param


@pytest.fixture(params=KERNELS, ids=lambda backend: backend.device)
def kernels(request: pytest.FixtureRequest, poisoned_memory: None) -> Backend:
    """For tests of what only the kernels do."""
    return request.param


@pytest.fixture
def kernel_device(kernels: Backend) -> str:
    return kernels.device


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With the interpreter only tests that run kernels are of interest."""
    if INTERPRETED:
        kept = [i for i in items if {"backend", "kernels"} & set(getattr(i, "fixturenames", ()))]
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = kept


def pytest_collection_finish() -> None:
    """What all libraries have loaded by now stays, so no collection of garbage looks through it; DeepSpeed asks for
    several whenever an engine is made."""
    gc.freeze()
    gc.enable()
