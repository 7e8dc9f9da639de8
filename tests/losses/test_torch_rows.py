"""Rows in plain torch: what its own passes could get wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernel_accuracy import rand
from torch import Tensor

from fastr1_kernels import grpo_loss, reference, selective_log_softmax, torch_rows

IDS = torch.randint(9, (2, 3), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shift", [0.0, -800.0, 3000.0])
@pytest.mark.parametrize("reads", [True, False], ids=["on a CPU", "elsewhere"])
def test_rows_without_gradient_are_zero(monkeypatch: pytest.MonkeyPatch, reads: bool, shift: float) -> None:
    monkeypatch.setattr(torch_rows, "may_read", lambda rows: reads)
    logits = (rand(2, 3, 9) + shift).requires_grad_()
    advantages = torch.tensor([1.0, 0.0], dtype=torch.float64)
    grpo_loss(logits, IDS, advantages=advantages, loss_type="bnpo", temperature=0.01).loss.backward()
    assert logits.grad is not None
    assert logits.grad[1].eq(0).all()
    assert logits.grad[0].isfinite().all()


@pytest.mark.parametrize("temperature", [0.7, 3.0, 1e-9])
def test_a_certain_token_has_exactly_no_surprise(temperature: float) -> None:
    """Whatever rounds, no log-probability is above 0 and no entropy below."""
    logits = torch.full((500, 9), -torch.inf).scatter(
        1, torch.zeros(500, 1, dtype=torch.long), 20 * rand(500, 1).float()
    )
    logps, entropy = selective_log_softmax(
        logits, torch.zeros(500, dtype=torch.long), temperature=temperature, return_entropy=True
    )
    assert logps.eq(0).all()
    assert entropy.eq(0).all()
    peaked = rand(500, 9).float() * 30
    logps, entropy = selective_log_softmax(peaked, peaked.argmax(1), temperature=temperature, return_entropy=True)
    assert logps.le(0).all()
    assert entropy.ge(0).all()


@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 5)])
def test_many_axes(shape: tuple[int, ...]) -> None:
    logits, ids = rand(*shape), torch.zeros(shape[:-1], dtype=torch.long)
    expected, _ = reference.selective_log_softmax(logits, ids)
    torch.testing.assert_close(selective_log_softmax(logits, ids), expected)


def test_rows_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rows, "BLOCK_ELEMENTS", 8)
    check_sliced()


def test_several_rows_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rows, "BLOCK_ELEMENTS", 20)
    check_sliced()


def check_sliced() -> None:
    """A view without the last position is not one matrix; the mask leaves rows out in the middle."""
    whole = rand(2, 4, 9)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    logits, expected_logits = (whole[:, :-1].clone() if i else whole[:, :-1] for i in range(2))
    logits, expected_logits = logits.requires_grad_(), expected_logits.requires_grad_()
    loss = {"mask": mask, "advantages": torch.tensor([1.0, -2.0]), "loss_type": "bnpo", "entropy_coef": 0.1}
    grpo_loss(logits, IDS, **loss).loss.backward()  # type: ignore[arg-type]
    logps, entropy = reference.selective_log_softmax(expected_logits, IDS)
    term = -(logps - logps.detach()).exp() * torch.tensor([[1.0], [-2.0]]) - 0.1 * entropy
    (torch.where(mask, term, 0.0).sum() / mask.sum()).backward()
    torch.testing.assert_close(logits.grad, expected_logits.grad)


def test_other_modes_are_refused_not_zero() -> None:
    def score(x: Tensor) -> Tensor:
        return selective_log_softmax(x, IDS, check_values=False).sum()

    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(score, (rand(2, 3, 9),), (rand(2, 3, 9, seed=1),))
    with pytest.raises(RuntimeError, match="differentiable once"):  # it would differentiate again
        torch.func.grad(score)(rand(2, 3, 9))


def test_the_gradient_in_place_has_no_graph() -> None:
    logits = rand(2, 3, 9).requires_grad_() * 1
    loss = {"advantages": torch.tensor([1.0, -1.0]), "loss_type": "bnpo"}
    (gradient,) = torch.autograd.grad(grpo_loss(logits, IDS, inplace=True, **loss).loss, logits)  # type: ignore[arg-type]
    assert not gradient.requires_grad
    assert gradient.data_ptr() == logits.data_ptr()


def test_a_first_call_does_not_import_the_compiler() -> None:
    code = """
import sys, torch
from fastr1_kernels import grpo_loss
logits, ids = torch.randn(2, 3, 9, requires_grad=True), torch.ones(2, 3, dtype=torch.long)
grpo_loss(logits, ids, rewards=torch.ones(2), num_generations=2, loss_type="grpo").loss.backward()
sys.exit(int("torch._dynamo" in sys.modules or "triton" in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
