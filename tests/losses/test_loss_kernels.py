"""Gradients in the place of the logits, and one backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from loss_cases import ADVANTAGES, LOGITS, MASK, TOKEN_IDS, B, T, V, by_some
from torch import Tensor

from fastr1_kernels import GRPOOutput, grpo_loss


@by_some
def test_inplace_gives_the_same_and_overwrites_the_logits_only(backend: Backend, arguments: dict[str, Any]) -> None:
    whole = torch.zeros(B, T + 1, 2 * V, dtype=backend.dtype, device=backend.device)
    whole[:, :-1, ::2] = LOGITS
    others = {"mask": MASK, "advantages": ADVANTAGES, "return_entropy": True} | arguments
    others = {k: backend.put(v) for k, v in others.items()}
    results = []
    for inplace in (False, True):
        leaf = whole.clone().requires_grad_()
        logits = leaf * 1.0
        view = logits[:, :-1, ::2]
        output = grpo_loss(view, TOKEN_IDS.to(backend.device), inplace=inplace, **others)
        output.loss.backward()
        changed = whole.clone()
        changed[:, :-1, ::2] = leaf.grad[:, :-1, ::2] if inplace else whole[:, :-1, ::2]  # type: ignore[index]
        assert torch.equal(logits.detach(), changed)
        results.append([output.loss, leaf.grad, output.logps, output.entropy])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def inplace_loss(backend: Backend, logits: Tensor, **more: Any) -> GRPOOutput:
    arguments = {"mask": MASK, "advantages": ADVANTAGES, "loss_type": "grpo", "inplace": True} | more
    arguments = {k: backend.put(v) for k, v in arguments.items()}
    return grpo_loss(logits, TOKEN_IDS.to(logits.device), **arguments)


def test_inplace_without_gradient_changes_nothing(backend: Backend) -> None:
    logits = backend.put(LOGITS).clone()
    before = logits.clone()
    inplace_loss(backend, logits)
    with torch.no_grad():
        inplace_loss(backend, logits.requires_grad_() * 1.0)
    assert torch.equal(logits, before)


def test_inplace_takes_any_order_of_the_axes(backend: Backend) -> None:
    expected = inplace_loss(backend, backend.put(LOGITS).clone().requires_grad_() * 1.0)
    for axes in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        stored = backend.put(LOGITS).permute(axes).contiguous().requires_grad_() * 1.0
        got = inplace_loss(backend, stored.permute([axes.index(i) for i in range(3)]))
        assert torch.equal(got.loss, expected.loss)


def test_inplace_refusals(backend: Backend) -> None:
    logits = backend.put(LOGITS).clone()
    with pytest.raises(ValueError, match="leaf"):
        inplace_loss(backend, logits.clone().requires_grad_())
    with pytest.raises(ValueError, match="share memory"):
        inplace_loss(backend, logits[:1].clone().requires_grad_().expand(B, -1, -1))
    for stride in ((T * V, V - 1, 1), (V, V, 1), (1, V, 1)):  # rows, sequences, columns share some of their numbers
        overlapping = (logits.clone().requires_grad_() * 1.0).as_strided((B, T, V), stride)
        with pytest.raises(ValueError, match="share memory"):
            inplace_loss(backend, overlapping)
    # tanh needs its output for its own gradient: autograd must notice that it is gone.
    output = inplace_loss(backend, torch.tanh(logits.clone().requires_grad_()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


@by_some
def test_one_backward_pass(backend: Backend, arguments: dict[str, Any]) -> None:
    others = {"mask": MASK, "advantages": ADVANTAGES} | arguments
    others = {k: backend.put(v) for k, v in others.items()}
    logits = backend.put(LOGITS).clone().requires_grad_()
    output = grpo_loss(logits, TOKEN_IDS.to(backend.device), **others)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(output.loss, logits, create_graph=True)


def test_second_backward_through_a_kept_graph_is_refused(kernels: Backend) -> None:
    logits = kernels.put(LOGITS).requires_grad_()
    output = grpo_loss(
        logits, TOKEN_IDS.to(kernels.device), advantages=ADVANTAGES.float().to(kernels.device), loss_type="grpo"
    )
    (2 * output.loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()
