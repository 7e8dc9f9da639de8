"""How long do the completions of an update take: ours, the plain loop that is its oracle, the loop as it was, and
transformers' own generation?"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from harness import Call, Group, Outputs, UnavailableError
from rollout_before import sample_before
from rollout_judge import RolloutGroup, floor_ms, own_noise, same_noise
from rollout_shapes import ROLLOUT, RolloutCase, stated
from torch import Tensor
from transformers import GenerationConfig
from update_steps import encode, ending_at
from update_work import Work, draw_work, make_model

from fastr1.config import RolloutConfig
from fastr1.rollout import SamplingParams, build_sampler
from fastr1.schema import Rollout


@torch.no_grad()
def visual_tokens(work: Work) -> list[Tensor]:
    model = work.model
    if not work.videos:
        return [torch.zeros(0, model.layout.hidden_size, device=model.device)] * work.case.num_prompts
    return [token for video in work.videos for token in model.visual_tokens([encode(model, video)])]


def forced(work: Work, backend: str) -> Callable[[], Rollout]:
    """Rollouts by what the trainer uses, every completion as long as the case says."""
    case, tokens = work.case, visual_tokens(work)
    ends = partial(ending_at, work.batch.lengths, case.num_generations, work.model.layout.vocab_size - 1)
    with ends() as processor:
        config = RolloutConfig(backend=backend)  # type: ignore[arg-type]
        sampler = build_sampler(work.model, processor, SamplingParams(case.max_length), config)

    def call() -> Rollout:
        with ends():
            return sampler(work.batch.prompt_ids, tokens, num_generations=case.num_generations)

    return call


def sampling(work: Work, backend: str) -> Call:
    call = forced(work, backend)
    return lambda: same_noise(call())


def before(work: Work) -> Call:
    case, tokens = work.case, visual_tokens(work)
    arguments = (work.model, work.batch.prompt_ids, tokens, case.max_length, case.num_generations)
    return lambda: own_noise(sample_before(*arguments))


def endless(case: RolloutCase) -> GenerationConfig:
    """Draws from the whole vocabulary, and no token that ends a completion."""
    return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=case.max_length, eos_token_id=-1, pad_token_id=0)


def generate(work: Work, cache: str) -> Call:
    """transformers' `generate` behind the embeddings of every prompt, repeated for each of its completions."""
    case, tokens, model = work.case, visual_tokens(work), work.model
    config = endless(case)
    config.cache_implementation = cache

    @torch.no_grad()
    def call() -> Outputs:
        embeds, mask = model.embed_prompts(work.batch.prompt_ids, tokens)
        embeds, mask = (x.repeat_interleave(case.num_generations, dim=0) for x in (embeds, mask))
        lm: Any = model.language_model
        return own_noise(lm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config))

    return call


def generate_batch(work: Work) -> Call:
    """transformers' continuous batching."""
    if work.videos:
        raise UnavailableError("takes token ids, so no videos")
    case, lm = work.case, work.model.language_model
    prompts = [ids.tolist() for ids in work.batch.prompt_ids for _ in range(case.num_generations)]

    def call() -> Outputs:
        found = lm.generate_batch(prompts, generation_config=endless(case))
        return own_noise(torch.tensor([output.generated_tokens for output in found.values()]))

    return call


OPS = {
    ROLLOUT: {
        "ours": partial(sampling, backend="engine"),
        "eager loop": partial(sampling, backend="eager"),
        "before": before,
        "generate": partial(generate, cache="dynamic"),
        "generate, static cache": partial(generate, cache="static"),
        "generate_batch": generate_batch,
    }
}


def set_up(case: RolloutCase) -> Group:
    model = make_model(case)
    work = draw_work(case, model)
    model.eval()
    gold = {"shape": torch.tensor([case.num_sequences, case.max_length]), "lengths": torch.tensor(work.batch.lengths)}
    if case.dtype == "float32":
        gold["token_ids"] = forced(work, "eager")().completion_ids.cpu()
    floor = floor_ms(model, case.prompt_length, work.batch.lengths, case.num_generations)
    return RolloutGroup(case, work, gold, {}, floor, None)


def checked(errors: dict[str, float]) -> str:
    """What a row says of what was compared."""
    names = {"token_ids": "tokens", "logps": "log-probabilities"}
    return next((f"{names[key]} and lengths" for key in names if key in errors), "number of tokens alone")


def test_rollout(case: RolloutCase, provider: str, make: Any, run: Any, group: Group) -> None:
    row = run(provider, make, rounds=3)
    num_tokens = sum(group.inputs.batch.lengths)
    row.update(stated(case, provider, row["median_ms"], num_tokens, harness.device_name()))
    row["checked"] = checked(row["errors"])
    row["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY")
    row["gomp_spincount"] = os.environ.get("GOMP_SPINCOUNT")
    if torch.cuda.is_available():
        row["device_peak_bytes"] = torch.cuda.max_memory_allocated()  # weights and kept arenas included
