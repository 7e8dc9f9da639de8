"""The KL estimators: accuracy where the plain formula cancels or overflows, and what bounds them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import Backend
from loss_cases import LOGITS, MASK, REF, loss_of, loss_on
from safetensors.torch import load_file
from shared_data import shared_path

from fastr1_kernels import LossOptions, group_advantages
from fastr1_kernels.reference import kl_divergence, policy_loss_from_logps

INF = float("inf")


@pytest.mark.parametrize("q", [0.0, 1e-7, 3e-4, -3e-4, 0.0299, -0.0299, 0.03, -0.03, 0.5, -5.0, 15.0])
def test_k3_keeps_its_accuracy_near_zero_in_float32(q: float) -> None:
    exact_q = torch.tensor(q, dtype=torch.float32).item()
    x = torch.tensor(-exact_q, requires_grad=True)
    kl = kl_divergence(x, torch.tensor(0.0))
    kl.backward()
    series = math.fsum(exact_q**n / math.factorial(n) for n in range(2, 80))
    assert kl.item() == pytest.approx(series, rel=3e-6, abs=1e-30)
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(-math.expm1(exact_q), rel=3e-6, abs=1e-30)


def test_k3_is_accurate_in_float64_on_both_sides_of_the_series() -> None:
    q = torch.tensor([0.0299999, 0.0300001, -0.0299999, -0.0300001], dtype=torch.float64)
    expected = [math.fsum(x**n / math.factorial(n) for n in range(2, 40)) for x in q.tolist()]
    torch.testing.assert_close(kl_divergence(torch.zeros_like(q), q).tolist(), expected, rtol=1e-13, atol=0)


def test_k3_bounds_its_input() -> None:
    logps = torch.tensor([0.0, -30.0, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-30.0, 0.0, -5.0], dtype=torch.float64)
    kl = kl_divergence(logps, ref, clamp=20.0)
    torch.testing.assert_close(kl[:2].tolist(), [math.exp(-20) + 19, math.exp(20) - 21])
    kl.sum().backward()
    assert logps.grad is not None
    assert logps.grad[:2].eq(0).all()
    assert logps.grad[2] == pytest.approx(-math.expm1(-5))


@pytest.mark.parametrize("q", [0.0, 1e-7, 3e-4, -3e-4, 0.0299, 0.4999, -0.4999, 0.5001, -5.0, 15.0, 25.0, -25.0])
def test_k3_and_its_gradient_keep_their_accuracy(backend: Backend, q: float) -> None:
    ids = torch.tensor([[0]])
    arguments: dict[str, Any] = {"logits": torch.zeros(1, 1, 2), "token_ids": ids, "mask": None, "loss_type": "grpo"}
    arguments |= {"advantages": torch.zeros(1), "beta": 1.0}
    logp = loss_on(backend, arguments, ref_logps=torch.zeros(1, 1))[0].logps.cpu()
    ref = logp + q
    exact = (ref.double() - logp.double()).item()  # what float32 can hold of q
    output, gradient = loss_on(backend, arguments, ref_logps=ref)
    bounded = max(-20.0, min(20.0, exact))
    expected = math.fsum([math.exp(bounded), -bounded, -1.0])
    if abs(exact) < 0.6:
        expected = math.fsum(exact**n / math.factorial(n) for n in range(2, 80))
    assert output.loss.item() == pytest.approx(expected, rel=3e-6, abs=1e-30)
    slope = -math.expm1(exact) if exact == bounded else 0.0
    assert gradient[0, 0].tolist() == pytest.approx([slope / 2, -slope / 2], rel=3e-6, abs=1e-30)


def test_tinyllava_video_r1_bounds_the_output_of_k3(backend: Backend) -> None:
    logits = torch.zeros(1, 5, 2)
    ref = -math.log(2) + torch.tensor([[-0.5, -60.0, 30.0, -150.0, -INF]])
    arguments = {"loss_type": "tinyllava_video_r1", "beta": 1.0, "ref_logps": ref, "advantages": torch.zeros(1)}
    inputs = {"logits": logits, "token_ids": torch.zeros(1, 5, dtype=torch.long), "mask": None}
    output, gradient = loss_on(backend, arguments | inputs)
    assert output.metrics["kl"][0].item() == pytest.approx(math.exp(-0.5) - 0.5 + 59 + 300, rel=1e-6)
    expected = [-math.expm1(-0.5) / 10, 0.1, 0, 0, 0]
    assert gradient[0, :, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_tinyllava_video_r1_matches_the_original_trainer() -> None:
    data = {
        k.removeprefix("grpo."): v
        for k, v in load_file(shared_path("fixtures/tinyllava/group_expected.safetensors")).items()
        if k.startswith("grpo.")
    }
    advantages = group_advantages(data["rewards"], len(data["rewards"]))
    torch.testing.assert_close(advantages, data["advantages"], rtol=1e-6, atol=1e-6)
    options = LossOptions(loss_type="tinyllava_video_r1", beta=0.01)
    mask = data["completion_mask"].bool()
    loss, metrics = policy_loss_from_logps(data["logps"], mask, advantages, options, ref_logps=data["ref_logps"])
    torch.testing.assert_close(loss, data["loss"], rtol=1e-5, atol=1e-7)
    assert metrics["ratio"][0] == mask.sum()


def test_kl_metric_without_beta_changes_no_gradient() -> None:
    plain = loss_of(LOGITS, {"loss_type": "grpo"})
    watched = loss_of(LOGITS, {"loss_type": "grpo", "ref_logps": REF})
    assert torch.equal(plain.loss, watched.loss)
    q = (REF - plain.logps)[MASK]
    torch.testing.assert_close(watched.metrics["kl"][0], (q.exp() - q - 1).sum())


def test_infinite_kl_is_a_metric_only_without_beta(backend: Backend) -> None:
    output, gradient = loss_on(backend, {"loss_type": "grpo", "kl_estimator": "k2"}, ref_logps=LOGITS[..., 0] * INF)
    assert output.metrics["kl"][0] == INF
    assert output.loss.isfinite()
    assert gradient.isfinite().all()
