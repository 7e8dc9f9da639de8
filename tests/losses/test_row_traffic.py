"""Bytes of logits that the row kernels move, counted in the interpreter: every element that is loaded or stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import Backend
from kernel_accuracy import rand
from torch import Tensor

from fastr1_kernels import grpo_loss

N, V = 5, 1_100  # rows of two whole blocks of 512 and a rest
LIVE = torch.tensor([True, False, True, True, False])
CONFIG = {"BLOCK": 512, "num_warps": 1, "WIDTH": 1}


class Traffic:
    """How often each element of a tensor, of any strides, is loaded and stored."""

    def __init__(self, x: Tensor) -> None:
        self.start, self.size, self.shape = x.data_ptr(), x.element_size(), x.shape
        self.loads, self.stores = (np.zeros(x.numel(), dtype=np.int64) for _ in range(2))

    def count(self, counts: np.ndarray, pointers: np.ndarray, mask: np.ndarray) -> None:
        index = (pointers[mask].astype(np.int64) - self.start) // self.size
        np.add.at(counts, index[(index >= 0) & (index < len(counts))], 1)

    def per_row(self, counts: np.ndarray) -> list[tuple[int, int]]:
        """Total, and the smallest count of an element, of every row."""
        rows = counts.reshape(-1, self.shape[-1])
        return [(int(row.sum()), int(row.min())) for row in rows]


@contextmanager
def watched(*tensors: Tensor) -> Iterator[list[Traffic]]:
    """Counts what kernels do to the tensors, all of them contiguous."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = [Traffic(x) for x in tensors]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        for one in traffic:
            one.count(one.loads, pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for one in traffic:
            one.count(one.stores, pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield traffic


@pytest.fixture
def interpreter(kernels: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.device != "cpu":
        pytest.skip("loads and stores are counted in the interpreter")
    for module in ("rows", "loss"):
        monkeypatch.setattr(f"fastr1_kernels.gpu.{module}.row_launch_config", lambda *_: CONFIG)


def inputs() -> tuple[Tensor, Tensor, dict[str, Any]]:
    logits = rand(N, V).float().requires_grad_() * 1.0
    ids = torch.arange(N) * 100
    return logits, ids, {"cu_seqlens": torch.tensor([0, 2, N]), "advantages": torch.tensor([1.0, -2.0]), "mask": LIVE}


def test_one_launch_reads_a_live_row_twice_and_writes_it_once(interpreter: None) -> None:
    logits, ids, others = inputs()
    with watched(logits) as (traffic,):
        loss = grpo_loss(logits, ids, loss_type="grpo", inplace=True, **others).loss
        loss.backward()  # multiplies by 1: nothing to do
    for live, loads, stores in zip(LIVE, traffic.per_row(traffic.loads), traffic.per_row(traffic.stores), strict=True):
        # And the token's own logit once more each way.
        assert loads == ((2 * V + 1, 2) if live else (0, 0))
        assert stores == ((V + 1, 1) if live else (V, 1))


def test_scores_read_a_live_row_once_and_their_gradient_once_more(interpreter: None) -> None:
    from fastr1_kernels.rows import score_rows

    logits, ids, _ = inputs()
    with watched(logits) as (forward,):
        logps, _ = score_rows(logits, ids, LIVE, inplace=True)
    with watched(logits) as (backward,):
        logps.sum().backward()
    assert forward.per_row(forward.loads) == [(V + 1, 1) if live else (0, 0) for live in LIVE]
    assert forward.stores.sum() == 0
    assert backward.per_row(backward.loads) == [(V + 1, 1) if live else (0, 0) for live in LIVE]
    assert backward.per_row(backward.stores) == [(V + 1, 1) if live else (V, 1) for live in LIVE]


def test_a_row_without_gradient_is_read_once(interpreter: None) -> None:
    logits, ids, others = inputs()
    with watched(logits) as (traffic,):
        grpo_loss(logits, ids, loss_type="grpo", inplace=True, **others | {"advantages": torch.zeros(2)})
    assert traffic.per_row(traffic.loads) == [(V + 1, 1) if live else (0, 0) for live in LIVE]
    assert traffic.per_row(traffic.stores) == [(V, 1)] * N


@pytest.mark.parametrize(("scale", "passes"), [(4.0, 0), (torch.tensor(4.0), 0), (None, 1), (2.0, 1)])
def test_a_scale_known_before_spares_the_passes_after(
    interpreter: None, scale: float | Tensor | None, passes: int
) -> None:
    logits, ids, others = inputs()
    loss = grpo_loss(logits, ids, loss_type="grpo", inplace=True, grad_scale=scale, **others).loss
    with watched(logits) as (traffic,):
        (4 * loss).backward()
    assert traffic.per_row(traffic.loads) == traffic.per_row(traffic.stores) == [(V * passes, passes)] * N
