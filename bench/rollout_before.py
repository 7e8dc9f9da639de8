"""The rollout as it was at commit 2c9de69, for models and caches as they are now.

All completions decode until the last has ended, behind a cache of the prompt repeated for each that grows by
concatenation; noise is hashed in float64 for all columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastr1.models import VideoLanguageModel
from fastr1.rollout.noise import completion_keys

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


@torch.no_grad()
def sample_before(
    model: VideoLanguageModel, prompt_ids: Sequence[Tensor], tokens: Sequence[Tensor], length: int, group: int
) -> Tensor:
    """Completions (B·G, T) of T = `length` tokens: none of them ends."""
    embeds, prompt_mask = model.embed_prompts(prompt_ids, tokens)
    cache, hidden = model.prefill(embeds, prompt_mask, group)
    mask = prompt_mask.repeat_interleave(group, dim=0)
    position = mask.sum(dim=1, keepdim=True)
    row_keys = completion_keys(0, range(len(prompt_ids)), group).to(embeds.device)
    eos, pad = -1, 0
    finished = torch.zeros(mask.shape[0], dtype=torch.bool, device=embeds.device)
    ids, masks, logps = [], [], []
    for step in range(length):
        token, logp = _draw(model.project(hidden)[:, -1].float(), row_keys, step)
        ids.append(torch.where(finished, pad, token))
        masks.append(~finished)
        logps.append(torch.where(finished, 0.0, logp))
        finished = finished | (token == eos)
        if step + 1 == length or bool(finished.all()):
            break
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        hidden = model.decoder(
            inputs_embeds=model.decoder.embed_tokens(ids[-1])[:, None],
            attention_mask=mask,
            position_ids=position + step,
            past_key_values=cache,
        ).last_hidden_state
    return torch.stack(ids, dim=1)


def _draw(logits: Tensor, row_keys: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Token ids (R,) and their log-probabilities (R,)."""
    token = (logits + _gumbel_noise(row_keys, position, logits.shape[-1])).argmax(dim=-1)
    return token, logits.log_softmax(dim=-1).gather(-1, token[:, None])[:, 0]


def _gumbel_noise(row_keys: Tensor, position: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (R, V) in float64."""
    columns = torch.arange(vocab_size, device=row_keys.device)
    bits = _mix(_mix(row_keys + position)[:, None] + columns[None])
    # 52 bits and a half are exact in fp64: 53 could round to 1, whose noise is infinite.
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (products wrap). Source: Steele, Lea and Flood, OOPSLA 2014."""
    x = (x + 1) * _GOLDEN
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts in torch copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
