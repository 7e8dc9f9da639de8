"""How it is measured: one set-up for time and memory, results checked before a time is kept, a row for everything.

A group is a case on this device: its inputs, its reference in float64, its measured floor, and one row per provider.
Ours is measured a second time at once; how far the medians are apart is the spread of unchanged code, and it stands
beside every ratio of the group. A provider that needs seconds gets fewer rounds: the row says how many.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from shapes import FIRST_CALL_TARGET, AnyCase, target_ms
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SEED = 0
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # of the error's norm over that of the reference
SLOW_MS = 3000.0  # of all rounds of a provider, roughly
SLOW_CALL_MS = 1500.0  # a call that takes longer is measured once
ENDLESS_CALL_MS = 60_000.0  # a first call that takes longer is the only one
CPU_SLOW_MS = 2000.0  # of all rounds on a CPU
CPU_QUICK_CALL_MS = 300.0  # there a call that takes longer is not made once more for its memory
FLUSHED_BYTES = 256 * 2**20  # more than any L2 cache

Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]


class UnavailableError(Exception):
    """Why a provider does not run here."""


@dataclass
class Group:
    """What the providers of one case share."""

    case: AnyCase
    inputs: Any
    gold: Outputs
    scales: dict[str, float]  # what the error of an output is relative to
    floor_ms: float | None
    work: tuple[float, str] | None  # of one call: bytes or floating-point operations, and the unit of their rate
    tolerance: float | None = None  # None: that of the dtype; ours is held to that one in any case
    rows: list[dict[str, Any]] = field(default_factory=list)
    spread: float | None = None

    @property
    def strict_tolerance(self) -> float:
        """What ours is held to."""
        return TOLERANCES[self.case.dtype]

    def errors(self, outputs: Outputs) -> dict[str, float]:
        if set(outputs) != set(self.gold):
            raise ValueError(f"outputs {sorted(outputs)}: expected {sorted(self.gold)}")
        return {name: distance(x, self.gold[name]) / self.scales[name] for name, x in outputs.items()}


def distance(got: Tensor, gold: Tensor) -> float:
    """Norm of the difference in float64, a few rows at a time."""
    got, gold = got.detach().reshape(-1), gold.reshape(-1)
    parts = zip(got.split(1 << 24), gold.split(1 << 24), strict=True)
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in parts))


def norm(x: Tensor) -> float:
    """In float64, a few rows at a time."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in x.detach().reshape(-1).split(1 << 24)))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text or "out of memory" in text
    )


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Peak of one call above what was there before it: of the GPU's allocator, or of the process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        return None
    before = resident_bytes("VmRSS")
    call()
    return max(resident_bytes("VmHWM") - before, 0)


