"""Kernels compiled for a GPU that is not there: launches become compilations, cubins are read with its own tools."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastr1_kernels import dispatch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VOCABULARY = 151_936


class Compiled:
    """A kernel that would have been launched."""

    def __init__(self, function: Any, kernel: Any) -> None:
        self.name, self.kernel = function.__name__, kernel


class FakeDriver:
    """Enough of a driver for triton to choose a target; it has no GPU."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # a cache of compiled kernels for each

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compilations() -> Iterator[list[Compiled]]:
    """Kernels compiled in the place of launches, for the architecture that `target` sets."""
    compiled: list[Compiled] = []
    original = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self, kernel))
        return kernel

    previous = driver._active
    # CPU tensors take the way of GPU tensors.
    with patch.object(JITFunction, "run", compile_only), patch.object(dispatch, "INTERPRETED", True):
        yield compiled
    driver._active = previous


def target(architecture: int) -> None:
    driver.set_active(FakeDriver(architecture))


def logits_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is never touched, however large."""
    return torch.empty(*shape, dtype=dtype).requires_grad_()


def read_cubin(kernel: Any, option: str) -> str:
    """What cuobjdump prints of a compiled kernel."""
    if not CUOBJDUMP.exists():
        pytest.skip(f"this triton has no {CUOBJDUMP.name}")
    return _print_cubin(kernel.asm["cubin"], option)


@functools.cache
def _print_cubin(cubin: bytes, option: str) -> str:
    """Kept, as a disassembly takes 0.4 s and several tests ask for the same kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], check=True, capture_output=True, text=True).stdout


def resources(kernel: Any) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one function of a cubin."""
    text = read_cubin(kernel, "--dump-resource-usage")
    (line,) = [line for line in text.splitlines() if "REG:" in line]
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
