"""Numbers that only a kernel gets wrong: NaN under a GPU's min and max, infinite references, float16, many rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from loss_cases import ADVANTAGES, LOGITS, MASK, OLD, REF, SAMPLER, TOKEN_IDS, by_some, loss_on
from torch import Tensor

from fastr1_kernels import grpo_loss, reference, selective_log_softmax

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def gpu_min_max(kernels: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """min and max of the interpreter as a GPU has them: of a number and NaN they give the number."""
    if kernels.device != "cpu":
        return
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f))


OBJECTIVES: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "delta": 1.5},
    {"loss_type": "cispo", "normalizer": 9, "epsilon_high": 5.0},
    {"loss_type": "sapo"},
    *({"loss_type": "grpo", "kl_estimator": k} for k in ("k1", "k2", "k3")),
    *({"loss_type": "grpo", "sampler_correction": c} for c in ("token_truncate", "token_mask", "icepop")),
]


@pytest.mark.parametrize("name", ["old_logps", "ref_logps", "sampler_logps"])
@pytest.mark.parametrize("arguments", OBJECTIVES, ids=lambda x: "-".join(map(str, x.values())))
def test_nan_in_other_logps_reaches_the_loss(
    kernels: Backend, gpu_min_max: None, arguments: dict[str, Any], name: str
) -> None:
    given = {"old_logps": OLD, "ref_logps": REF, "sampler_logps": SAMPLER}
    given[name] = given[name].clone()
    given[name][0, 2] = NAN
    output, gradient = loss_on(kernels, {**arguments, "beta": 0.1, **given})
    assert output.loss.isnan()
    if (name, arguments.get("kl_estimator")) != ("ref_logps", "k1"):  # whose slope is 1 wherever it is
        assert gradient[0, 2].isnan().any()
    gradient[0, 2] = 0
    assert gradient.isfinite().all()


def test_nan_in_ref_logps_reaches_the_loss_that_clamps_kl(kernels: Backend, gpu_min_max: None) -> None:
    ref = REF.clone()
    ref[0, 2] = NAN
    output, gradient = loss_on(kernels, {"loss_type": "tinyllava_video_r1", "beta": 0.1, "ref_logps": ref})
    assert output.loss.isnan()
    assert gradient[0, 2].isnan().any()


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_nan_logit_reaches_the_loss(kernels: Backend, gpu_min_max: None, entropy_coef: float) -> None:
    logits = LOGITS.clone()
    logits[0, 0, 3] = NAN
    output, gradient = loss_on(kernels, {"loss_type": "grpo", "entropy_coef": entropy_coef}, logits=logits)
    assert output.loss.isnan()
    assert gradient[0, 0].isnan().all()
    assert gradient[0, 1:].isfinite().all()


def test_rows_of_nothing_but_minus_infinity_are_nan(backend: Backend) -> None:
    logits = torch.zeros(2, 20, device=backend.device)
    logits[1] = -INF
    ids = torch.zeros(2, dtype=torch.long, device=backend.device)
    for wanted in (slice(0, 1), slice(0, 2)):
        leaf = logits.clone().requires_grad_()
        scores = selective_log_softmax(leaf, ids, return_entropy=True)
        outputs = scores[wanted]
        gradient = torch.autograd.grad(outputs, leaf, [torch.ones_like(x) for x in outputs])
        for x in (*outputs, *gradient):
            assert x[0].isfinite().all()
            assert x[1].isnan().all()


def test_k1_of_a_token_that_the_reference_excludes_has_slope_one(kernels: Backend) -> None:
    ref = REF.clone()
    ref[0, 2] = -INF
    arguments = {"loss_type": "grpo", "kl_estimator": "k1", "beta": 0.1, "old_logps": OLD}
    output, gradient = loss_on(kernels, {**arguments, "ref_logps": ref})
    _, expected = loss_on(kernels, {**arguments, "ref_logps": REF})
    assert output.loss == INF
    assert torch.equal(gradient, expected)


def half_gradient(kernels: Backend, upstream: float, **arguments: Any) -> Tensor:
    """Gradient of float16 logits by the loss times `upstream`, divided by it."""
    logits = LOGITS.half().to(kernels.device).requires_grad_()
    others = {"mask": MASK, "advantages": ADVANTAGES, "old_logps": OLD, **arguments}
    loss = grpo_loss(logits, kernels.put(TOKEN_IDS), **{k: kernels.put(v) for k, v in others.items()}).loss
    (loss * upstream).backward()
    assert logits.grad is not None
    return logits.grad.double().cpu() / upstream


@pytest.mark.parametrize("scale", [None, 65536.0, torch.tensor(65536.0)], ids=["unknown", "number", "tensor"])
def test_loss_scaling_keeps_the_gradients_of_float16(kernels: Backend, scale: float | Tensor | None) -> None:
    # A million loss tokens in the update: unscaled gradients of 1e-7 are below what float16 resolves.
    arguments = {"loss_type": "dapo", "normalizer": 1e6, "entropy_coef": 0.1}
    got = half_gradient(kernels, 65536.0, grad_scale=scale, **arguments)
    leaf = LOGITS.half().double().requires_grad_()
    others = {"mask": MASK, "advantages": ADVANTAGES, "old_logps": OLD}
    grpo_loss(leaf, TOKEN_IDS, **others, **arguments).loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(got, leaf.grad, rtol=2e-3, atol=1e-12)


@by_some
def test_grad_scale_changes_no_value_and_no_gradient(backend: Backend, arguments: dict[str, Any]) -> None:
    plain, gradient = loss_on(backend, arguments)
    for scale in (8.0, torch.tensor(0.125)):
        output, scaled = loss_on(backend, arguments, grad_scale=scale)
        assert torch.equal(output.loss, plain.loss)
        assert torch.equal(scaled, gradient)  # powers of two


def test_a_loss_that_is_multiplied_by_zero_has_gradient_zero(backend: Backend) -> None:
    logits = backend.put(LOGITS).clone().requires_grad_()
    others = {"mask": MASK, "advantages": ADVANTAGES, "old_logps": OLD, "grad_scale": torch.zeros(())}
    loss = grpo_loss(
        logits, backend.put(TOKEN_IDS), loss_type="grpo", **{k: backend.put(v) for k, v in others.items()}
    ).loss
    (loss * 0).backward()
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, torch.ones(2)])
def test_wrong_grad_scales_are_refused(scale: float | Tensor) -> None:
    with pytest.raises(ValueError, match="grad_scale"):
        grpo_loss(LOGITS, TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo", grad_scale=scale)


@pytest.mark.parametrize("index", [None, torch.tensor([6, 1, 0, 3])])
@pytest.mark.parametrize("options", [{"num_generations": 4, "scale_rewards": "batch"}, {"group_ids": None}])
def test_rewards_reduced_before_the_launch_give_the_same(
    kernels: Backend, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], index: Tensor | None
) -> None:
    rewards = torch.tensor([1.0, 3.0, 0.0, 7.0, 2.0, 2.0, 9.0, 4.0])[: None if index is not None else 4]
    options = options | ({"group_ids": torch.arange(len(rewards)) % 2} if "group_ids" in options else {})
    arguments = {"loss_type": "grpo", "advantages": None, "rewards": rewards, "sequence_index": index, **options}
    within = loss_on(kernels, arguments)
    monkeypatch.setattr("fastr1_kernels.gpu.loss.MAX_REWARDS_IN_LAUNCH", 2)
    before = loss_on(kernels, arguments)
    assert torch.equal(within[0].loss, before[0].loss)
    assert torch.equal(within[0].advantages, before[0].advantages)
    assert torch.equal(within[1], before[1])


def test_entropy_left_out_changes_nothing_else(kernels: Backend) -> None:
    from fastr1_kernels.rows import score_rows

    logits, ids = kernels.put(LOGITS), kernels.put(TOKEN_IDS)
    results = []
    for compute_entropy in (True, False):
        leaf = logits.clone().requires_grad_()
        logps, entropy = score_rows(leaf, ids, compute_entropy=compute_entropy)
        assert entropy.eq(0).all() != compute_entropy
        assert entropy.requires_grad == compute_entropy
        results.append([logps, *torch.autograd.grad(logps.sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = reference.selective_log_softmax(LOGITS, TOKEN_IDS)[0].flatten()
    torch.testing.assert_close(results[0][0].detach().double().cpu(), expected, rtol=1e-5, atol=1e-5)
