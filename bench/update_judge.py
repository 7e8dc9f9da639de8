"""What the providers of an update are held to: loss and gradients of transformers' own forward over padded rows, one
prompt at a time, with the loss written out here."""

from __future__ import annotations

from dataclasses import dataclass

import harness
import torch
from harness import Group, Outputs
from torch import Tensor
from update_passes import NoVideos, padded_states
from update_work import Work

from fastr1.models import VideoLanguageModel


@dataclass
class UpdateGroup(Group):
    """Outputs are the loss and the gradient of every parameter, or log-probabilities; errors are those of whole parts
    of the model."""

    @property
    def strict_tolerance(self) -> float:
        """In bfloat16 the judge rounds like what it judges, in all layers: told apart is what has another gradient."""
        return 0.25 if self.case.dtype == "bfloat16" else super().strict_tolerance

    def errors(self, outputs: Outputs) -> dict[str, float]:
        if set(outputs) != set(self.gold):
            missing = sorted(set(self.gold) ^ set(outputs))
            raise ValueError(f"{len(missing)} outputs are missing or too many, first {missing[:4]}")
        squares: dict[str, tuple[float, float]] = {}
        for name, gold in self.gold.items():
            part = part_of(name)
            error, norm = squares.get(part, (0.0, 0.0))
            scale = self.scales.get(name) or harness.distance(gold, torch.zeros_like(gold))
            squares[part] = (error + harness.distance(outputs[name], gold) ** 2, norm + scale**2)
        return {part: (error / norm) ** 0.5 for part, (error, norm) in squares.items()}


def part_of(name: str) -> str:
    """ "connector", "embedding" (and head), "layers"; other outputs are parts themselves."""
    if "." not in name:
        return name
    return "connector" if name.startswith("connector") else "embedding" if "embed_tokens" in name else "layers"


def padded_logps(work: Work, model: VideoLanguageModel, prompt: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (G, T) of the completions of a prompt, and their mask."""
    rows, rollout = work.rows_of(slice(prompt, prompt + 1)), work.batch.rollout
    ids, mask = rollout.completion_ids[rows], rollout.completion_mask[rows]
    videos = work.videos[prompt : prompt + 1]
    with torch.no_grad():
        features = [model.encode(video) for video in videos]
    tokens = model.visual_tokens(features) if videos else NoVideos(model, 1).tokens
    hidden = padded_states(model, [work.batch.prompt_ids[prompt]], tokens, ids, mask)[:, -ids.shape[1] :]
    logits = model.project(hidden).float()
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0], mask


def judge_update(work: Work) -> tuple[Outputs, dict[str, float]]:
    """Loss and gradients of the whole batch; and what an error of the loss is relative to, for its terms cancel."""
    work.forget_gradients()
    total = scale = 0.0
    for prompt in range(work.case.num_prompts):
        logps, mask = padded_logps(work, work.model, prompt)
        advantages = work.batch.advantages[work.rows_of(slice(prompt, prompt + 1)), None]
        terms = -advantages * (logps - logps.detach()).exp()
        if work.reference is not None:
            with torch.no_grad():
                reference, _ = padded_logps(work, work.reference, prompt)
            q = reference - logps
            terms = terms + work.case.beta * (q.exp() - q - 1)
        loss = torch.where(mask, terms, 0.0).sum() / work.normalizer
        loss.backward()
        total += loss.item()
        scale += float(torch.where(mask, terms, 0.0).detach().abs().sum()) / work.normalizer
    gold = {"loss": torch.tensor(total), **{name: grad.clone() for name, grad in work.gradients().items()}}
    work.forget_gradients()
    return gold, {"loss": scale}


@torch.no_grad()
def judge_reference(work: Work) -> tuple[Outputs, dict[str, float]]:
    """Log-probabilities (B·G, T)."""
    assert work.reference is not None
    found = [padded_logps(work, work.reference, prompt) for prompt in range(work.case.num_prompts)]
    return {"logps": torch.cat([torch.where(mask, logps, 0.0) for logps, mask in found])}, {}
