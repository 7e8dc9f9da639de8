"""Where the prompts and completions of a packed micro-batch lie among its tokens.

One sequence of L tokens: all B prompts one after another, then the input tokens of all completions, those of prompt 0
first. Prompts are so the head and completions the tail of every tensor, reached by slices. The last token of a
completion is predicted and never an input; a completion of one token has none.

Attention over it has two parts: `causal`, every prompt and completion within itself, and `prefix`, the completions of
each prompt, as one block of queries, over the whole of that prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch


class Run(NamedTuple):
    """Neighbouring segments of equal lengths: views of shape (num_segments, length, ...) into the packed tokens."""

    num_segments: int
    query_start: int
    query_length: int
    key_start: int
    key_length: int

    @property
    def lengths(self) -> tuple[int, int]:
        return self.query_length, self.key_length

    @property
    def queries(self) -> slice:
        return slice(self.query_start, self.query_start + self.num_segments * self.query_length)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_start + self.num_segments * self.key_length)


@dataclass(frozen=True, eq=False)
class Part:
    """Segments of queries, each with its segment of keys.

    Attributes:
        query_lengths: of each segment, one after another; 0 where nothing asks.
        key_lengths: likewise; at least 1.
        is_causal: the segments are square and token i sees tokens 0..i; else every query sees every key.
        cache: what backends need on a device, by a key of theirs, made once for all layers.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    is_causal: bool
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def max_query_length(self) -> int:
        """A bound, 2 or more: told 1, ragged flash kernels rearrange the queries as those of a decoding step, one in
        every segment, and their log-sum-exps come back in another order."""
        return max(2, *self.query_lengths)

    @cached_property
    def max_key_length(self) -> int:
        return max(self.key_lengths)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The segments that have queries, neighbours of equal lengths together."""
        runs: list[Run] = []
        query_start = key_start = 0
        for query_length, key_length in zip(self.query_lengths, self.key_lengths, strict=True):
            last = runs[-1] if runs else None
            if last and last.keys.stop == key_start and last.lengths == (query_length, key_length):
                runs[-1] = last._replace(num_segments=last.num_segments + 1)
            elif query_length:
                runs.append(Run(1, query_start, query_length, key_start, key_length))
            query_start += query_length
            key_start += key_length
        return tuple(runs)

    def cu_seqlens(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the segments of queries and of keys begin, and the last ends: two (S + 1,) int32, built once."""
        cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = self.cache.get(device)
        if cu_seqlens is None:
            lengths = (self.query_lengths, self.key_lengths)
            queries, keys = (torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in lengths)
            cu_seqlens = self.cache[device] = (queries, keys)
        return cu_seqlens

    def segments(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """As ragged kernels take them: `cu_seqlens` of queries and keys, and the longest segment of both."""
        return *self.cu_seqlens(device), self.max_query_length, self.max_key_length


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Lengths of a packed micro-batch, and what follows from them.

    Attributes:
        prompt_lengths: tokens of each prompt, video tokens included; at least 1.
        completion_lengths: input tokens of each completion of each prompt, its last token not counted; may be 0.

    Raises: ValueError naming the length that cannot be.
    """

    prompt_lengths: Sequence[int]  # B
    completion_lengths: Sequence[Sequence[int]]  # B × G_i
    _positions: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _predicting_states: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_lengths", tuple(self.prompt_lengths))
        object.__setattr__(self, "completion_lengths", tuple(tuple(group) for group in self.completion_lengths))
        if len(self.prompt_lengths) != len(self.completion_lengths):
            raise ValueError(
                f"a packed micro-batch has {len(self.prompt_lengths)} prompts and completions of "
                f"{len(self.completion_lengths)}; give a list of completion lengths for each prompt"
            )
        if not self.prompt_lengths:
            raise ValueError("a packed micro-batch has no prompt; leave it out")
        for index, length in enumerate(self.prompt_lengths):
            if length < 1:
                raise ValueError(f"prompt {index} has {length} tokens; a prompt needs at least one")
        for index, group in enumerate(self.completion_lengths):
            if min(group, default=0) < 0:
                raise ValueError(
                    f"a completion of prompt {index} has {min(group)} input tokens; count its tokens less one, 0 for "
                    "a completion of one token, and leave out an empty one"
                )

    @cached_property
    def num_prompt_tokens(self) -> int:
        """Tokens of the head."""
        return sum(self.prompt_lengths)

    @cached_property
    def num_tokens(self) -> int:
        """L."""
        return self.num_prompt_tokens + sum(map(sum, self.completion_lengths))

    @cached_property
    def causal(self) -> Part:
        """Every prompt and every completion over itself; query and key lengths sum to L."""
        lengths = (*self.prompt_lengths, *filter(None, chain.from_iterable(self.completion_lengths)))
        return Part(lengths, lengths, is_causal=True)

    @cached_property
    def prefix(self) -> Part:
        """The tail over the head: completions of each prompt over that prompt."""
        return Part(tuple(map(sum, self.completion_lengths)), tuple(self.prompt_lengths), is_causal=False)

    @cached_property
    def unread_prompts(self) -> tuple[slice, ...]:
        """Where in the head the prompts lie that no token of a completion attends to."""
        ends = accumulate(self.prompt_lengths)
        spans = zip(ends, self.prompt_lengths, self.prefix.query_lengths, strict=True)
        return tuple(slice(end - length, end) for end, length, num_queries in spans if not num_queries)

    def positions(self, device: torch.device | str) -> torch.Tensor:
        """Positions as in the sequence of one prompt and one completion: (1, L) int64."""
        device = torch.device(device)
        if device not in self._positions:
            spans = [range(length) for length in self.prompt_lengths]
            for start, group in zip(self.prompt_lengths, self.completion_lengths, strict=True):
                spans += [range(start, start + length) for length in group]
            self._positions[device] = torch.tensor([list(chain.from_iterable(spans))], device=device)
        return self._positions[device]

    def predicting_states(self, device: torch.device | str) -> torch.Tensor:
        """Which of the L hidden states predict the tokens of each completion in turn: (N,) int64.

        The last of its prompt, then its inputs; N counts every token of every completion.
        """
        device = torch.device(device)
        if device not in self._predicting_states:
            states: list[int] = []
            next_input = self.num_prompt_tokens
            for end, group in zip(accumulate(self.prompt_lengths), self.completion_lengths, strict=True):
                for length in group:
                    states += [end - 1, *range(next_input, next_input + length)]
                    next_input += length
            self._predicting_states[device] = torch.tensor(states, dtype=torch.int64, device=device)
        return self._predicting_states[device]
