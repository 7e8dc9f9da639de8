"""What the providers of a rollout are held to.

Ours and the eager loop draw with the same noise: in float32 their tokens are those of the eager loop, one for one. In
bfloat16 a rounding can turn a draw, and all that follow in its row; there, and in float32 too, the log-probabilities
that came with the tokens must be those of transformers' own forward over padded rows of these tokens. A provider with
noise of its own is held to the shape: that many completions of that many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import harness
import torch
from harness import Group, Outputs
from torch import Tensor
from update_judge import padded_logps
from update_work import Work

from fastr1.models import VideoLanguageModel
from fastr1.roofline import GroupWork, ModelShape, StepWork, VisualFlops, probe_machine, step_costs
from fastr1.schema import Rollout

OWN_NOISE = {"shape"}  # outputs of a provider that draws other tokens
SAME_NOISE = {"shape", "lengths", "token_ids", "logps"}


def same_noise(rollout: Rollout) -> Outputs:
    ids, mask = rollout.completion_ids, rollout.completion_mask
    return {**own_noise(ids), "lengths": mask.sum(1), "token_ids": ids, "logps": rollout.sampler_logps}


def own_noise(ids: Tensor) -> Outputs:
    return {"shape": torch.tensor(ids.shape)}


@dataclass
class RolloutGroup(Group):
    """Errors are shares of rows or tokens that differ, and the relative error of log-probabilities; a wrong shape is
    an error of 1."""

    def errors(self, outputs: Outputs) -> dict[str, float]:
        if set(outputs) not in (OWN_NOISE, SAME_NOISE):
            raise ValueError(f"outputs {sorted(outputs)}: give {sorted(OWN_NOISE)} or {sorted(SAME_NOISE)}")
        if not outputs["shape"].equal(self.gold["shape"]):
            return {"shape": 1.0}
        errors = {"shape": 0.0}
        exact = ["lengths", *["token_ids"] * (self.case.dtype == "float32")]
        if set(outputs) == SAME_NOISE:
            errors |= {name: share_unlike(outputs[name].cpu(), self.gold[name]) for name in exact}
            errors["logps"] = self.logps_error(outputs["token_ids"], outputs["logps"])
        return errors

    def logps_error(self, ids: Tensor, logps: Tensor) -> float:
        """Over the tokens that were not forced."""
        work: Work = self.inputs
        work.batch = replace(work.batch, rollout=replace(work.batch.rollout, completion_ids=ids))
        with torch.no_grad():
            rows = [padded_logps(work, work.model, prompt)[0] for prompt in range(self.case.num_prompts)]
        is_drawn = torch.arange(ids.shape[1])[None] < self.gold["lengths"][:, None] - 1
        is_drawn = is_drawn.to(ids.device) & (ids != 0)
        gold = torch.cat(rows)[is_drawn]
        return harness.distance(logps[is_drawn], gold) / float(gold.double().norm())


def share_unlike(got: Tensor, gold: Tensor) -> float:
    return float((got != gold).double().mean())


def floor_ms(model: VideoLanguageModel, prompt_length: int, lengths: list[int], group: int) -> float:
    """Prefill and token steps, each bound by the slower of its products and its bytes at the rates of this device."""
    shape = ModelShape(
        layout=model.layout,
        dtype_bytes=model.dtype.itemsize,
        num_trainable=0,
        trains_decoder=False,
        num_visual=0,
        visual=lambda _: VisualFlops(0.0, 0.0),
    )
    groups = [GroupWork(prompt_length, tuple(lengths[i : i + group]), ()) for i in range(0, len(lengths), group)]
    costs = step_costs(shape, StepWork(groups, has_reference=False))
    machine = probe_machine(model.device, model.dtype)
    return 1e3 * sum(costs[phase].floor_seconds(machine) for phase in ("prefill", "decode"))
