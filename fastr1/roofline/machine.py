"""What a machine can do: the rate of its matrix products and of its memory, measured in about two seconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SIZES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}  # of square matrices, smallest first
_COPY_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}  # beyond any cache
_SECONDS = 0.4  # for each size and for the copies
_BLOCK_SECONDS = 0.01  # timed in one piece, so that reading the clock does not count


@dataclass(frozen=True)
class Machine:
    """The two rates that bound every phase of a step."""

    name: str
    gemm_flops_per_second: float
    bytes_per_second: float  # read and written together

    def __str__(self) -> str:
        tera, giga = self.gemm_flops_per_second / 1e12, self.bytes_per_second / 1e9
        return f"{self.name}: {tera:.3g} TFLOP/s in matrix products, {giga:.3g} GB/s in copies"


def probe_machine(device: torch.device | str, dtype: torch.dtype) -> Machine:
    """The best rates of square matrix products in `dtype` and of large copies on `device`; measured once per process.

    Other work on the device at that moment lowers them. On a CPU they are those of torch's current number of threads,
    and a model that fits into its caches is read faster than a copy is made.
    """
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return _probe(place, dtype, torch.get_num_threads())


@functools.cache
def _probe(device: torch.device, dtype: torch.dtype, num_threads: int) -> Machine:
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else f"CPU with {num_threads} threads"
    return Machine(name, _gemm_rate(device, dtype), _copy_rate(device))


def _gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the size that does best; a size that would take longer than its share of time is left out."""
    best = 0.0
    generator = torch.Generator(device).manual_seed(0)
    for size in _SIZES[device.type]:
        flops = 2.0 * size**3
        if best and flops / best > _SECONDS / 2:
            break
        left, right = (torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        best = max(best, flops / _best_seconds(functools.partial(torch.mm, left, right, out=out), device))
    return best


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2.0 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the best block of calls within `_SECONDS`, after a first call that does not count."""
    start = _now(device)
    call()
    call()
    between = _now(device)
    num_calls = max(1, int(_BLOCK_SECONDS / (between - start)))
    best = float("inf")
    while True:
        for _ in range(num_calls):
            call()
        now = _now(device)
        best, between = min(best, (now - between) / num_calls), now
        if now - start > _SECONDS:
            return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
