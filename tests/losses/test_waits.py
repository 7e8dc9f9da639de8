"""`check_values=False`: no public function reads a value from the device, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from counters import WaitCounter
from kernel_accuracy import rand
from loss_cases import CU_SEQLENS, MASK, TOKEN_IDS, B, D, T, V, by_case, by_some, pack
from torch import Tensor

from fastr1_kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    selective_log_softmax,
    torch_rows,
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on a CPU are sought by value, which costs nothing there."""
    monkeypatch.setattr(torch_rows, "may_read", lambda rows: False)


REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)


def loss_and_gradient(linear: bool, arguments: dict[str, Any], **more: Any) -> tuple[Any, Tensor]:
    inputs = {"token_ids": TOKEN_IDS, "mask": MASK, "rows": rand(B, T, D if linear else V)} | arguments
    if more.pop("is_packed"):
        inputs = {k: pack(v) for k, v in inputs.items()} | {"cu_seqlens": CU_SEQLENS}
    rows = inputs.pop("rows").clone().requires_grad_()
    source = {"rewards": REWARDS, "num_generations": 2}
    if linear:
        output = linear_grpo_loss(rows, rand(V, D, seed=1).requires_grad_(), **source, **inputs, **more)
    else:
        output = grpo_loss(rows, **source, **inputs, **more)
    output.loss.backward()
    assert rows.grad is not None
    return output, rows.grad


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@by_case
def test_losses_do_not_wait_and_give_the_same(arguments: dict[str, Any], linear: bool, is_packed: bool) -> None:
    expected, expected_gradient = loss_and_gradient(linear, arguments, is_packed=is_packed)
    sizes = [{"chunk_size": 6}, {"chunk_size": 3}, {"chunk_size": 3, "num_loss_tokens": int(MASK.sum())}]
    for more in sizes if linear else [{}]:
        with WaitCounter() as counter:
            output, gradient = loss_and_gradient(linear, arguments, is_packed=is_packed, check_values=False, **more)
        assert counter.seen == []
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)
        for name, pair in expected.metrics.items():
            torch.testing.assert_close(output.metrics[name], pair, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@by_case
def test_masked_rows_reach_nothing_without_reading_the_mask(arguments: dict[str, Any], linear: bool) -> None:
    dirty = {"rows": rand(B, T, D if linear else V).masked_fill(~MASK[..., None], float("nan"))}
    dirty |= {"token_ids": TOKEN_IDS.masked_fill(~MASK, -100)}
    clean, clean_gradient = loss_and_gradient(linear, arguments, is_packed=False, check_values=False)
    output, gradient = loss_and_gradient(linear, arguments | dirty, is_packed=False, check_values=False)
    assert torch.equal(output.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)
    assert gradient[~MASK].eq(0).all()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_tensors_that_are_checked_by_value_are_not_read(linear: bool) -> None:
    given = {"loss_type": "grpo", "mask": MASK.int(), "normalizer": torch.tensor(4), "sequence_index": torch.arange(B)}
    with WaitCounter() as counter:
        loss_and_gradient(linear, given, is_packed=False, check_values=False)
    assert counter.seen == []
    with WaitCounter() as counter:
        loss_and_gradient(linear, given, is_packed=False)
    assert len(counter.seen) >= 5  # mask, normalizer, index, rewards, ids


LABELS = torch.tensor([7, -1, 7, -1])
LOGITS, IDS, LOGITS_OF_ALL = rand(3, V), TOKEN_IDS[0, :3], rand(B, T, V)
CALLS: dict[str, Callable[..., Tensor]] = {
    "selective_log_softmax": lambda **o: selective_log_softmax(LOGITS.clone().requires_grad_(), IDS, **o),
    "linear_logps": lambda **o: linear_logps(rand(3, D).requires_grad_(), rand(V, D).requires_grad_(), IDS, **o),
    "linear_logps of a kept set": lambda **o: linear_logps(
        rand(3, D).requires_grad_(), rand(V, D), IDS, temperature=IDS + 0.5, top_k=5, top_p=0.9, softcap=3.0, **o
    ),
    **{
        f"group_advantages by {scale}": (
            lambda scale=scale, **o: group_advantages(REWARDS, 2, scale_rewards=scale, noise_std=0.1, **o)
        )
        for scale in ("group", "batch", "none")
    },
    "group_advantages of labels": lambda **o: group_advantages(REWARDS, group_ids=LABELS, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_do_not_wait(name: str) -> None:
    with WaitCounter() as counter:
        result = CALLS[name](check_values=False)
        if result.requires_grad:
            result.sum().backward()
    assert counter.seen == []
    with WaitCounter() as counter:
        CALLS[name]()
    assert counter.seen


@by_some
def test_kernels_do_not_wait(kernels: Backend, arguments: dict[str, Any]) -> None:
    given = {
        k: kernels.put(v) for k, v in ({"mask": MASK, "rewards": REWARDS, "num_generations": 2} | arguments).items()
    }
    logits, ids = kernels.put(LOGITS_OF_ALL).clone().requires_grad_(), kernels.put(TOKEN_IDS)
    with WaitCounter() as counter:
        (3 * grpo_loss(logits, ids, check_values=False, **given).loss).backward()
    assert counter.seen == []


def test_the_counter_sees_waits() -> None:
    x = torch.tensor([1.0, 2.0])
    calls: list[Callable[[], Any]] = [
        x.tolist,
        x.sum().item,
        lambda: bool(x[0]),
        lambda: float(x[1]),
        x.nonzero,
        lambda: x[x > 1],
        lambda: x.unique(),
        lambda: torch.equal(x, x),
        lambda: torch.as_tensor(3.0),
        lambda: x.clone().index_put_((x > 1,), x[:1]),
        lambda: f"{x[0]}",
        x.cpu,
    ]
    for call in calls:
        with WaitCounter() as counter:
            call()
        assert counter.seen, call
