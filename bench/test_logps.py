"""How long do log-probabilities and entropies take, from logits and from a head, without gradient?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import providers
import torch
from harness import Call, Group
from problems import Inputs, score_group
from providers import load, needs_gpu
from shapes import Case
from torch import Tensor

from fastr1_kernels import linear_logps, selective_log_softmax

Scores = tuple[Tensor, Tensor]


def scored(inputs: Inputs, score: Callable[[Inputs], Scores]) -> Call:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        logps, entropy = score(inputs)
        return {"logps": logps.flatten(), "entropy": entropy.flatten()}

    return call


def ours(inputs: Inputs) -> Call:
    return scored(inputs, lambda x: selective_log_softmax(x.logits, x.token_ids, return_entropy=True))  # type: ignore[arg-type]


def ours_of_head(inputs: Inputs) -> Call:
    return scored(inputs, lambda x: linear_logps(x.hidden, x.weight, x.token_ids, return_entropy=True))  # type: ignore[arg-type]


def by_hand(rows: Tensor, weight: Tensor | None, token_ids: Tensor) -> Scores:
    logits = rows if weight is None else rows @ weight.T
    log_probs = logits.float().log_softmax(-1)
    logps = log_probs.gather(-1, token_ids[..., None]).squeeze(-1)
    return logps, -(log_probs.exp() * log_probs).sum(-1)


def eager(inputs: Inputs) -> Call:
    rows = inputs.logits if inputs.logits is not None else inputs.hidden
    return scored(inputs, lambda x: by_hand(rows, x.weight, x.token_ids))  # type: ignore[arg-type]


def compiled(inputs: Inputs) -> Call:
    function = torch.compile(by_hand, dynamic=False)
    rows = inputs.logits if inputs.logits is not None else inputs.hidden
    return scored(inputs, lambda x: function(rows, x.weight, x.token_ids))


def trl(inputs: Inputs) -> Call:
    utils = load("trl.trainer.utils")
    if inputs.logits is not None:
        return scored(inputs, lambda x: utils.selective_log_softmax_and_entropy(x.logits, x.token_ids))
    return scored(inputs, lambda x: providers.trl_head(utils, x, ("log_probs", "entropy"))[:2])  # type: ignore[return-value]


def liger_scaled(inputs: Inputs) -> Call:
    function = load("liger_kernel.ops.fused_linear_scaled_cross_entropy").LigerFusedLinearScaledCrossEntropyFunction

    def score(x: Inputs) -> Scores:
        rows = (x.hidden.flatten(0, 1), x.weight, x.token_ids.flatten())  # type: ignore[union-attr]
        nll, entropy = function.apply(*rows, return_entropy=True)
        return -nll, entropy

    return scored(inputs, score)


def verl_head(inputs: Inputs) -> Call:
    needs_gpu("its Triton kernel")
    function = load("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return scored(inputs, lambda x: function(x.hidden, x.weight, x.token_ids, 1.0, "none"))


OPS = {
    "selective_log_softmax": {
        "ours": ours,
        "torch eager": eager,
        "torch.compile": compiled,
        "TRL selective_log_softmax": trl,
    },
    "linear_logps": {
        "ours": ours_of_head,
        "torch eager": eager,
        "Liger scaled cross-entropy": liger_scaled,
        "TRL ChunkedLogProbFunction": trl,
        "verl linear_cross_entropy": verl_head,
    },
}


def set_up(case: Case) -> Group:
    return score_group(case, linear=case.op == "linear_logps")


def test_logps(case: Case, provider: str, make: Any, run: Any) -> None:
    run(provider, make, rounds=5)
