"""How long do loss and gradients take from hidden states and a head, trained or frozen?"""

from __future__ import annotations

from typing import Any

import providers
from harness import Call, Group
from problems import OPTIONS, Inputs, loss_group
from shapes import LINEAR, Case
from torch import Tensor

from fastr1_kernels import linear_grpo_loss


def ours(inputs: Inputs) -> Call:
    def loss_of(x: Inputs) -> Tensor:
        logps = {"old_logps": x.old_logps, "ref_logps": x.ref_logps}
        given = {"mask": x.mask, "advantages": x.advantages, "normalizer": x.normalizer}
        return linear_grpo_loss(x.hidden, x.weight, x.token_ids, **given, **logps, **OPTIONS).loss  # type: ignore[arg-type]

    return providers.differentiated(inputs, loss_of)


OPS = {
    LINEAR: {
        "ours": ours,
        "torch eager": providers.eager,
        "torch.compile": providers.compiled,
        "Liger LigerFusedLinearGRPOLoss": providers.liger_chunked,
        "Liger scaled cross-entropy": providers.liger_scaled,
        "cut-cross-entropy": providers.cut_cross_entropy,
        "TRL ChunkedLogProbFunction": providers.trl_loss,
    }
}


def set_up(case: Case) -> Group:
    return loss_group(case, linear=True)


def test_linear_loss(case: Case, provider: str, make: Any, run: Any) -> None:
    run(provider, make, rounds=3)
