"""Groups → micro-batches without padding: a prompt once, the tokens of its completions behind it.

A group takes one place per prompt token and one per completion token but the last, which nothing is predicted from. A
group that is larger than a micro-batch is divided between several, its prompt once in each. Packing is deterministic:
the largest group first, into the first micro-batch with room for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from fastr1.models.packed_layout import PackedLayout
from fastr1.schema import DataError


class PackingError(DataError):
    """A prompt does not fit into a micro-batch. The message names its length and the setting to change."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some of the completions of some of the prompts. N: all their tokens, in the order of `rows`."""

    prompts: tuple[int, ...]  # places of the prompts
    groups: tuple[tuple[int, ...], ...]  # per prompt, rows of its completions in the rollout
    lengths: tuple[tuple[int, ...], ...]  # per prompt, tokens of these completions, 1 or more each
    prompt_lengths: tuple[int, ...]
    is_blank: bool = False  # computed to keep step with other ranks; counts in nothing
    _places: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def layout(self) -> PackedLayout:
        """Where prompts and the completions' input tokens stand in the sequence."""
        return PackedLayout(self.prompt_lengths, [[length - 1 for length in group] for group in self.lengths])

    @cached_property
    def rows(self) -> list[int]:
        """Rows of the rollout, as packed."""
        return [row for group in self.groups for row in group]

    @cached_property
    def row_lengths(self) -> list[int]:
        return [length for group in self.lengths for length in group]

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """(rows + 1,) int64: bounds of each completion among the N tokens."""
        return torch.tensor([0, *self.row_lengths]).cumsum(0).to(device)

    def places(self, width: int, device: torch.device, *, inputs: bool = False) -> torch.Tensor:
        """(N,) places of the tokens in a flattened (B·G, width) matrix; `inputs` leaves out the last of each row."""
        key = (width, device, inputs)
        if key not in self._places:  # every pass asks, and copying them waits for a GPU
            lengths = torch.tensor(self.row_lengths) - int(inputs)
            number = sum(self.row_lengths) - len(self.rows) * int(inputs)
            # place of a row's first token in the matrix, less its place among the N
            offsets = torch.tensor(self.rows) * width - (lengths.cumsum(0) - lengths)
            spread = offsets.repeat_interleave(lengths, output_size=number)
            self._places[key] = (torch.arange(number) + spread).to(device)
        return self._places[key]


def pack_groups(
    prompt_lengths: Sequence[int],  # B
    groups: Mapping[int, Sequence[int]],  # prompt → rows of the rollout that are to be computed; none: it is left out
    row_lengths: Sequence[int],  # tokens of every row of the rollout
    max_tokens: int,
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens, in the order of their first prompt.

    Raises: PackingError for a prompt that does not fit with one of its completions.
    """
    pieces = [
        (prompt, piece, size)
        for prompt, rows in groups.items()
        for piece, size in _divide(prompt_lengths[prompt], rows, row_lengths, max_tokens)
    ]
    bins: list[list[tuple[int, list[int]]]] = []
    room: list[int] = []
    for prompt, piece, size in sorted(pieces, key=lambda piece: -piece[2]):  # stable: ties stay in order
        place = next((i for i, left in enumerate(room) if size <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append((prompt, piece))
        room[place] -= size
    return sorted(
        (_micro_batch(sorted(pieces), prompt_lengths, row_lengths) for pieces in bins),
        key=lambda batch: (batch.prompts, batch.groups),
    )


def _divide(
    prompt_length: int, rows: Sequence[int], row_lengths: Sequence[int], max_tokens: int
) -> list[tuple[list[int], int]]:
    """The rows of a group in pieces that fit, with the tokens that each takes."""
    pieces: list[tuple[list[int], int]] = []
    for row in rows:
        check_fits(prompt_length, row_lengths[row], max_tokens)
        size = row_lengths[row] - 1
        # the first piece with room: no two pieces fit together, which would have the prompt in one micro-batch twice
        place = next((i for i, (_, taken) in enumerate(pieces) if taken + size <= max_tokens), len(pieces))
        if place == len(pieces):
            pieces.append(([], prompt_length))
        piece, taken = pieces[place]
        pieces[place] = ([*piece, row], taken + size)
    return pieces


def check_fits(prompt_length: int, completion_length: int, max_tokens: int, origin: str = "") -> None:
    """Raises: PackingError where a prompt and one completion take more than a micro-batch holds; `origin` is where the
    prompt comes from."""
    needed = prompt_length + completion_length - 1
    if needed > max_tokens:
        raise PackingError(
            f"{origin}{': ' if origin else ''}a prompt of {prompt_length} tokens and a completion of "
            f"{completion_length} take {needed} tokens, optim.max_tokens_per_micro_batch is {max_tokens}; set it to "
            f"{needed} or more"
        )


def _micro_batch(
    pieces: list[tuple[int, list[int]]], prompt_lengths: Sequence[int], row_lengths: Sequence[int]
) -> MicroBatch:
    return MicroBatch(
        prompts=tuple(prompt for prompt, _ in pieces),
        groups=tuple(tuple(rows) for _, rows in pieces),
        lengths=tuple(tuple(row_lengths[row] for row in rows) for _, rows in pieces),
        prompt_lengths=tuple(prompt_lengths[prompt] for prompt, _ in pieces),
    )


class Ranks(Protocol):
    """The processes of a run, as far as keeping step goes."""

    def gather_objects(self, value: Any) -> list[Any]: ...


def keep_step(
    ranks: Ranks, micro_batches: list[MicroBatch], prompt_lengths: Sequence[int], prompts: Iterable[int]
) -> list[MicroBatch]:
    """As many micro-batches on every rank, one at least: what is missing are blank ones, of one token and the shortest
    of `prompts`, whose videos have a gradient. Backward passes communicate under ZeRO stages 2 and 3. All ranks call
    it."""
    missing = max(1, *ranks.gather_objects(len(micro_batches))) - len(micro_batches)
    shortest = min(prompts, key=prompt_lengths.__getitem__)
    blank = MicroBatch((shortest,), ((0,),), ((1,),), (prompt_lengths[shortest],), is_blank=True)
    return [*micro_batches, *[blank] * missing]
