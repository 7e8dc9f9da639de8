"""Entropies of a loss: there where they are asked for or read, and not paid for elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from kernel_accuracy import rand
from loss_cases import ADVANTAGES, CASES, MASK, TOKEN_IDS, B, D, T, V, loss_on, parametrize
from torch import Tensor

from fastr1_kernels import GRPOOutput, grpo_loss, linear_grpo_loss, linear_logps, selective_log_softmax

READS = ("entropy_coef", "top_entropy_quantile")
by_case = parametrize({n: CASES[n] for n in ("dapo", "cispo", "gspo", "entropy_bonus", "top_entropy", "every_mask")})


def assert_same_without(backend: Backend, arguments: dict[str, Any], outputs: list[tuple[GRPOOutput, Any]]) -> None:
    """Outputs with and without entropies asked for, each with its gradients."""
    (asked, asked_gradients), (output, gradients) = outputs
    assert asked.entropy is not None
    if any(name in arguments for name in READS):
        backend.assert_close(output.entropy, asked.entropy)
    else:
        assert output.entropy is None
        assert set(asked.metrics) - set(output.metrics) == {"entropy"}
    for got, expected in ((output.loss, asked.loss), (output.logps, asked.logps), (gradients, asked_gradients)):
        backend.assert_close(got, expected)
    for name, pair in output.metrics.items():
        for got, expected in zip(pair, asked.metrics[name], strict=True):
            backend.assert_close(got, expected)


@by_case
def test_without_it_the_loss_is_the_same(backend: Backend, arguments: dict[str, Any]) -> None:
    assert_same_without(backend, arguments, [loss_on(backend, arguments, return_entropy=x) for x in (True, False)])


@by_case
def test_without_it_the_linear_loss_is_the_same(backend: Backend, arguments: dict[str, Any]) -> None:
    common = {k: backend.put(v) for k, v in ({"mask": MASK, "advantages": ADVANTAGES} | arguments).items()}

    def loss(return_entropy: bool) -> tuple[GRPOOutput, Tensor]:
        hidden, weight = (backend.put(rand(n, D, seed=n)).requires_grad_() for n in (B * T, V))
        rows, ids = hidden.view(B, T, D), backend.put(TOKEN_IDS)
        output = linear_grpo_loss(rows, weight, ids, chunk_size=6, return_entropy=return_entropy, **common)
        return output, torch.cat(torch.autograd.grad(output.loss, (hidden, weight)))

    assert_same_without(backend, arguments, [loss(True), loss(False)])


@pytest.mark.parametrize("name", ["dapo", "gspo", "entropy_bonus", "top_entropy"])
def test_the_rows_in_torch_sum_it_only_where_it_is_wanted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for module in ("torch_rows", "chunk"):
        monkeypatch.setattr(f"fastr1_kernels.{module}.moment", lambda shifted, e, *_: sums.append(1) or e[:, :1])
    hidden, weight = rand(B, T, D), rand(V, D)

    def number(call: Any) -> int:
        sums.clear()
        call()
        return len(sums)

    common = {"mask": MASK, "advantages": ADVANTAGES} | CASES[name]
    reads = any(option in common for option in READS)
    calls: dict[str, Any] = {
        "logits": lambda **asked: grpo_loss(hidden @ weight.T, TOKEN_IDS, **common, **asked),
        "head": lambda **asked: linear_grpo_loss(hidden, weight, TOKEN_IDS, **common, **asked),
        "trained": lambda **asked: linear_grpo_loss(
            hidden, weight.clone().requires_grad_(), TOKEN_IDS, **common, **asked
        ),
    }
    for call in calls.values():
        assert (number(call) > 0) == reads
        assert number(lambda call=call: call(return_entropy=True)) > 0
    for score in (
        lambda **asked: selective_log_softmax(hidden @ weight.T, TOKEN_IDS, **asked),
        lambda **asked: linear_logps(hidden, weight, TOKEN_IDS, **asked),
    ):
        assert number(score) == 0
        assert number(lambda score=score: score(return_entropy=True)) > 0
