"""How long do loss and gradient take from given logits?"""

from __future__ import annotations

from typing import Any

import providers
from harness import Call, Group
from problems import OPTIONS, Inputs, loss_group
from shapes import Case
from torch import Tensor

from fastr1_kernels import grpo_loss


def ours(inputs: Inputs) -> Call:
    def loss_of(x: Inputs) -> Tensor:
        logps = {"old_logps": x.old_logps, "ref_logps": x.ref_logps}
        given = {"mask": x.mask, "advantages": x.advantages, "normalizer": x.normalizer}
        return grpo_loss(x.logits, x.token_ids, **given, **logps, **OPTIONS).loss  # type: ignore[arg-type]

    return providers.differentiated(inputs, loss_of)


OPS = {
    "grpo_loss": {
        "ours": ours,
        "torch eager": providers.eager,
        "torch.compile": providers.compiled,
        "Liger triton_grpo_loss": providers.liger_triton,
        "TRL selective_log_softmax": providers.trl_loss,
        "verl vanilla": providers.verl_loss,
    }
}


def set_up(case: Case) -> Group:
    return loss_group(case, linear=False)


def test_grpo_loss(case: Case, provider: str, make: Any, run: Any) -> None:
    run(provider, make, rounds=5)
