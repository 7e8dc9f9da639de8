"""Segments of a part as dense batches, for kernels that know no ragged ones.

Neighbours of equal lengths are a batch as they lie in memory. Short causal segments of unequal lengths are padded at
their ends to a multiple of `STEP` tokens and batched with others of that length: one call per segment would cost more
than the padding. Nothing sees the padding, which comes after every real token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from fastr1.models.packed_layout import Part, Run

STEP = 16
MAX_PADDED = 128  # longer segments are worth calls of their own


class RunBatch:
    """A run of segments of equal lengths: views."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def queries(self, tokens: torch.Tensor) -> torch.Tensor:
        """(Tq, ...) → (segments, length, ...)."""
        return tokens[self.run.queries].unflatten(0, (self.run.num_segments, -1))

    def keys(self, tokens: torch.Tensor) -> torch.Tensor:
        """(Tk, ...) → (segments, length, ...)."""
        return tokens[self.run.keys].unflatten(0, (self.run.num_segments, -1))

    def put_queries(self, into: torch.Tensor, batch: torch.Tensor) -> None:
        """The inverse of `queries`."""
        self.queries(into).copy_(batch)

    def put_keys(self, into: torch.Tensor, batch: torch.Tensor) -> None:
        """The inverse of `keys`."""
        self.keys(into).copy_(batch)


@dataclass(frozen=True)
class PaddedBatch:
    """Causal segments of unequal lengths, zeros after each: copies."""

    shape: tuple[int, int]  # segments, padded length
    rows: torch.Tensor  # (T,) which tokens of the part
    places: torch.Tensor  # (T,) where in the flattened batch

    def queries(self, tokens: torch.Tensor) -> torch.Tensor:
        """(Tq, ...) → (segments, length, ...)."""
        batch = tokens.new_zeros(self.shape[0] * self.shape[1], *tokens.shape[1:])
        return batch.index_copy_(0, self.places, tokens.index_select(0, self.rows)).unflatten(0, self.shape)

    def put_queries(self, into: torch.Tensor, batch: torch.Tensor) -> None:
        """The inverse of `queries`."""
        into.index_copy_(0, self.rows, batch.flatten(0, 1).index_select(0, self.places))

    keys, put_keys = queries, put_queries


def batches(part: Part, device: torch.device) -> tuple[RunBatch | PaddedBatch, ...]:
    """The segments of a part that have queries, each in one batch; made once per device."""
    key = ("batches", device)
    if key not in part.cache:
        part.cache[key] = tuple(_batches(part, device))
    made: tuple[RunBatch | PaddedBatch, ...] = part.cache[key]
    return made


def _batches(part: Part, device: torch.device) -> list[RunBatch | PaddedBatch]:
    made: list[RunBatch | PaddedBatch] = []
    alike: dict[int, list[Run]] = defaultdict(list)
    for run in part.runs:
        if part.is_causal and run.query_length <= MAX_PADDED:
            alike[-(-run.query_length // STEP) * STEP].append(run)
        else:
            made.append(RunBatch(run))
    for length, runs in alike.items():
        made.append(RunBatch(runs[0]) if len(runs) == 1 else _padded(runs, length, device))
    return made


def _padded(runs: list[Run], length: int, device: torch.device) -> PaddedBatch:
    rows: list[int] = []
    places: list[int] = []
    num_segments = 0
    for run in runs:
        rows += range(run.queries.start, run.queries.stop)
        for _ in range(run.num_segments):
            places += range(num_segments * length, num_segments * length + run.query_length)
            num_segments += 1
    where = (torch.tensor(x, device=device) for x in (rows, places))
    return PaddedBatch((num_segments, length), *where)
