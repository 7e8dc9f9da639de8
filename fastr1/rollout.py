"""Sample completions from the trainer's own model: prompts prefilled once, all completions decoded together.

A draw is argmax(logits/temperature + Gumbel noise), and the noise is a hash of (seed, prompt key, completion index,
position, token). So a completion does not depend on the other prompts in the batch, their order, or the number of
ranks. Numerics: logits in fp32, noise in fp64 (2⁻⁵² steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from fastr1.models import TinyLlavaVideo
from fastr1.schema import Rollout

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. `temperature=0` is greedy; `top_k=0` and `top_p=1` keep the whole vocabulary."""

    max_completion_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@torch.no_grad()
def sample_completions(
    model: TinyLlavaVideo,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[torch.Tensor],  # B × (L_i,) int64 with −200
    videos: Sequence[torch.Tensor],  # B × features (F, patches − 1, vision_dim) or pixel values (F, 3, S, S)
    params: SamplingParams,
    *,
    num_generations: int = 1,
    seed: int = 0,
    prompt_keys: Sequence[int] | None = None,  # B ids that make draws independent of batching; default 0…B−1
) -> Rollout:
    """G completions for each prompt, rows in prompt-major order.

    Returns `sampler_logps` under the distribution that was sampled from (after temperature, top-k and top-p; the plain
    softmax when greedy). Ends at the tokenizer's end-of-sequence token.
    """
    embeds, prompt_mask = model.embed_prompts(prompt_ids, model.visual_tokens(videos))
    cache, hidden = model.prefill(embeds, prompt_mask, num_generations)
    mask = prompt_mask.repeat_interleave(num_generations, dim=0)
    position = mask.sum(dim=1, keepdim=True)
    row_keys = completion_keys(seed, range(len(prompt_ids)) if prompt_keys is None else prompt_keys, num_generations)
    row_keys = row_keys.to(embeds.device)
    warpers = _build_warpers(params)
    decoder, head = model.language_model.model, model.language_model.lm_head
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    finished = torch.zeros(mask.shape[0], dtype=torch.bool, device=embeds.device)
    ids, masks, logps = [], [], []
    for step in range(params.max_completion_length):
        token, logp = _draw(head(hidden)[:, -1].float(), params, warpers, row_keys, step)
        ids.append(torch.where(finished, pad, token))
        masks.append(~finished)
        logps.append(torch.where(finished, 0.0, logp))
        finished = finished | (token == eos)
        if step + 1 == params.max_completion_length or bool(finished.all()):
            break
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        hidden = decoder(
            inputs_embeds=decoder.embed_tokens(ids[-1])[:, None],
            attention_mask=mask,
            position_ids=position + step,
            past_key_values=cache,
        ).last_hidden_state
    completion_ids = torch.stack(ids, dim=1)
    completion_mask = torch.stack(masks, dim=1)
    texts = [
        str(tokenizer.decode(row[keep], skip_special_tokens=True)).strip()
        for row, keep in zip(completion_ids.cpu(), completion_mask.cpu(), strict=True)
    ]
    return Rollout(completion_ids, completion_mask, torch.stack(logps, dim=1), ~finished, texts)


def _build_warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers


def _draw(
    logits: torch.Tensor,  # (R, V) fp32
    params: SamplingParams,
    warpers: LogitsProcessorList,
    row_keys: torch.Tensor,  # (R,)
    position: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (R,) and their log-probabilities (R,) under the sampled distribution."""
    if params.temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        no_ids: Any = None  # neither warper looks at the tokens before
        scaled: Any = logits / params.temperature
        logits = warpers(no_ids, scaled)
        token = (logits + gumbel_noise(row_keys, position, logits.shape[-1])).argmax(dim=-1)
    return token, logits.log_softmax(dim=-1).gather(-1, token[:, None])[:, 0]


def completion_keys(seed: int, prompt_keys: Sequence[int], num_generations: int) -> torch.Tensor:
    """One int64 key per completion, (B·G,), from the seed, the prompt's key and the completion's index."""
    prompts = torch.tensor(list(prompt_keys), dtype=torch.int64).repeat_interleave(num_generations)
    index = torch.arange(num_generations).repeat(len(prompt_keys))
    return _mix(_mix(_mix(torch.full_like(prompts, seed)) + prompts) + index)


def gumbel_noise(row_keys: torch.Tensor, position: int, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise (R, V) in fp64: a pure function of key, position and column."""
    columns = torch.arange(vocab_size, device=row_keys.device)
    bits = _mix(_mix(row_keys + position)[:, None] + columns[None])
    # 52 bits and a half are exact in fp64: 53 could round to 1, whose noise is infinite.
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser on int64 (products wrap). Source: Steele, Lea and Flood, OOPSLA 2014."""
    x = (x + 1) * _GOLDEN
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: int64 shifts in torch copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
