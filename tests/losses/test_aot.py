"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, does not spill, and has few variants.

The public functions run on CPU tensors with launches replaced by compilation, so that what is compiled is what a GPU
would be asked for. Registers, stack and shared memory are read from the compiled cubin with cuobjdump, which triton
brings along: a kernel that spills has a stack. Nothing is executed here; results are the business of the other files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastr1_kernels import LOSSES, group_advantages, grpo_loss, selective_log_softmax

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from compiled_kernels import VOCABULARY, Compiled, compilations, logits_of, resources, target

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # largest block: CUDA C Programming Guide
REGISTERS = 65_536  # of a multiprocessor
NEEDED = {"epsilon_high": 5.0, "max_completion_length": 8}  # values of what a loss needs
# A loss for every kernel: rows of the table that differ in reduction or denominator only share one.
KERNELS = {(row.objective, row.kl): name for name, row in reversed(LOSSES.items())}
CALLS = {
    name: {"loss_type": name, "normalizer": 7, "entropy_coef": 0.1 * (name == "grpo")}
    | {need: NEEDED[need] for need in LOSSES[name].needs if need != "normalizer"}
    for name in KERNELS.values()
}
LOGPS = {
    "on_policy": [],
    "off_policy": ["old_logps"],
    "all": ["old_logps", "ref_logps", "sampler_logps"],
}


@pytest.fixture
def launches() -> Iterator[list[Compiled]]:
    with compilations() as compiled:
        yield compiled


def call_grpo_loss(
    shape: tuple[int, int] = (2, 3),
    dtype: torch.dtype = torch.bfloat16,
    vocabulary: int = VOCABULARY,
    inputs: list[str] | None = None,
    backward: bool = True,
    **arguments: Any,
) -> None:
    logits = logits_of((*shape, vocabulary), dtype)
    arguments = {"advantages": torch.zeros(shape[0])} | {k: torch.zeros(shape) for k in inputs or []} | arguments
    if "rewards" in arguments:
        del arguments["advantages"]
    if not backward:
        logits = logits.detach()
    loss = grpo_loss(logits, torch.zeros(shape, dtype=torch.long), **arguments).loss
    if backward:
        loss.backward()


def check(compiled: list[Compiled], architecture: int, blocks: int = 2) -> None:
    """No spills, legal shared memory, and registers for `blocks` programs at a time on a multiprocessor."""
    assert compiled
    for item in {id(c.kernel): c for c in compiled}.values():
        used = resources(item.kernel)
        assert used["STACK"] == used["LOCAL"] == 0, f"{item.name} spills on sm_{architecture}: {used}"
        assert max(used["SHARED"], item.kernel.metadata.shared) <= SHARED_MEMORY_BYTES[architecture]
        threads = 32 * item.kernel.metadata.num_warps
        assert used["REG"] * threads <= REGISTERS / blocks, f"{item.name}: {used}, {threads} threads"


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("inputs", LOGPS.values(), ids=LOGPS.keys())
@pytest.mark.parametrize("loss", CALLS.values(), ids=CALLS.keys())
def test_loss_kernels_compile(
    launches: list[Compiled], loss: dict[str, Any], inputs: list[str], architecture: int
) -> None:
    if LOSSES[loss["loss_type"]].is_on_policy:
        inputs = [name for name in inputs if name != "old_logps"]
    target(architecture)
    beta = {"beta": 0.1} if "ref_logps" in inputs else {}
    call_grpo_loss(inputs=inputs, mask=torch.ones(2, 3, dtype=torch.bool), **loss, **beta)
    assert [c.name for c in launches] == ["grpo_rows_kernel", "scale_rows_kernel"]
    check(launches, architecture)


