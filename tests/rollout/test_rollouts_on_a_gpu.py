"""Token steps as CUDA graphs on a GPU give what the plain loop gives there, also after the weights have changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ON_GPU
from trainer_toys import INSTRUCTION, build_model, build_tokenizer, problem

from fastr1.models.tinyllava import TinyLlavaProcessor
from fastr1.models.tinyllava.prompts import build_prompt, tokenize_with_image
from fastr1.rollout import RolloutEngine, SamplingParams
from fastr1.rollout.eager import sample_eagerly
from fastr1.rollout.speculation import SpeculativeEngine

pytestmark = ON_GPU
DEVICE, GROUP = "cuda", 6


def build(dtype: torch.dtype) -> tuple[Any, TinyLlavaProcessor, list[torch.Tensor], list[torch.Tensor]]:
    """A model, and five prompts of different lengths with their visual tokens."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, eos_scale=3.0).to(DEVICE, dtype)
    processor = TinyLlavaProcessor(tokenizer, model.config)
    texts = [build_prompt(problem(i), instruction=INSTRUCTION) for i in range(5)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        videos = [model.encode(torch.randn(4, 3, 28, 28, generator=generator).to(DEVICE)) for _ in texts]
        tokens = list(model.visual_tokens(videos))
    prompts = [torch.tensor(tokenize_with_image(text, tokenizer), device=DEVICE) for text in texts]
    return model, processor, prompts, tokens


def engine_of(number: int, *arguments: Any) -> RolloutEngine:
    return SpeculativeEngine(*arguments, number) if number else RolloutEngine(*arguments)


@torch.no_grad()
def change(model: torch.nn.Module) -> None:
    """In place, as an optimizer does."""
    for parameter in model.parameters():
        parameter.mul_(1.02)


@pytest.mark.parametrize("number", [0, 3], ids=["plain", "speculation"])
def test_graphs_give_the_tokens_of_the_plain_loop(number: int) -> None:
    model, processor, prompts, tokens = build(torch.float32)
    params = SamplingParams(40, temperature=0.9, top_k=50)
    engine = engine_of(number, model, processor, params)
    for seed, shown in enumerate((slice(0, 5), slice(1, 3), slice(0, 5), slice(2, 3))):
        given = prompts[shown], tokens[shown]
        ours = engine.sample(*given, num_generations=GROUP, seed=seed)
        theirs = sample_eagerly(model, processor, *given, params, num_generations=GROUP, seed=seed)
        assert ours.completion_ids.tolist() == theirs.completion_ids.tolist()
        assert ours.is_truncated.tolist() == theirs.is_truncated.tolist()
        torch.testing.assert_close(ours.sampler_logps, theirs.sampler_logps, atol=1e-4, rtol=0)
        change(model)
    assert engine.graphs is not None
    assert engine.graphs.num_replays > engine.graphs.num_captures > 0


def test_log_probabilities_in_bfloat16_are_those_of_a_padded_forward() -> None:
    model, processor, prompts, tokens = build(torch.bfloat16)
    engine = RolloutEngine(model, processor, SamplingParams(40))
    for _ in range(2):
        rollout = engine.sample(prompts, tokens, num_generations=GROUP)
        ids, mask = rollout.completion_ids, rollout.completion_mask
        with torch.no_grad():
            logits = model.padded_logits(prompts, tokens, ids, mask).float()
        expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        gap = (rollout.full_logps - expected)[mask].abs()
        assert gap.mean() < 0.03
        change(model)
