"""Inputs of the tests of the losses, and for every loss of the table an example that reads everything it can read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from conftest import Backend
from kernel_accuracy import rand
from torch import Tensor

from fastr1_kernels import LOSSES, GRPOOutput, LossOptions, grpo_loss, reference

B, T, V, D = 4, 5, 7, 3
LENGTHS = (5, 2, 0, 3)  # full, short, empty, with a hole (below)
CU_SEQLENS = torch.tensor([0, 5, 7, 7, 10], dtype=torch.int32)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
MASK[3, 1] = False

TOKEN_IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(5))
ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64)
LOGITS = rand(B, T, V) * 1.5
LOGPS = LOGITS.log_softmax(-1).gather(-1, TOKEN_IDS[..., None])[..., 0]
# Of policies near that of LOGITS.
OLD, REF, SAMPLER = (LOGPS + scale * rand(B, T, seed=seed) for seed, scale in ((1, 0.3), (2, 0.5), (3, 0.6)))
OFF_POLICY = {"old_logps": OLD, "ref_logps": REF, "beta": 0.1}
OPTION_NAMES = {f.name for f in fields(LossOptions)}

# One for every loss. Ratios of 1 ± epsilon exactly do not occur: autograd splits such ties.
EXAMPLES: dict[str, dict[str, Any]] = {
    "grpo": {**OFF_POLICY},
    "bnpo": {**OFF_POLICY},
    "dapo": {"normalizer": 23, "epsilon_high": 0.28, **OFF_POLICY},
    "dr_grpo": {"max_completion_length": 6, **OFF_POLICY},
    "cispo": {"normalizer": 11, "epsilon_high": 1.1, **OFF_POLICY},
    "sapo": {"sapo_temperature_neg": 1.4, **OFF_POLICY},
    "luspo": {"importance_sampling_level": "sequence", **OFF_POLICY},
    "tinyllava_video_r1": {"ref_logps": REF, "beta": 0.01},
}
if set(EXAMPLES) != set(LOSSES):
    raise LookupError(f"loss_cases.EXAMPLES has to have the losses of LOSSES: {set(LOSSES) ^ set(EXAMPLES)} differ")

# Options that work alike in every loss, and what a loss does at the level of sequences.
VARIANTS: dict[str, dict[str, Any]] = {
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", **OFF_POLICY},
    "gspo_tokens": {"loss_type": "dapo", "normalizer": 9, "importance_sampling_level": "sequence", **OFF_POLICY},
    "delta": {"loss_type": "bnpo", "delta": 1.25, "epsilon": 0.1, "old_logps": OLD},
    "k1": {"loss_type": "grpo", "kl_estimator": "k1", **OFF_POLICY},
    "k2": {"loss_type": "grpo", "kl_estimator": "k2", **OFF_POLICY},
    "entropy_bonus": {"loss_type": "grpo", "entropy_coef": 0.3, "old_logps": OLD},
    "temperature": {"loss_type": "grpo", "temperature": 0.8, "entropy_coef": 0.1, **OFF_POLICY},
    "unclamped": {"loss_type": "grpo", "log_ratio_clamp": None, **OFF_POLICY},
    "clamped": {"loss_type": "grpo", "log_ratio_clamp": 0.25, "epsilon": 0.5, **OFF_POLICY},
    **{
        correction: {"loss_type": "grpo", "sampler_logps": SAMPLER, "sampler_correction": correction, **cap}
        for correction, cap in {
            "token_truncate": {"sampler_cap": 1.2, **OFF_POLICY},
            "token_mask": {"sampler_cap": 1.2, **OFF_POLICY},
            "sequence_truncate": {"sampler_cap": 1.5, **OFF_POLICY},
            "sequence_mask": {"sampler_cap": 1.5, **OFF_POLICY},
            "icepop": {"sampler_cap": 1.4, "sampler_floor": 0.8, **OFF_POLICY},
        }.items()
    },
    "off_policy_mask": {"loss_type": "grpo", "off_policy_threshold": 0.05, **OFF_POLICY},
    "off_policy_mask_of_the_sampler": {"loss_type": "bnpo", "off_policy_threshold": 0.2, "sampler_logps": SAMPLER},
    "top_entropy": {"loss_type": "grpo", "top_entropy_quantile": 0.3, **OFF_POLICY},
    "every_mask": {
        "loss_type": "sapo",
        "top_entropy_quantile": 0.6,
        "off_policy_threshold": 0.1,
        "sampler_logps": SAMPLER,
        "sampler_correction": "icepop",
        "entropy_coef": 0.1,
        **OFF_POLICY,
    },
}
CASES = {name: {"loss_type": name, **EXAMPLES[name]} for name in LOSSES} | VARIANTS
# One of each kind for properties that do not depend on the objective: one launch, and two row launches.
SOME = {name: CASES[name] for name in ("dapo", "temperature", "gspo")}


def parametrize(cases: dict[str, dict[str, Any]], name: str = "arguments") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


by_case, by_some, by_loss = parametrize(CASES), parametrize(SOME), pytest.mark.parametrize("loss_type", LOSSES)


def pack(x: Any) -> Any:
    """The first LENGTHS[b] rows of every sequence, one after the other."""
    if not isinstance(x, Tensor) or tuple(x.shape[:2]) != (B, T):
        return x
    return torch.cat([x[b, :n] for b, n in enumerate(LENGTHS)])


def loss_of(logits: Tensor, arguments: dict[str, Any], **more: Any) -> GRPOOutput:
    """In float64."""
    common = {"mask": MASK, "advantages": ADVANTAGES, "return_entropy": True} | arguments | more
    return grpo_loss(logits, TOKEN_IDS, **common)


def loss_on(backend: Backend, arguments: dict[str, Any], **more: Any) -> tuple[GRPOOutput, Tensor]:
    """Output of a backend, and the gradient of the logits; everything not in the arguments is as above."""
    common = {"logits": LOGITS, "token_ids": TOKEN_IDS, "mask": MASK, "advantages": ADVANTAGES}
    common |= {"return_entropy": True} | arguments | more
    common = {k: backend.put(v) for k, v in common.items()}
    logits = common.pop("logits").detach().clone().requires_grad_()
    output = grpo_loss(logits, **common)
    output.loss.backward()
    assert logits.grad is not None
    return output, logits.grad


def loss_in_reference(
    arguments: dict[str, Any],
    dtype: torch.dtype,
    logits: Tensor = LOGITS,
    token_ids: Tensor = TOKEN_IDS,
    mask: Tensor = MASK,
    advantages: Tensor = ADVANTAGES,
) -> tuple[list[Tensor], reference.Metrics]:
    """Padded reference of logits in `dtype`: loss and gradient of the logits, metrics. Everything else is float32 at
    least, as in any trainer."""
    options = LossOptions(**{k: v for k, v in arguments.items() if k in OPTION_NAMES})
    wide = torch.promote_types(dtype, torch.float32)
    others = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in arguments.items() if k not in OPTION_NAMES}
    leaf = logits.detach().to(dtype, copy=True).requires_grad_()
    loss, metrics = reference.grpo_loss(leaf, token_ids, mask, advantages.to(wide), options, **others)
    return [loss, *torch.autograd.grad(loss, leaf)], metrics
