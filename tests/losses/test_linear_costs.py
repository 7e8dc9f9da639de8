"""What the linear head costs, counted: products, the rows in them, and bytes at the peak, as the README states them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counters import ProductCounter, peak_bytes
from kernel_accuracy import rand
from loss_cases import by_case

from fastr1_kernels import GRPOOutput, linear_grpo_loss, linear_logps
from fastr1_kernels.chunk import BLOCK_ELEMENTS

B, T, V, D = 4, 6, 41, 37  # 24 rows; no other size is 37 or 41
MASK = torch.arange(T) < torch.tensor([6, 2, 5, 3])[:, None]  # 16 of 24
IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
ADVANTAGES = torch.tensor([1.0, 0.0, -0.5, 2.0])
SIGNAL = 14  # rows of sequences whose advantage is not 0


def call_loss(trained: bool = True, **more: Any) -> GRPOOutput:
    hidden, weight = rand(B, T, D).float().requires_grad_(), rand(V, D).float().requires_grad_(trained)
    arguments = {"loss_type": "grpo", "advantages": ADVANTAGES, "mask": MASK, "chunk_size": 12} | more
    output = linear_grpo_loss(hidden, weight, IDS, **arguments)
    if output.loss.requires_grad:
        output.loss.backward()
    return output


def rows_in_products(call: Any, **arguments: Any) -> int:
    with ProductCounter(V, D) as counter:
        call(**arguments)
    assert counter.others == 0
    return sum(counter.rows)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_products_of_the_loss(level: str) -> None:
    common = {"importance_sampling_level": level}
    assert rows_in_products(call_loss, **common) == 3 * SIGNAL + 2
    assert rows_in_products(call_loss, trained=False, **common) == 2 * SIGNAL + 2
    with torch.no_grad():
        assert rows_in_products(call_loss, **common) == 16
    # Anything that gives a row of advantage 0 a gradient.
    ref = {"ref_logps": torch.zeros(B, T), "beta": 0.1}
    assert rows_in_products(call_loss, **common, **ref) == 3 * 16
    assert rows_in_products(call_loss, **common, entropy_coef=0.1) == 3 * 16
    assert rows_in_products(call_loss, **common, **ref | {"beta": 0.0}) == 3 * SIGNAL + 2


def test_products_without_reading_the_mask() -> None:
    assert rows_in_products(call_loss, check_values=False) == 3 * 24
    assert rows_in_products(call_loss, check_values=False, num_loss_tokens=16) == 3 * 16
    assert rows_in_products(call_loss, mask=None, advantages=ADVANTAGES + 1) == 3 * 24


def test_products_of_sequences_longer_than_a_chunk() -> None:
    common = {"importance_sampling_level": "sequence"}
    assert rows_in_products(call_loss, **common, chunk_size=6) == 3 * SIGNAL + 2
    assert rows_in_products(call_loss, **common, chunk_size=5) == 4 * SIGNAL + 2
    assert rows_in_products(call_loss, **common, chunk_size=5, trained=False) == 3 * SIGNAL + 2


def test_products_of_the_entropy_quantile() -> None:
    common = {"top_entropy_quantile": 0.5, "advantages": ADVANTAGES + 3}
    assert rows_in_products(call_loss, **common, chunk_size=16) == 3 * 16
    assert rows_in_products(call_loss, **common, chunk_size=15) == 4 * 16


@by_case
def test_every_loss_has_three_products_in_a_chunk(arguments: dict[str, Any]) -> None:
    given = {k: v.new_zeros(B, T) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert rows_in_products(call_loss, **given, advantages=ADVANTAGES + 3, chunk_size=24) == 3 * 16


@pytest.mark.parametrize("trained", [True, False])
def test_products_of_the_logps(trained: bool) -> None:
    def call() -> None:
        hidden, weight = rand(B, T, D).float().requires_grad_(), rand(V, D).float().requires_grad_(trained)
        linear_logps(hidden, weight, IDS, chunk_size=5).sum().backward()

    assert rows_in_products(call) == (4 if trained else 3) * 24


def test_low_rank_weights_add_no_product_with_the_head() -> None:
    low: dict[str, Any] = {"lora_a": rand(3, D).float().requires_grad_(), "lora_b": rand(V, 3).float().requires_grad_()}
    with ProductCounter(V, D) as counter:
        call_loss(trained=False, chunk_size=24, **low)
    assert sum(n for n in counter.rows if n != 3) == 2 * SIGNAL + 2


C, WIDE, ROWS, SIZE = 64, 32_768, 256, 32
SCRATCH = 4 * min(BLOCK_ELEMENTS, C * WIDE)  # bytes


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("kind", ["trained", "frozen", "no_grad"])
@pytest.mark.parametrize("name", ["loss", "logps"])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_bytes_at_the_peak(return_entropy: bool, name: str, kind: str, bits: int) -> None:
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    hidden, weight = rand(ROWS, SIZE).to(dtype).requires_grad_(), rand(WIDE, SIZE).to(dtype)
    weight.requires_grad_(kind == "trained")
    ids, advantages = torch.arange(ROWS), torch.ones(1)
    bounds = torch.tensor([0, ROWS])

    def call() -> None:
        with torch.set_grad_enabled(kind != "no_grad"):
            if name == "logps":
                scores = linear_logps(hidden, weight, ids, chunk_size=C, return_entropy=return_entropy)
                result = sum(x.sum() for x in scores) if return_entropy else scores.sum()
            else:
                given: dict[str, Any] = {"cu_seqlens": bounds, "advantages": advantages, "loss_type": "grpo"}
                given["return_entropy"] = return_entropy
                result = linear_grpo_loss(hidden, weight, ids, chunk_size=C, **given).loss
        if kind != "no_grad":
            result.backward()

    call()
    hidden.grad = weight.grad = None
    element = bits // 8
    expected = 4 * C * WIDE + SCRATCH * return_entropy + (element * C * WIDE if bits == 16 else 0)
    if kind != "no_grad":
        expected += element * ROWS * SIZE
    if kind == "trained":
        expected += 4 * WIDE * SIZE
        # Rounded to its dtype once all is summed, while the buffers are still there.
        expected += element * WIDE * SIZE if bits == 16 and name == "logps" else 0
    assert expected - 2**16 <= peak_bytes(call) <= expected + 2**18
