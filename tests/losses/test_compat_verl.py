"""`compat.verl` agrees with verl's policy losses: with its formulas, and with verl itself where that is installed."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastr1_kernels.compat import verl as ours

B, T = 4, 6
MASK = (torch.arange(T) < torch.tensor([6, 3, 0, 5])[:, None]).long()


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGPS = -rand(B, T, seed=0).abs()
OLD = LOGPS + 0.8 * rand(B, T, seed=1)
ADVANTAGES = rand(B, T, seed=2)
WEIGHTS = rand(B, T, seed=3).mul(0.4).exp()
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def configuration(**changes: Any) -> SimpleNamespace:
    fields = {
        "clip_ratio": 0.2,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28,
        "clip_ratio_c": 1.9,
        "tau_pos": 1.1,
        "tau_neg": 1.3,
        "global_batch_info": {},
        "policy_loss": SimpleNamespace(loss_mode="vanilla"),
    }
    return SimpleNamespace(**(fields | changes))


def per_token(mode: str, logps: Tensor, config: SimpleNamespace) -> Tensor:
    """The formulas of verl's documentation, one by one."""
    difference, a = logps - OLD, ADVANTAGES
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    if mode == "gspo":
        mean = (difference * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True).clamp(min=1)
        difference = logps - logps.detach() + mean.detach()
    ratio = difference.exp()
    if mode == "cispo":
        return -ratio.clamp(low, high).detach() * a * logps
    if mode == "sapo":
        tau = torch.where(a > 0, config.tau_pos, config.tau_neg).double()
        return -a * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
    dual = torch.where(a < 0, torch.minimum(-a * config.clip_ratio_c, loss), loss)
    return dual if mode == "vanilla" else loss


def aggregate(x: Tensor, mode: str, info: dict[str, Any]) -> Tensor:
    processes, sums = info.get("dp_size", 1), (x * MASK).sum(1)
    sequences = info.get("global_batch_size", int(MASK.any(1).sum()))
    if mode == "token-mean":
        return sums.sum() / info.get("batch_num_tokens", int(MASK.sum())) * processes
    if mode == "token-sum":
        return sums.sum() * processes
    if mode == "seq-mean-token-mean":
        return (sums / MASK.sum(1).clamp(min=1)).sum() / sequences * processes
    scale = info.get("loss_scale_factor", T) if mode.endswith("norm") else 1
    return sums.sum() / sequences / scale * processes


INFOS = [{}, {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 11}]
CASES = [(m, a) for m in ours.MODES for a in MODES if m != "sapo" or a == "seq-mean-token-mean"]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("info", INFOS, ids=["local", "global"])
@pytest.mark.parametrize(("mode", "aggregation"), CASES)
def test_loss_is_its_formula(mode: str, aggregation: str, info: dict[str, Any], weights: Tensor | None) -> None:
    config = configuration(global_batch_info=info)
    logps = LOGPS.clone().requires_grad_()
    expected = aggregate(per_token(mode, logps, config) * (1 if weights is None else weights), aggregation, info)
    (expected_gradient,) = torch.autograd.grad(expected, logps)
    loss, _ = ours.policy_loss(OLD, logps, ADVANTAGES, MASK, aggregation, config, weights, loss_mode=mode)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], expected_gradient)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize(("mode", "aggregation"), CASES)
def test_loss_and_metrics_agree_with_verl(mode: str, aggregation: str, weights: Tensor | None) -> None:
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    actor = importlib.import_module("verl.workers.config").ActorConfig
    config = actor(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=1.9,
        tau_pos=1.1,
        tau_neg=1.3,
    )
    results = []
    for function in (algorithms.get_policy_loss_fn(mode), lambda **x: ours.policy_loss(**x, loss_mode=mode)):
        logps = LOGPS.clone().requires_grad_()
        loss, metrics = function(
            old_log_prob=OLD,
            log_prob=logps,
            advantages=ADVANTAGES,
            response_mask=MASK,
            loss_agg_mode=aggregation,
            config=config,
            rollout_is_weights=weights,
        )
        metrics = {name: torch.as_tensor(float(value)) for name, value in metrics.items()}
        results.append({"loss": loss, "gradient": torch.autograd.grad(loss, logps)[0], **metrics})
    torch.testing.assert_close(*results, check_dtype=False, rtol=1e-5, atol=1e-7)