REWARDS: dict[str, dict[str, Any]] = {
    "runs": {"num_generations": 2},
    "labels": {"group_ids": torch.zeros(2, dtype=torch.long), "scale_rewards": "batch", "leave_one_out": True},
    "global": {"num_generations": 2, "sequence_index": torch.zeros(2, dtype=torch.int32), "scale_rewards": "none"},
}
OPTIONS: list[dict[str, Any]] = [
    {"kl_estimator": "k1", "beta": 0.1},
    {"kl_estimator": "k2", "beta": 0.1},
    {"sampler_correction": "token_mask"},
    {"sampler_correction": "icepop"},
    {"entropy_coef": 0.1, "dtype": torch.float32},
    {"dtype": torch.float16, "vocabulary": 32_001},  # no vector loads
    {"vocabulary": 7},
    {"backward": False},
    {"advantages": torch.zeros(2, 3)},
    *({"rewards": torch.zeros(2), **options} for options in REWARDS.values()),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_kernel_compiles_with_every_option(launches: list[Compiled], options: dict[str, Any]) -> None:
    target(90)
    call_grpo_loss(inputs=LOGPS["all"], loss_type="grpo", **options)
    check(launches, 90)


def test_the_check_for_spills_can_fail(launches: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    target(90)
    starved = {"BLOCK": 8192, "num_warps": 4, "maxnreg": 32, "WIDTH": 8}
    monkeypatch.setattr("fastr1_kernels.gpu.rows.row_launch_config", lambda *_: starved)
    selective_log_softmax(logits_of((2, VOCABULARY), torch.bfloat16), torch.zeros(2, dtype=torch.long))
    with pytest.raises(AssertionError, match="score_rows_kernel spills on sm_90"):
        check(launches, 90)


def test_packed_loss_kernel_compiles(launches: list[Compiled]) -> None:
    target(90)
    logits = logits_of((5, VOCABULARY), torch.bfloat16)
    bounds, ids = torch.tensor([0, 2, 5]), torch.zeros(5, dtype=torch.long)
    grpo_loss(logits, ids, cu_seqlens=bounds, advantages=torch.zeros(2), loss_type="grpo").loss.backward()
    check(launches, 90)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_score_kernels_compile(launches: list[Compiled], dtype: torch.dtype, architecture: int) -> None:
    target(architecture)
    logits = logits_of((2, 3, VOCABULARY), dtype)
    ids = torch.zeros(2, 3, dtype=torch.long)
    for used in (slice(0, 1), slice(0, 2)):
        outputs = selective_log_softmax(logits, ids, return_entropy=True)[used]
        torch.autograd.grad(outputs, logits, [torch.ones(2, 3)] * len(outputs))
    assert [c.name for c in launches] == ["score_rows_kernel", "gradient_rows_kernel"] * 2
    check(launches, architecture)


def test_sequence_level_loss_is_two_row_launches(launches: list[Compiled]) -> None:
    target(90)
    call_grpo_loss(inputs=["old_logps"], loss_type="grpo", importance_sampling_level="sequence")
    assert [c.name for c in launches] == ["score_rows_kernel", "gradient_rows_kernel"]
    check(launches, 90)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantage_kernels_compile(launches: list[Compiled], scale: str, architecture: int) -> None:
    target(architecture)
    rewards = torch.zeros(6)
    group_advantages(rewards, 3, scale_rewards=scale)
    group_advantages(rewards, group_ids=torch.zeros(6, dtype=torch.long), scale_rewards=scale, leave_one_out=True)
    check(launches, architecture)


def test_half_precision_rows_move_16_bytes_at_a_time(launches: list[Compiled]) -> None:
    target(90)
    call_grpo_loss(loss_type="grpo")
    ptx = launches[0].kernel.asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)


def test_variants_do_not_grow_with_lengths_or_floats(launches: list[Compiled]) -> None:
    target(90)
    inputs = {"inputs": LOGPS["all"], "loss_type": "grpo", "dtype": torch.float32, "vocabulary": 64}
    calls: list[dict[str, Any]] = [
        {"shape": (b, t), "rewards": torch.zeros(b), "num_generations": b} for b in (1, 2, 16) for t in (1, 3, 16, 17)
    ]
    names = (
        "temperature",
        "beta",
        "epsilon",
        "epsilon_high",
        "delta",
        "log_ratio_clamp",
        "sampler_cap",
        "advantage_eps",
    )
    calls += [calls[0] | {name: value} for name in names for value in (1.0, 2.25, 16.0) if name != "delta" or value > 2]
    for call in calls:
        call_grpo_loss(**(inputs | call))
    variants = {c.name: set() for c in launches}  # type: ignore[var-annotated]
    for c in launches:
        variants[c.name].add(c.kernel.hash)
    assert {name: len(kernels) for name, kernels in variants.items()} == {"grpo_rows_kernel": 1, "scale_rows_kernel": 1}
