"""How far the linear loss is from its bare products on a CPU; run with `make test-slow`."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest
import torch
from torch import Tensor

from fastr1_kernels import linear_grpo_loss

B, T, D, V = 8, 128, 896, 32_768
ROUNDS = 5


def fastest(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of some interleaved runs: whatever else runs on the machine only ever adds."""
    seconds = dict.fromkeys(calls, float("inf"))
    for name in [*calls, *list(calls) * ROUNDS]:
        start = perf_counter()
        calls[name]()
        seconds[name] = min(seconds[name], perf_counter() - start)
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "bound"), [(True, 1.3), (False, 1.35)])
def test_linear_loss_takes_little_more_than_its_products(trained: bool, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, D, generator=generator), 0.03 * torch.randn(V, D, generator=generator)
    ids, advantages = torch.randint(V, (B, T), generator=generator), torch.randn(B, generator=generator)

    def products() -> list[Tensor]:
        logits = hidden.view(-1, D) @ weight.T
        return [logits @ weight, *([logits.T @ hidden.view(-1, D)] if trained else [])]

    def loss() -> None:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        linear_grpo_loss(*leaves, ids, advantages=advantages, loss_type="grpo").loss.backward()

    def eager() -> None:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        logps = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        ratio, a = (logps - logps.detach()).exp(), advantages[:, None]
        (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean(1).mean()).backward()

    seconds = fastest({"products": products, "loss": loss, "eager": eager})
    print({name: f"{value / seconds['products']:.3f}" for name, value in seconds.items()})
    assert seconds["loss"] <= bound * seconds["products"]
    assert seconds["loss"] < seconds["eager"]
