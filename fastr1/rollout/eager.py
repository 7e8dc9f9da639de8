"""Sample completions from the trainer's own model: prompts prefilled once, all completions decoded together, and those
that have ended left out as soon as they are half of what is decoded.

A draw is argmax(logits/temperature + Gumbel noise), and the noise is a hash of (seed, prompt key, completion index,
position, token). So a completion does not depend on the other prompts in the batch, their order, or the number of
ranks. The oracle of `engine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastr1.models import Processor, VideoLanguageModel
from fastr1.models.positions import padded_positions
from fastr1.rollout.noise import completion_keys
from fastr1.rollout.params import SamplingParams, check_logps, check_request, find_stop
from fastr1.schema import Rollout
from fastr1_kernels import SampledTokens, gumbel_noise
from fastr1_kernels.reference_sampling import kept_columns


@torch.no_grad()
def sample_eagerly(
    model: VideoLanguageModel,
    processor: Processor,
    prompt_ids: Sequence[torch.Tensor],  # B × (L_i,) int64 on the device of the model
    visual_tokens: Sequence[torch.Tensor],  # B × (Q, D), of `model.visual_tokens`
    params: SamplingParams,
    *,
    num_generations: int = 1,
    seed: int = 0,
    prompt_keys: Sequence[int] | None = None,  # B ids that make draws independent of batching; default 0…B−1
) -> Rollout:
    """G completions for each prompt, rows in prompt-major order.

    Returns `sampler_logps` under the distribution that was sampled from (after temperature, top-k, top-p and min-p; the
    plain softmax when greedy), and `full_logps` under the softmax of the whole vocabulary at the same temperature. A
    completion ends with any of the processor's end tokens, or with a stop string.
    """
    check_request(model, len(prompt_ids), num_generations, prompt_keys)
    embeds, prompt_mask = model.embed_prompts(prompt_ids, visual_tokens)
    prompt_length, length = prompt_mask.shape[1], params.max_completion_length
    positions = padded_positions(model.prompt_positions, prompt_ids, prompt_mask, length)
    cache, hidden = model.prefill(embeds, prompt_mask, num_generations, positions[..., :prompt_length])
    positions = positions[..., prompt_length:].repeat_interleave(num_generations, dim=-2)
    mask = prompt_mask.repeat_interleave(num_generations, dim=0)
    row_keys = completion_keys(seed, range(len(prompt_ids)) if prompt_keys is None else prompt_keys, num_generations)
    row_keys = row_keys.to(embeds.device)
    media = torch.tensor(model.media_token_ids, dtype=torch.int64, device=embeds.device)
    end_ids = torch.tensor(processor.end_token_ids, device=embeds.device)
    shape = (len(row_keys), length)
    completion_ids = torch.full(shape, processor.pad_token_id, device=embeds.device)
    completion_mask = torch.zeros(shape, dtype=torch.bool, device=embeds.device)
    logps, full_logps = torch.zeros(2, *shape, device=embeds.device)
    rows = torch.arange(len(row_keys), device=embeds.device)  # that are decoded; those that ended leave by halves
    has_ended = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(length):
        token, logp, full_logp = _draw(model.project(hidden)[:, -1].float(), media, params, row_keys, step)
        token = torch.where(has_ended, processor.pad_token_id, token)
        completion_ids[rows, step] = token
        completion_mask[rows, step] = ~has_ended
        logps[rows, step] = torch.where(has_ended, 0.0, logp)
        full_logps[rows, step] = torch.where(has_ended, 0.0, full_logp)
        has_ended = has_ended | torch.isin(token, end_ids)
        if params.stop_strings:
            has_ended |= _has_stop(processor, completion_ids[rows, : step + 1], ~has_ended, params.stop_strings)
        num_open = int((~has_ended).sum())
        if step + 1 == length or num_open == 0:
            break
        if num_open <= len(rows) // 2:
            kept = (~has_ended).nonzero().flatten()
            cache.batch_select_indices(kept)
            rows, row_keys, mask, token, has_ended = (x[kept] for x in (rows, row_keys, mask, token, has_ended))
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        hidden = model.extend(token[:, None], mask, cache, positions[..., rows, step : step + 1])
    drawn = completion_ids, completion_mask, logps, full_logps
    completion_ids, completion_mask, logps, full_logps = (x[:, : step + 1] for x in drawn)
    check_logps(logps)
    is_truncated = torch.zeros(shape[0], dtype=torch.bool, device=embeds.device)
    is_truncated[rows] = ~has_ended
    texts = [processor.decode(row[keep]) for row, keep in zip(completion_ids.cpu(), completion_mask.cpu(), strict=True)]
    return Rollout(completion_ids, completion_mask, logps, full_logps, is_truncated, texts)


def _has_stop(
    processor: Processor,
    completion_ids: torch.Tensor,  # (R, n)
    is_open: torch.Tensor,  # (R,) bool, none but these is looked at
    stop_strings: Sequence[str],
) -> torch.Tensor:
    """(R,) bool, whether the last token completes one of `stop_strings`."""
    found = torch.zeros_like(is_open)
    for row in is_open.nonzero().flatten().tolist():
        ids = completion_ids[row].cpu()
        found[row] = find_stop(processor.raw_text, ids, len(ids) - 1, stop_strings) is not None
    return found


def _draw(
    logits: torch.Tensor,  # (R, V) fp32
    media: torch.Tensor,  # (m,) ids that are never drawn
    params: SamplingParams,
    row_keys: torch.Tensor,  # (R,)
    position: int,
) -> SampledTokens:
    """Token ids, and their log-probabilities under the sampled distribution and under that of the whole vocabulary."""
    full, logits = logits / (params.temperature or 1), logits.index_fill(-1, media, -math.inf)
    if params.temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        kept = kept_columns(logits, params.temperature, params.top_k, params.top_p, params.min_p)
        logits = torch.where(kept, logits / params.temperature, -math.inf)
        token = (logits + gumbel_noise(row_keys, torch.full_like(row_keys, position), logits.shape[-1])).argmax(dim=-1)
    logp, full_logp = (x.log_softmax(dim=-1).gather(-1, token[:, None])[:, 0] for x in (logits, full))
    return SampledTokens(token, logp, full_logp)