def resident_bytes(name: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def time_ms(call: Callable[[], object], rounds: int) -> float:
    """Median of a few calls after one: for floors."""
    call()
    times = []
    for _ in range(rounds):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def flush_cache() -> None:
    """Write more memory than the cache holds."""
    if torch.cuda.is_available():
        torch.zeros(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()


def measure(group: Group, name: str, make: Callable[[Any], Call], benchmark: Any, rounds: int) -> dict[str, Any]:
    """Check, then measure one provider of a group; the row, which is in the group too."""
    row: dict[str, Any] = {"provider": name, "status": "ok"}
    group.rows.append(row)
    try:
        call = make(group.inputs)
        first: list[Outputs] = []
        row["peak_bytes"] = peak_bytes(lambda: row.update(first_ms=first_call_ms(call, first)))
        row["errors"] = group.errors(first.pop())
        strict = group.strict_tolerance
        tolerance = strict if name.startswith("ours") else group.tolerance or strict
        row["match"] = all(e <= tolerance for e in row["errors"].values())
        if not row["match"]:
            row["status"] = "mismatch"
            return row
        times = time_and_memory(call, row, group.case, benchmark, rounds)
    except UnavailableError as error:
        row.update(status="skipped", reason=str(error))
        return row
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        row["status"] = "out of memory"
        del error
        free_memory()
        return row
    row.update(summary(times))
    if group.spread is None and name == "ours":
        again = [time_ms_once(call, group.case) for _ in times]
        group.spread = abs(statistics.median(again) / row["median_ms"] - 1)
    finish(row, group)
    free_memory()
    return row


def first_call_ms(call: Call, outputs: list[Outputs]) -> float:
    synchronise()
    start = time.perf_counter()
    outputs.append(call())
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def time_and_memory(call: Call, row: dict[str, Any], case: AnyCase, benchmark: Any, rounds: int) -> list[float]:
    """Milliseconds of each round; the memory is that of a call before them, or of the only one where a call is slow. On
    a CPU that of the first call, unless it compiles, which says nothing about the next, or a call is quick."""
    times: list[float] = []
    compiles = "compile" in row["provider"]
    first_ms = row["first_ms"]
    if first_ms > ENDLESS_CALL_MS and not compiles:
        return [first_ms]
    if device().type == "cpu" and first_ms > CPU_QUICK_CALL_MS and not compiles:
        few = 1 if first_ms > SLOW_CALL_MS else 2
        return timed(call, case, benchmark, max(few, min(rounds, int(CPU_SLOW_MS / first_ms))))
    if first_ms > SLOW_CALL_MS and not compiles:
        row["peak_bytes"] = peak_bytes(lambda: times.extend(timed(call, case, benchmark, 1)))
        return times
    row["peak_bytes"] = peak_bytes(lambda: times.append(time_ms_once(call, case)))
    return timed(call, case, benchmark, max(2, min(rounds, int(SLOW_MS / times[0]))))


def timed(call: Call, case: AnyCase, benchmark: Any, rounds: int) -> list[float]:
    """Milliseconds of each round, as pytest-benchmark measured them. The device is waited for inside."""

    def synchronised() -> None:
        call()
        synchronise()

    benchmark.pedantic(synchronised, setup=flush_cache if case.cold else None, rounds=rounds, iterations=1)
    stats = benchmark.stats
    return [1e3 * t for t in stats.stats.data] if stats else [time_ms_once(call, case)]


def time_ms_once(call: Call, case: AnyCase) -> float:
    if case.cold:
        flush_cache()
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def summary(times: list[float]) -> dict[str, float]:
    """Median, and the 20 % and 80 % points (the nearest rounds)."""
    ordered = sorted(times)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return {"median_ms": statistics.median(ordered), "p20_ms": low, "p80_ms": high, "rounds": len(ordered)}


def finish(row: dict[str, Any], group: Group) -> None:
    median = row["median_ms"]
    row["first_over_steady"] = row["first_ms"] / median
    row["floor_fraction"] = group.floor_ms / median if group.floor_ms else None
    if group.work is not None:
        amount, unit = group.work
        row["rate"], row["unit"] = amount / median / (1e9 if unit == "TFLOP/s" else 1e6), unit
    target = target_ms(group.case, device_name())
    if target is not None and row["provider"] == "ours":
        row.update(
            target_ms=target, passes=median <= target, passes_first=row["first_over_steady"] <= FIRST_CALL_TARGET
        )


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def complete_rows(group: Group) -> list[dict[str, Any]]:
    """The rows of a group as they are stored: with the case, the machine, and how many times as long as ours."""
    ours = next((row.get("median_ms") for row in group.rows if row["provider"] == "ours"), None)
    case = group.case
    common = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "dead": case.dead, "cold": case.cold}
    common |= {"frozen": case.frozen, "seed": SEED, "floor_ms": group.floor_ms, "spread": group.spread}
    rows = []
    for row in group.rows:
        ratio = row["median_ms"] / ours if ours and "median_ms" in row else None
        rows.append({**common, **row, "time_over_ours": ratio})
    return rows


def append_rows(groups: list[Group], machine: dict[str, Any], folder: Path = RESULTS) -> None:
    """To the file of each case: the rows of losses and of loading are not read together."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups:
        with (folder / group.case.results).open("a") as file:
            for row in complete_rows(group):
                file.write(json.dumps({**machine, **row}) + "\n")


@lru_cache(maxsize=1)
def machine_info() -> dict[str, Any]:
    """As it was at the first call: at the start of the run, when the code was loaded."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **commit_info(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": version,
    }


def git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip()


def commit_info() -> dict[str, Any]:
    """Results do not make the tree dirty: they are written by the run itself."""
    changed = [line for line in git("status", "--porcelain", "-uno").splitlines() if "bench/results/" not in line]
    return {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(changed)}


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"CPU {names[0] if names else platform.machine()}"


def driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
