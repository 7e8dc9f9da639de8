"""The loss of a linear head, a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_accuracy import rand
from loss_cases import ADVANTAGES, MASK, TOKEN_IDS, B, D, T, V, by_case
from torch import Tensor

from fastr1_kernels import grpo_loss, linear_grpo_loss


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 50])
@by_case
def test_linear_loss_equals_loss_of_its_logits(arguments: dict[str, Any], chunk_size: int | None) -> None:
    head = {"softcap": 4.0, "logit_scale": 1.2}
    results = []
    for linear in (True, False):
        hidden, weight = rand(B, T, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
        bias = rand(V, seed=2).requires_grad_()
        common = {"mask": MASK, "advantages": ADVANTAGES, "return_entropy": True} | arguments
        if linear:
            output = linear_grpo_loss(hidden, weight, TOKEN_IDS, bias=bias, chunk_size=chunk_size, **head, **common)
        else:
            logits = 4.0 * torch.tanh((hidden @ weight.T + bias) * 1.2 / 4.0)
            output = grpo_loss(logits, TOKEN_IDS, **common)
        output.loss.backward()
        pairs = [x for pair in output.metrics.values() for x in pair]
        results.append([output.loss, hidden.grad, weight.grad, bias.grad, output.logps, output.entropy, *pairs])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_linear_loss_of_half_inputs_is_as_accurate_as_the_loss_of_half_logits() -> None:
    gold_inputs = [rand(B, T, D).bfloat16(), rand(V, D, seed=1).bfloat16()]
    arguments = {"mask": MASK, "advantages": ADVANTAGES, "loss_type": "grpo"}

    def grads(linear: bool, dtype: torch.dtype) -> list[Tensor]:
        hidden, weight = (x.to(dtype).requires_grad_() for x in gold_inputs)
        loss = (
            linear_grpo_loss(hidden, weight, TOKEN_IDS, chunk_size=2, **arguments).loss
            if linear
            else grpo_loss(hidden @ weight.T, TOKEN_IDS, **arguments).loss
        )
        return [x.double() for x in torch.autograd.grad(loss, (hidden, weight))]

    gold, yardstick = grads(False, torch.float64), grads(False, torch.bfloat16)
    for got, eager, exact in zip(grads(True, torch.bfloat16), yardstick, gold, strict=True):
        assert (got - exact).norm() <= 2 * (eager - exact).norm() + 1e-3 * exact.norm()


def test_all_masked_linear_loss_gives_zero_gradients() -> None:
    hidden, weight = rand(B, T, D).requires_grad_(), rand(V, D).requires_grad_()
    none = torch.zeros_like(MASK)
    linear_grpo_loss(hidden, weight, TOKEN_IDS, mask=none, advantages=ADVANTAGES, normalizer=0).loss.backward()
    for x in (hidden, weight):
        assert x.grad is not None
        assert x.grad.eq(0).all()


def test_stride_zero_upstream_gradient() -> None:
    hidden, weight = rand(B, T, D).requires_grad_(), rand(V, D)
    loss = linear_grpo_loss(hidden, weight, TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo").loss
    loss.expand(3).sum().backward()
    once = rand(B, T, D).requires_grad_()
    linear_grpo_loss(once, weight, TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo").loss.backward()
    assert once.grad is not None
    torch.testing.assert_close(hidden.grad, 3 * once.grad)


def test_repeated_calls_are_bit_identical() -> None:
    runs = []
    for _ in range(2):
        hidden, weight = rand(B, T, D).float().requires_grad_(), rand(V, D).float().requires_grad_()
        loss = linear_grpo_loss(hidden, weight, TOKEN_IDS, chunk_size=3, advantages=ADVANTAGES, loss_type="grpo").loss
        loss.backward()
        runs.append((loss, hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@by_case
def test_tokens_of_advantage_zero(arguments: dict[str, Any]) -> None:
    # Alone they have no gradient; in a sequence whose tokens share a ratio they have.
    advantages = ADVANTAGES[:, None] * (torch.arange(T) % 2)
    advantages[1] = 0.0
    grads = []
    for linear in (True, False):
        hidden, weight = rand(B, T, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
        common = {"mask": MASK, "advantages": advantages} | arguments | {"beta": 0.0, "entropy_coef": 0.0}
        rows = (hidden, weight) if linear else (hidden @ weight.T,)
        more = {"chunk_size": 6} if linear else {}
        loss = (linear_grpo_loss if linear else grpo_loss)(*rows, TOKEN_IDS, **more, **common).loss
        grads.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)
