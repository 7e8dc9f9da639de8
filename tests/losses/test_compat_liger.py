"""`compat.liger` has Liger's signatures, and its values and gradients in every loss that both know."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor

from fastr1_kernels.compat import liger as ours

theirs = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel is not installed")

B, T, D, V = 4, 6, 8, 19
MASK = torch.arange(T) < torch.tensor([6, 3, 0, 5])[:, None]
MASK[3, 2] = False


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT, BIAS = rand(B, T, D, seed=0), rand(V, D, seed=1), rand(V, seed=2)
IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))
ADVANTAGES = torch.tensor([1.2, -0.8, 0.5, -1.5])
LOGPS = (HIDDEN @ WEIGHT.T).log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
OLD, REF = (LOGPS + 0.3 * rand(B, T, seed=seed) for seed in (4, 5))
RATIO = rand(B, T, seed=6).mul(0.4).exp()
TOKEN_LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")


def loss_and_gradients(module: Any, options: dict[str, Any], call: dict[str, Any]) -> tuple[list[Tensor], Any]:
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    leaves = [hidden, weight]
    if "bias" in call:
        call = call | {"bias": call["bias"].clone().requires_grad_()}
        leaves.append(call["bias"])
    loss_module = module.LigerFusedLinearGRPOLoss(compiled=False, **options)
    # Liger asks for a reference even where beta is 0.
    defaults = {"old_per_token_logps": OLD, "ref_per_token_logps": REF}
    loss, metrics = loss_module(hidden, weight, IDS, MASK.long(), ADVANTAGES, **(defaults | call))
    return [loss, *torch.autograd.grad(loss * 1.7, leaves)], metrics


def assert_equal(options: dict[str, Any], **call: Any) -> None:
    (got, metrics), (expected, expected_metrics) = (loss_and_gradients(m, options, call) for m in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(list(metrics), list(expected_metrics), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("loss_type", TOKEN_LOSSES)
def test_every_loss_agrees(loss_type: str, beta: float) -> None:
    more = {"max_completion_length": 9} if loss_type == "dr_grpo" else {}
    more |= {"epsilon_high": 1.1} if loss_type == "cispo" else {"epsilon_high": 0.28}
    assert_equal({"loss_type": loss_type, "beta": beta, "epsilon_low": 0.15, **more})


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_sequence_ratios_agree(loss_type: str) -> None:
    assert_equal({"loss_type": loss_type, "beta": 0.0, "importance_sampling_level": "sequence", "epsilon_low": 0.01})


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "on_policy": ({}, {"old_per_token_logps": None}),
    "temperature": ({"temperature": 0.7}, {}),
    "delta": ({"delta": 1.3, "loss_type": "grpo"}, {}),
    "chunks": ({"chunk_size": 2}, {}),
    "sapo_temperatures": ({"loss_type": "sapo", "sapo_temperature_pos": 1.4, "sapo_temperature_neg": 0.6}, {}),
    "bias": ({}, {"bias": BIAS}),
    "num_items": ({}, {"num_items_in_batch": 23}),
    "num_items_tensor": ({"loss_type": "cispo", "epsilon_high": 1.2}, {"num_items_in_batch": torch.tensor(31)}),
    "sampler_weights": ({}, {"vllm_is_ratio": RATIO}),
    "sampler_weights_of_sequences": ({"loss_type": "grpo"}, {"vllm_is_ratio": RATIO[:, :1]}),
    "reference_head": (
        {},
        {
            "ref_per_token_logps": None,
            "ref_input": HIDDEN + 0.1,
            "ref_weight": WEIGHT.roll(1, 0),
            "ref_bias": BIAS,
        },
    ),
}


@pytest.mark.parametrize(("options", "call"), VARIANTS.values(), ids=VARIANTS.keys())
def test_options_agree(options: dict[str, Any], call: dict[str, Any]) -> None:
    assert_equal(options, **call)


def through_identity(options: dict[str, Any], reduce: bool) -> tuple[Any, Tensor]:
    """`triton_grpo_loss` of logits, and of Liger's chunked loss the logits' gradient: its head is the identity."""
    logits = torch.cat([HIDDEN @ WEIGHT.T, rand(B, 1, V, seed=8)], 1).requires_grad_()
    return ours.triton_grpo_loss(logits, OLD, REF, IDS, ADVANTAGES, MASK.long(), reduce=reduce, **options), logits


@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("loss_type", TOKEN_LOSSES)
def test_loss_of_logits_agrees(loss_type: str, beta: float) -> None:
    options = {"loss_type": loss_type, "beta": beta}
    (loss, metrics), logits = through_identity(options, reduce=True)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    twin = theirs.LigerFusedLinearGRPOLoss(
        compiled=False, temperature=0.9, epsilon_high=0.4, max_completion_length=T, **options
    )
    hidden = logits[:, :-1].detach().requires_grad_()
    expected, expected_metrics = twin(
        hidden, torch.eye(V), IDS, MASK.long(), ADVANTAGES, ref_per_token_logps=REF, old_per_token_logps=OLD
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(list(metrics), list(expected_metrics), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient[:, :-1], torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-6)
    assert not gradient[:, -1].any()

    (per_token, kl, clipped), logits = through_identity(options, reduce=False)
    assert per_token.shape == clipped.shape == (B, T)
    torch.testing.assert_close(clipped.sum() / MASK.sum(), metrics[-1])
    assert (kl is None) == (beta == 0)
    if kl is not None:
        torch.testing.assert_close(kl.sum() / MASK.sum(), metrics[0], rtol=1e-5, atol=1e-7)
    if loss_type in ("bnpo", "dapo", "cispo"):
        summed = per_token.sum() / MASK.sum()
        torch.testing.assert_close(summed, loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(summed, logits)[0], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
def test_loss_of_logits_on_kernels(kernels: Backend, inplace: bool) -> None:
    """`inplace` changes no number: where the kernels run the gradient takes the place of logits that are no leaf."""
    arguments = [x.to(kernels.device) for x in (OLD, REF, IDS, ADVANTAGES, MASK.long())]
    leaf = torch.cat([HIDDEN @ WEIGHT.T, rand(B, 1, V, seed=8)], 1).to(kernels.device).requires_grad_()
    logits = leaf * 1
    loss, metrics = ours.triton_grpo_loss(logits, *arguments, inplace=inplace, reduce=True, vllm_is_ratio=None)
    (gradient,) = torch.autograd.grad(loss, leaf)
    head = ours.LigerFusedLinearGRPOLoss(temperature=0.9, epsilon_high=0.4)
    hidden = leaf[:, :-1].detach().cpu().requires_grad_()
    logps = {"ref_per_token_logps": REF, "old_per_token_logps": OLD}
    expected, expected_metrics = head(hidden, torch.eye(V), IDS, MASK.long(), ADVANTAGES, **logps)
    kernels.assert_close(loss, expected)
    kernels.assert_close(torch.stack(metrics), torch.stack(expected_metrics))
    torch.testing.assert_close(gradient[:, :-1].cpu(), torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(logits.detach(), leaf.detach()) == (not inplace)


def test_log_probabilities_are_masked_and_of_the_last_tokens() -> None:
    logits = torch.cat([HIDDEN @ WEIGHT.T, rand(B, 1, V, seed=8)], 1)
    ids = torch.cat([torch.full((B, 3), -7), torch.where(MASK, IDS, -100)], 1)
    mask = torch.cat([torch.ones(B, 3, dtype=torch.bool), MASK], 1)
    got = ours.fused_selective_log_softmax(logits.requires_grad_(), ids, temperature=1.0, mask=mask)
    torch.testing.assert_close(got, torch.where(MASK, LOGPS, 0.0))
    assert not got.requires_grad


def test_signatures_are_liger_s() -> None:
    of_logits = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    pairs = [
        (ours.LigerFusedLinearGRPOLoss.__init__, theirs.LigerFusedLinearGRPOLoss.__init__),
        (ours.LigerFusedLinearGRPOLoss.forward, theirs.LigerFusedLinearGRPOLoss.forward),
        (ours.triton_grpo_loss, of_logits.triton_grpo_loss),
        (ours.fused_selective_log_softmax, of_logits.fused_selective_log_softmax),
    ]
    for mine, other in pairs:
        got, expected = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (mine, other))
        assert got == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"loss_type": "tinyllava_video_r1"}, "loss_type='tinyllava_video_r1'"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl=True"),
        ({"vespo_k_pos": 1.0}, "vespo_"),
        ({"use_ref_model": False}, "use_ref_model=False with beta=0.04"),
        ({"delta": 1.1}, "delta=1.1"),
        ({"delta": 4.0, "loss_type": "sapo"}, "delta=4.0 has no effect"),
        ({"loss_type": "luspo"}, "needs 'sequence'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length=None"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearGRPOLoss(**options)


def test_kl_without_reference_and_wrong_weights_are_refused() -> None:
    arguments = (HIDDEN, WEIGHT, IDS, MASK, ADVANTAGES)
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        ours.LigerFusedLinearGRPOLoss()(*arguments)
    with pytest.raises(ValueError, match=r"vllm_is_ratio has shape \(4, 3\)"):
        ours.LigerFusedLinearGRPOLoss(beta=0.0)(*arguments, vllm_is_ratio=RATIO[:, :3])
