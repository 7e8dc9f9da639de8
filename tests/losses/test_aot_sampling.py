"""The sampling kernels compiled for GPUs that are not there: no spills, wide loads, few variants, one launch.

Nothing here needs a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from compiled_kernels import VOCABULARY, Compiled, compilations, read_cubin, resources, target

from fastr1_kernels import sample_tokens

EVERYTHING = {"top_k": 50, "top_p": 0.9, "min_p": 0.1}
MANY = 300  # rows: enough for a GPU without splitting them


@pytest.fixture
def launches() -> Iterator[list[Compiled]]:
    with compilations() as compiled:
        yield compiled


def call(
    rows: int = MANY,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    some: bool = False,
    **options: Any,
) -> None:
    numbers = torch.zeros(2, rows, dtype=torch.int64)
    allowed = torch.ones(vocabulary, dtype=torch.bool) if some else None
    logits = torch.empty(rows, vocabulary, dtype=dtype)
    sample_tokens(logits, *numbers, allowed=allowed, check_values=False, **options)


# Call, and the most registers of a thread. Lower the numbers with the code, never raise them.
CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 128),
    "float32": ({"dtype": torch.float32}, 128),
    "greedy": ({"temperature": 0}, 128),
    "few_rows": ({"rows": 8}, 128),
    "allowed": ({"some": True}, 168),
    "truncated": (EVERYTHING, 168),
    "unaligned": ({"vocabulary": VOCABULARY + 1}, 168),
    "unaligned_truncated": ({"vocabulary": VOCABULARY + 1, "some": True, **EVERYTHING}, 168),
}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("options", "registers"), CALLS.values(), ids=CALLS.keys())
def test_registers_suffice(
    launches: list[Compiled], options: dict[str, Any], registers: int, architecture: int
) -> None:
    target(architecture)
    call(**options)
    names = [c.name for c in launches]
    bounds = ["bound_rows_kernel"] * ("top_k" in options)
    assert names == [*bounds, "draw_rows_kernel", *["merge_parts_kernel"] * (options.get("rows") == 8)]
    for c in launches:
        used = resources(c.kernel)
        assert used["STACK"] == used["LOCAL"] == 0, (c.name, used)
        assert used["REG"] <= registers, (c.name, used)


@pytest.mark.parametrize("options", [{}, {"rows": 8}, EVERYTHING], ids=["plain", "few_rows", "truncated"])
def test_logits_are_loaded_16_bytes_at_a_time_and_once(launches: list[Compiled], options: dict[str, Any]) -> None:
    target(90)
    call(**options)
    for c in launches:
        if c.name == "draw_rows_kernel":
            loads = re.findall(r"LDG\.E\S*", read_cubin(c.kernel, "-sass"))
            # 16 logits of 2 bytes a thread in the one loop; beside them a few numbers of the row.
            assert sum("128" in x for x in loads) == 2, loads
            assert len(loads) <= 6


def test_variants_do_not_grow_with_the_number_of_rows(launches: list[Compiled]) -> None:
    target(90)
    for rows in (1, 2, 3, 8, 9, 16, 33, 64, 128, 263, 264, 300):
        call(rows, 64_000, torch.float32)
    found = {name: {c.kernel.hash for c in launches if c.name == name} for name in {c.name for c in launches}}
    # Split rows and whole ones.
    assert {name: len(hashes) for name, hashes in found.items()} == {"draw_rows_kernel": 2, "merge_parts_kernel": 1}
