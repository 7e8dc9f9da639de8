"""What the row kernels cost a GPU, read from their machine code: instructions per logit, registers, variants, order.

Counting. `cuobjdump -sass` lists the instructions of a kernel. A hot loop is what lies between a branch backwards and
its target, with an exp2 (MUFU.EX2) in it; the second pass is the one that stores to global memory. One turn of it
handles as many logits per thread as its loads (LDG) have bytes, divided by the bytes of a logit. The number that
counts is instructions of the turn per 16 logits of a thread: at 4 warp instructions per clock and multiprocessor the
kernels are bound by it before they are bound by memory. Nothing here needs a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from compiled_kernels import (
    VOCABULARY,
    Compiled,
    compilations,
    logits_of,
    read_cubin,
    resources,
    target,
)

from fastr1_kernels import grpo_loss, selective_log_softmax

LOAD_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # LDG.E.U16; LDG.E alone is 4


@pytest.fixture
def launches() -> Iterator[list[Compiled]]:
    with compilations() as compiled:
        yield compiled


def instructions(kernel: Any) -> list[tuple[int, str]]:
    """Address and text, predicates removed, of every instruction."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);", read_cubin(kernel, "-sass"), re.M)
    return [(int(address, 16), text.strip()) for address, text in lines]


def hot_loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Bodies of the loops with an exp2, from the first instruction to the branch back."""
    loops = []
    for address, text in code:
        branch = re.match(r"BRA\b.*0x([0-9a-f]+)", text)
        if branch and (first := int(branch[1], 16)) < address:
            body = [line for line in code if first <= line[0] <= address]
            loops += [body] if any("MUFU.EX2" in text for _, text in body) else []
    return loops


def is_store(line: tuple[int, str]) -> bool:
    return line[1].startswith("STG")


def cost(loop: list[tuple[int, str]], logit_bytes: int) -> float:
    """Instructions per 16 logits of a thread."""
    loads = [text.split()[0].split(".") for _, text in loop if text.startswith("LDG")]
    total = sum(next((LOAD_BYTES[p] for p in parts if p in LOAD_BYTES), 4) for parts in loads)
    return len(loop) * 16 * logit_bytes / total


def call_loss(
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (2, 3),
    inplace: bool = False,
    stride: int = 1,
    **options: Any,
) -> None:
    logits = logits_of((*shape, vocabulary * stride), dtype)[..., ::stride]
    logits = logits.view_as(logits) if inplace else logits  # no leaf
    others = {"old_logps": torch.zeros(shape), "advantages": torch.zeros(shape[0]), "loss_type": "grpo"}
    grpo_loss(logits, torch.zeros(shape, dtype=torch.long), inplace=inplace, **(others | options)).loss.backward()


def call_scores(vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.bfloat16, *used: int, rows: int = 2) -> None:
    logits = logits_of((rows, vocabulary), dtype)
    outputs = selective_log_softmax(logits, torch.zeros(rows, dtype=torch.long), return_entropy=1 in used)
    outputs = [outputs[i] for i in used] if used else [outputs]
    torch.autograd.grad(outputs, logits, [torch.ones(rows)] * len(outputs))


EVERYTHING: dict[str, Any] = {
    **{"entropy_coef": 0.1, "beta": 0.1, "ref_logps": torch.zeros(2, 3), "sampler_logps": torch.zeros(2, 3)},
    **{"advantages": None, "rewards": torch.zeros(2), "num_generations": 2},
}
# Call, bytes of a logit, largest cost of either pass, registers. Lower the numbers with the code, never raise them.
COSTS: dict[str, tuple[Callable[[], None], int, float, float, int]] = {
    "loss": (lambda: call_loss(), 2, 122, 116, 40),
    "loss_in_place": (lambda: call_loss(inplace=True), 2, 122, 116, 40),
    "loss_and_entropy": (lambda: call_loss(return_entropy=True), 2, 156, 116, 40),
    "loss_with_entropy_bonus": (lambda: call_loss(entropy_coef=0.1), 2, 156, 145, 40),
    "loss_float32": (lambda: call_loss(dtype=torch.float32), 4, 98, 88, 40),
    "loss_and_entropy_float32": (lambda: call_loss(dtype=torch.float32, return_entropy=True), 4, 136, 88, 40),
    "logps": (lambda: call_scores(), 2, 122, 122, 40),
    "logps_and_entropy": (lambda: call_scores(VOCABULARY, torch.bfloat16, 0, 1), 2, 156, 145, 40),
    "loss_of_unaligned_rows": (lambda: call_loss(VOCABULARY + 1), 2, 152, 196, 48),
    "loss_and_entropy_of_unaligned_rows": (lambda: call_loss(VOCABULARY + 1, return_entropy=True), 2, 188, 196, 48),
    "everything_of_unaligned_rows": (lambda: call_loss(VOCABULARY + 1, **EVERYTHING), 2, 188, 222, 48),
    "logps_of_unaligned_rows": (lambda: call_scores(VOCABULARY + 1), 2, 150, 196, 48),
    "logps_and_entropy_of_unaligned_rows": (lambda: call_scores(VOCABULARY + 1, torch.bfloat16, 0, 1), 2, 188, 222, 48),
    "everything_of_columns_apart": (lambda: call_loss(stride=2, **EVERYTHING), 2, 200, 250, 64),
}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("call", "logit_bytes", "first", "second", "registers"), COSTS.values(), ids=COSTS.keys())
def test_instructions_per_logit_are_bounded(
    launches: list[Compiled],
    call: Callable[[], None],
    logit_bytes: int,
    first: float,
    second: float,
    registers: int,
    architecture: int,
) -> None:
    target(architecture)
    call()
    kernels = [c.kernel for c in launches if c.name != "scale_rows_kernel"]
    loops = [loop for kernel in kernels for loop in hot_loops(instructions(kernel))]
    found = [(any(map(is_store, loop)), cost(loop, logit_bytes)) for loop in loops]
    used = [resources(kernel) for kernel in kernels]
    assert [stores for stores, _ in found] == [False, True]
    assert all(x["STACK"] == x["LOCAL"] == 0 and x["REG"] <= registers for x in used), used
    assert found[0][1] <= first
    assert found[1][1] <= second


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("width", [VOCABULARY, VOCABULARY + 1])
@pytest.mark.parametrize("use", ["scores", "loss"])
def test_the_entropy_is_paid_for_only_where_it_is_wanted(
    launches: list[Compiled], use: str, width: int, architecture: int
) -> None:
    target(architecture)
    for wanted in (False, True):
        if use == "loss":
            call_loss(width, return_entropy=wanted)
        else:
            call_scores(width, torch.bfloat16, *((0, 1) if wanted else ()))
    kernels = [c.kernel for c in launches if c.name in ("score_rows_kernel", "grpo_rows_kernel")]
    without, with_entropy = (cost(hot_loops(instructions(kernel))[0], 2) for kernel in kernels)
    # A bound and a product for each of 16 logits; sm_100 bounds and multiplies two at a time.
    assert without <= with_entropy - (8 if architecture == 100 else 32)


def place(code: list[tuple[int, str]], pattern: str, after: int = 0) -> int:
    """Address of the first instruction that matches."""
    return next(address for address, text in code if address >= after and re.match(pattern, text))


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("use", ["loss", "gradient"])
def test_in_place_the_logit_of_the_token_is_read_before_any_is_overwritten(
    launches: list[Compiled], use: str, architecture: int
) -> None:
    # A warp that has passed a barrier may write its columns while another has not read the token's logit yet.
    target(architecture)
    level = {"loss": "token", "gradient": "sequence"}[use]
    call_loss(inplace=True, importance_sampling_level=level, entropy_coef=0.1)
    (kernel,) = [c.kernel for c in launches if c.name == {"loss": "grpo_rows_kernel"}.get(use, "gradient_rows_kernel")]
    code = instructions(kernel)
    (loop,) = [loop for loop in hot_loops(code) if any(map(is_store, loop))]
    first = min(a for a, text in code if text.startswith("STG.E.128") and "RZ" not in text.split("],")[1])
    barriers = [a for a, text in code if text.startswith("BAR.SYNC")]
    reads = [a for a, text in code if text.startswith("LDG.E.U16")]  # all other logits come 16 bytes at a time
    assert reads
    assert all(any(read < barrier < first for barrier in barriers) for read in reads)
    # The token's column is written twice: by whoever holds its block, then for good.
    last = place(code, r"STG\.E\.U16", after=loop[-1][0])
    assert any(loop[-1][0] < barrier < last for barrier in barriers)


def variants(launches: list[Compiled]) -> dict[str, int]:
    hashes: dict[str, set[str]] = {}
    for c in launches:
        hashes.setdefault(c.name, set()).add(c.kernel.hash)
    return {name: len(found) for name, found in hashes.items()}


@pytest.mark.parametrize("vocabulary", [64, 65])
def test_variants_do_not_grow_with_the_number_of_rows(launches: list[Compiled], vocabulary: int) -> None:
    # Rows of one allocation and of every length: where a tensor of N numbers starts must not matter.
    target(90)
    for rows in (*range(1, 18), 32, 48, 1000):
        call_scores(vocabulary, torch.float32, 0, 1, rows=rows)
    assert variants(launches) == {"score_rows_kernel": 1, "gradient_rows_kernel": 1}


@pytest.mark.parametrize("vocabulary", [64, 65])
def test_variants_do_not_grow_with_the_length(launches: list[Compiled], vocabulary: int) -> None:
    target(90)
    numbers = torch.zeros(400)
    for t in (1, 2, 3, 4, 8, 15, 16, 17, 32, 48):
        starts = {"old_logps": numbers[t : 3 * t].view(2, t), "ref_logps": numbers[1 : 2 * t + 1].view(2, t)}
        call_loss(vocabulary, torch.float32, (2, t), beta=0.1, **starts)
    assert variants(launches) == {"grpo_rows_kernel": 1, "scale_rows_kernel": 1}


def test_offsets_beyond_32_bits_are_the_same_kernel(launches: list[Compiled]) -> None:
    target(90)
    for shape in ((2, 3), (2, 14_200)):  # a stride of 2.2e9
        call_loss(shape=shape)
    assert variants(launches) == {"grpo_rows_kernel": 1, "scale_rows_kernel": 1}


@pytest.mark.parametrize(("scale", "count", "names"), [("group", 256, 0), ("group", 512, 1), ("batch", 512, 1)])
def test_many_rewards_are_reduced_by_a_launch_of_their_own(
    launches: list[Compiled], scale: str, count: int, names: int
) -> None:
    target(90)
    group = {"num_generations": count} if scale == "group" else {"group_ids": torch.zeros(count, dtype=torch.long)}
    rewards = {"advantages": None, "rewards": torch.zeros(count), "scale_rewards": scale, **group}
    call_loss(64, torch.float32, (count, 1), **rewards)
    assert [c.name for c in launches].count("group_advantages_kernel") == names
