"""What is asked of a GPU: kernels that compile without spills for sm_80, sm_90 and sm_100, and launches that a CUDA
graph may replay, because nothing in them follows from lengths on the device. Nothing is executed here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastr1_kernels import add_rms_norm, decode_attention, dispatch, rope_and_store, swiglu

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from compiled_kernels import Compiled, compilations, resources, target
from triton.runtime.jit import JITFunction

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # largest block: CUDA C Programming Guide
HALF = torch.bfloat16


@pytest.fixture
def launches() -> Iterator[list[Compiled]]:
    with compilations() as compiled:
        yield compiled


def numbers(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def call_attention(
    heads: tuple[int, int] = (14, 2),
    d: int = 64,
    dtype: torch.dtype = HALF,
    group: int = 8,
    *,
    rows: int | None = None,
    places: int = 1000,
    steps: int = 512,
    prefix_lengths: Tensor | None = None,
    cu_rows: Tensor | None = None,
    suffix_lengths: Tensor | None = None,
    suffix_rows: Tensor | None = None,
) -> None:
    """Two prompts; memory that is never touched."""
    H, Hkv = heads
    R = 2 * group if rows is None else rows
    prefix, suffix = (torch.empty(n, Hkv, width, d, dtype=dtype) for n, width in ((2, places), (R, steps)))
    decode_attention(
        torch.empty(R, H, d, dtype=dtype),
        prefix,
        prefix,
        numbers(0, 0) if prefix_lengths is None else prefix_lengths,
        numbers(0, 0, 0) if cu_rows is None else cu_rows,
        suffix,
        suffix,
        torch.zeros(R, dtype=torch.int32) if suffix_lengths is None else suffix_lengths,
        scale=0.1,
        max_group=group,
        max_suffix_length=steps,
        suffix_rows=suffix_rows,
    )


def call_rotation(
    heads: tuple[int, int] = (28, 4),
    d: int = 128,
    dtype: torch.dtype = HALF,
    has_norm: bool = True,
    *,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    suffix_rows: Tensor | None = None,
) -> None:
    H, Hkv = heads
    q, k, v = (
        x.view(3, -1, d) for x in torch.empty(3, (H + 2 * Hkv) * d, dtype=dtype).split([H * d, *2 * [Hkv * d]], -1)
    )
    cache, table, weight = (torch.empty(*shape, dtype=dtype) for shape in ((3, Hkv, 64, d), (99, d), (d,)))
    rope_and_store(
        *(q, k, v, table, table),
        numbers(0, 0, 0, dtype=torch.long) if positions is None else positions,
        *(cache, cache),
        numbers(0, 0, 0) if lengths is None else lengths,
        **({"q_norm": weight, "k_norm": weight} if has_norm else {}),
        suffix_rows=suffix_rows,
    )


def call_norm(columns: int, dtype: torch.dtype = HALF) -> None:
    x = torch.empty(3, columns, dtype=dtype)
    add_rms_norm(x, x, x[0], 1e-6)


def call_swiglu(columns: int, dtype: torch.dtype = HALF) -> None:
    swiglu(*torch.empty(3, 2 * columns, dtype=dtype).chunk(2, -1))


# Calls with the largest number of registers of a thread over their kernels and architectures.
CALLS: dict[str, tuple[Callable[[], None], int]] = {
    "0.5B": (lambda: call_attention((14, 2), 64), 190),
    "7B": (lambda: call_attention((28, 4), 128), 180),
    "7B, groups of two": (lambda: call_attention((28, 4), 128, group=2), 150),
    "float16": (lambda: call_attention((28, 4), 128, torch.float16), 180),
    "groups of 16, two tiles": (lambda: call_attention((64, 8), 128, group=16), 200),
    "a head of keys each, d 80": (lambda: call_attention((32, 32), 80), 150),
    "d 96": (lambda: call_attention((32, 8), 96), 190),
    "d 192": (lambda: call_attention((8, 4), 192), 110),
    "d 256": (lambda: call_attention((8, 1), 256), 110),
    "float32, d 64": (lambda: call_attention((14, 2), 64, torch.float32), 120),
    "float32, d 128": (lambda: call_attention((28, 4), 128, torch.float32), 212),
    "demo": (lambda: call_attention((6, 2), 32, torch.float32), 120),
    "7B, five rows of a sequence": (
        lambda: call_attention((28, 4), 128, group=40, suffix_rows=numbers(*[0] * 80)),
        180,
    ),
    "demo, five rows of a sequence": (
        lambda: call_attention((6, 2), 32, torch.float32, group=40, suffix_rows=numbers(*[0] * 80)),
        120,
    ),
    "rotation, several rows of a sequence": (lambda: call_rotation(suffix_rows=numbers(0, 0, 1)), 32),
    "rotation": (lambda: call_rotation(has_norm=False), 32),
    "rotation with norms": (lambda: call_rotation(), 32),
    "rotation of float32, d 80": (lambda: call_rotation((16, 8), 80, torch.float32), 32),
    "norm": (lambda: call_norm(3584), 40),
    "norm of the longest row": (lambda: call_norm(16384), 64),
    "norm of float32": (lambda: call_norm(16384, torch.float32), 80),
    "swiglu": (lambda: call_swiglu(18944), 32),
}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("call", "registers"), CALLS.values(), ids=CALLS.keys())
def test_kernels_compile_without_spills(
    launches: list[Compiled], call: Callable[[], None], registers: int, architecture: int
) -> None:
    target(architecture)
    call()
    assert launches
    for item in launches:
        used = resources(item.kernel)
        assert used["STACK"] == used["LOCAL"] == 0, f"{item.name} spills on sm_{architecture}: {used}"
        assert max(used["SHARED"], item.kernel.metadata.shared) <= SHARED_MEMORY_BYTES[architecture]
        assert used["REG"] <= registers, f"{item.name}: {used}"


def test_what_would_spill_is_refused(launches: list[Compiled]) -> None:
    for call in (
        lambda: call_attention((8, 1), 136, torch.float32),
        lambda: call_attention((8, 1), 264),
        lambda: call_norm(16385),
    ):
        with pytest.raises(ValueError, match=r"of a GPU|on a GPU"):
            call()
    assert launches == []


def test_variants_do_not_grow_with_rows_and_caches(launches: list[Compiled]) -> None:
    target(90)
    for rows, places, steps in ((8, 1000, 512), (9, 1024, 1), (16, 1, 513), (48, 77, 16), (64, 16, 1024)):
        call_attention(rows=rows, places=places, steps=steps)
    hashes = {name: {c.kernel.hash for c in launches if c.name == name} for name in {c.name for c in launches}}
    assert {name: len(found) for name, found in hashes.items()} == {"prefix_kernel": 1, "suffix_kernel": 1}


@pytest.fixture
def keys() -> Iterator[list[Any]]:
    """Kernel, grid and every argument that is no tensor of each launch, with shape and strides of those that are."""
    seen: list[Any] = []

    def describe(x: Any) -> Any:
        return ("tensor", x.dtype, tuple(x.shape), x.stride()) if isinstance(x, Tensor) else x

    def record(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        names = {name: describe(x) for name, x in kwargs.items()}
        seen.append((self.__name__, grid, tuple(map(describe, args)), names))

    with patch.object(JITFunction, "run", record), patch.object(dispatch, "INTERPRETED", True):
        yield seen


ATTENTION_STATES = [
    {"prefix_lengths": numbers(*places), "cu_rows": numbers(0, *rows), "suffix_lengths": numbers(*([step] * 15), 3)}
    for places in ((0, 1), (1000, 1000), (37, 640))
    for rows in ((8, 16), (0, 0), (3, 5), (0, 7))
    for step in (0, 1, 511, 512)
]


def test_launches_of_attention_do_not_depend_on_lengths(keys: list[Any]) -> None:
    for state in ATTENTION_STATES:
        call_attention(**state)
    assert len(keys) == 2 * len(ATTENTION_STATES)
    assert all(key == first for first in keys[:2] for key in keys if key[0] == first[0])
    assert [key[0] for key in keys[:2]] == ["prefix_kernel", "suffix_kernel"]


def test_launches_do_not_depend_on_whose_the_rows_are(keys: list[Any]) -> None:
    for rows in ([0] * 16, [*range(16)], [7, 7, 7, 3] * 4):
        call_attention(suffix_rows=numbers(*rows))
        call_rotation(suffix_rows=numbers(*rows[:3]))
    assert [key[0] for key in keys[:3]] == ["prefix_kernel", "suffix_kernel", "rotate_kernel"]
    assert keys[:3] == keys[3:6] == keys[6:]


def test_launches_of_rotation_do_not_depend_on_positions(keys: list[Any]) -> None:
    for positions in ((0, 0, 0), (98, 4, 17)):
        for lengths in ((0, 0, 0), (63, -1, 64), (5, 6, 7)):
            call_rotation(positions=numbers(*positions, dtype=torch.long), lengths=numbers(*lengths))
    assert len(keys) == 6
    assert all(key == keys[0] for key in keys)


def test_launches_read_nothing(keys: list[Any]) -> None:
    # Reading a number of a tensor waits for a GPU and ends the capture of a graph.
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a number was read from a tensor")

    reads = ("tolist", "item", "__int__", "__bool__", "__float__", "__index__", "cpu", "numpy", "nonzero")
    patches = [patch.object(Tensor, name, refuse) for name in reads]
    for one in patches:
        one.start()
    try:
        call_attention(cu_rows=torch.zeros(3, dtype=torch.int32))
        call_attention(suffix_rows=torch.zeros(16, dtype=torch.int32))
        call_rotation()
        call_rotation(suffix_rows=numbers(0, 0, 0))
        call_norm(64)
        call_swiglu(64)
    finally:
        for one in patches:
            one.stop()
    assert len(keys) == 8


def test_few_prompts_are_split_to_fill_a_gpu(keys: list[Any]) -> None:
    for places in (100, 1000, 16_000):
        call_attention((14, 2), places=places)
    # Two prompts of two heads of keys, a tile of 56 rows.
    assert [key[1] for key in keys if key[0] == "prefix_kernel"] == [(4 * 1,), (4 * 8,), (4 * 32,)]