def test_configuration_chooses_the_mode_and_may_be_a_mapping() -> None:
    config = configuration(policy_loss=SimpleNamespace(loss_mode="gspo"), clip_ratio_low=None)
    given = ours.policy_loss(OLD, LOGPS, ADVANTAGES, MASK, config=config)
    named = ours.policy_loss(OLD, LOGPS, ADVANTAGES, MASK, config=vars(config), loss_mode="gspo")
    assert torch.equal(given[0], named[0])
    assert given[1] == named[1]
    assert set(given[1]) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def test_masked_tokens_reach_nothing() -> None:
    spoilt = [torch.where(MASK.bool(), x, torch.nan) for x in (OLD, LOGPS, ADVANTAGES, WEIGHTS)]
    logps = spoilt[1].requires_grad_()
    for mode in ours.MODES:
        common = {"loss_agg_mode": "seq-mean-token-mean", "config": configuration(), "loss_mode": mode}
        loss, metrics = ours.policy_loss(spoilt[0], logps, spoilt[2], MASK, rollout_is_weights=spoilt[3], **common)
        expected, clean = ours.policy_loss(OLD, LOGPS, ADVANTAGES, MASK, rollout_is_weights=WEIGHTS, **common)
        torch.testing.assert_close(loss.detach(), expected)
        assert metrics == pytest.approx(clean)
        gradient = torch.autograd.grad(loss, logps)[0]
        assert gradient.isfinite().all()
        assert not gradient[~MASK.bool()].any()


REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"config": None}, "config=None"),
    ({}, {"loss_mode": "clip_cov"}, "loss_mode='clip_cov'"),
    ({}, {"loss_agg_mode": "mean"}, "loss_agg_mode='mean'"),
    ({}, {"loss_mode": "sapo"}, "loss_agg_mode='token-mean': sapo"),
    ({"clip_ratio_c": 1.1}, {}, "delta=1.1"),
    ({"global_batch_info": {"dp_size": 2}}, {}, "needs batch_num_tokens"),
    ({"global_batch_info": {"cp_size": 2}}, {}, "global_batch_info has cp_size"),
]


@pytest.mark.parametrize(("changes", "call", "message"), REFUSALS)
def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.policy_loss(OLD, LOGPS, ADVANTAGES, MASK, **({"config": configuration(**changes)} | call))


def test_head_gives_log_probabilities_and_entropy() -> None:
    hidden, weight = rand(2, 3, 4, seed=5).requires_grad_(), rand(9, 4, seed=6)
    labels = torch.tensor([[1, 2, 8], [0, 4, 5]])
    log_probs = (hidden @ weight.T / 0.8).log_softmax(-1).view(6, 9)
    expected = log_probs.gather(1, labels.view(6, 1)).squeeze(1)
    logps, entropy = ours.linear_cross_entropy(hidden, weight, labels, 0.8)
    torch.testing.assert_close([logps, entropy], [expected, -(log_probs.exp() * log_probs).sum(-1)])
    gradients = [torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (logps, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(ours.linear_cross_entropy(hidden, weight, labels, 0.8, "sum")[0], logps.sum())
    assert torch.equal(ours.linear_cross_entropy(hidden, weight, labels, 0.8, "mean")[0], logps.mean())
    with pytest.raises(ValueError, match="dist_process_group"):
        ours.linear_cross_entropy(hidden, weight, labels, dist_process_group=object())
    with pytest.raises(ValueError, match="reduction='max'"):
        ours.linear_cross_entropy(hidden, weight, labels, reduction="max")


def test_registered_losses_are_found_by_verl() -> None:
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    for name, mode in zip(ours.register_policy_losses(), ours.MODES, strict=True):
        assert algorithms.get_policy_loss_fn(name).keywords == {"loss_mode": mode}
