"""Keys and values of a rollout: those of a prompt once, those of each completion in a place of its own.

    prefix   (layers, B, Hkv, P, d)   written by the prefill, read by all completions of the prompt
    suffix   (layers, S, Hkv, T, d)   written in place, a token at a time; row r belongs to the r-th row that decodes

Nothing is concatenated or repeated. When completions have ended, the rows of the others move to the front
(`KeyValueArenas.keep` after `DecodingRows.keep`), so that the rows that decode are always the first ones. Bytes, with e
per number: 2 · layers · Hkv · d · e · (B·P + S·T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from fastr1.models.family import DecoderLayout


@dataclass(frozen=True)
class Room:
    """For B prompts of up to P tokens and S completions of up to T."""

    num_prompts: int
    prompt_length: int
    num_completions: int
    completion_length: int

    def __or__(self, other: Room) -> Room:
        """Enough for both."""
        return Room(*map(max, astuple(self), astuple(other)))

    def __str__(self) -> str:
        completions = f"{self.num_completions} completions of up to {self.completion_length}"
        return f"{self.num_prompts} prompts of up to {self.prompt_length} tokens with {completions}"


class KeyValueArenas:
    """Keys and values of so many prompts and completions.

    Attributes: prefix_k, prefix_v, suffix_k, suffix_v, one tensor a layer.
    """

    def __init__(self, layout: DecoderLayout, room: Room, dtype: torch.dtype, device: torch.device) -> None:
        self.room, self.kind = room, (dtype, device)
        shape = (layout.num_layers, room.num_prompts, layout.num_kv_heads, room.prompt_length, layout.head_dim)
        self.prefix_k, self.prefix_v = (torch.zeros(shape, dtype=dtype, device=device).unbind() for _ in range(2))
        shape = (layout.num_layers, room.num_completions, layout.num_kv_heads, room.completion_length, layout.head_dim)
        self.suffix_k, self.suffix_v = (torch.zeros(shape, dtype=dtype, device=device).unbind() for _ in range(2))

    def holds(self, room: Room, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether there is room for so much of this kind."""
        return self.kind == (dtype, device) and self.room | room == self.room

    def keep(self, rows: torch.Tensor, length: int) -> None:
        """Move rows of the suffix (rising numbers) to the front, as far as `length` tokens."""
        for arena in (*self.suffix_k, *self.suffix_v):
            arena[: len(rows), :, :length] = arena[rows, :, :length]


class PrefixWriter:
    """Stands for the cache of a forward pass over packed prompts: writes keys and values into the arena and returns
    them as they came."""

    is_compileable = False

    def __init__(self, arenas: KeyValueArenas, prompt_lengths: Sequence[int], first: int = 0) -> None:
        self._arenas = arenas
        self._lengths = list(prompt_lengths)
        self._first = first  # place in the arena of the first of these prompts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of what came before: nothing."""
        return 0

    def update(
        self,
        key: torch.Tensor,  # (1, Hkv, L, d)
        value: torch.Tensor,  # (1, Hkv, L, d)
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the L tokens of all prompts of this pass; both come back as they are."""
        for new, arena in ((key, self._arenas.prefix_k), (value, self._arenas.prefix_v)):
            for prompt, part in enumerate(new[0].split(self._lengths, dim=1), self._first):
                arena[layer_idx][prompt, :, : part.shape[1]] = part
        return key, value
