"""States of a decoder for the tests, and their attention in the obvious loop over rows and heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from conftest import Backend
from torch import Tensor

from fastr1_kernels import decode_attention

NAMES = ("q", "prefix_k", "prefix_v", "prefix_lengths", "cu_rows", "suffix_k", "suffix_v", "suffix_lengths")


@dataclass(frozen=True)
class State:
    """What `decode_attention` is given, with the groups and lengths it was made of. Cache tails hold `poison`."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any]

    def attend(self, backend: Backend) -> Tensor:
        options = {name: backend.put(x) for name, x in self.options.items()}
        return decode_attention(*map(backend.put, self.tensors), **options)

    def expected(self) -> Tensor:
        tensors = (x.double() if x.is_floating_point() else x for x in self.tensors)
        return attend_by_hand(*tensors, self.options["suffix_rows"], self.options["scale"])

    def with_tensors(self, **changes: Tensor) -> State:
        return replace(self, tensors=tuple(changes.get(n, x) for n, x in zip(NAMES, self.tensors, strict=True)))


def make_state(
    groups: list[int],
    prefix_lengths: list[int],
    suffix_lengths: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    d: int = 16,
    suffix_rows: list[int] | None = None,  # of the rows, those of padding too
    padding_rows: int = 0,
    spare_rows: int = 1,
    prefix_width: int | None = None,
    suffix_width: int | None = None,
    poison: float = float("nan"),
    seed: int = 0,
) -> State:
    generator = torch.Generator().manual_seed(seed)
    H, Hkv = heads
    R, B = sum(groups) + padding_rows, len(groups)
    P = max(prefix_lengths) + 1 if prefix_width is None else prefix_width
    T = max([*suffix_lengths, 0]) + 1 if suffix_width is None else suffix_width
    suffix_lengths = suffix_lengths + [T] * padding_rows

    def draw(*shape: int) -> Tensor:
        # Values that bfloat16 has, so that rounding the inputs changes nothing.
        return torch.randn(*shape, generator=generator).bfloat16().double()

    def cache(n: int, width: int, lengths: list[int]) -> Tensor:
        x = draw(n, Hkv, width, d)
        for i in range(n):
            x[i, :, lengths[i] if i < len(lengths) else 0 :] = poison
        return x

    # A row of the cache is as long as the longest that is read of it.
    held = [0] * (R if suffix_rows is None else max(suffix_rows) + 1)
    for r, length in zip(suffix_rows or range(R), suffix_lengths[: sum(groups)], strict=False):
        held[r] = max(held[r], length)
    q, bounds = draw(R, H, d), torch.tensor([0, *groups]).cumsum(0).int()
    q[sum(groups) :] = poison
    prefix, suffix = (
        [cache(*args) for _ in range(2)]
        for args in (
            (B, P, prefix_lengths),
            (len(held) + spare_rows, T, held),
        )
    )
    lengths = [torch.tensor(x, dtype=torch.int32) for x in (prefix_lengths, suffix_lengths)]
    return State(
        (q, *prefix, lengths[0], bounds, *suffix, lengths[1]),
        {
            "scale": d**-0.5,
            "max_group": max([*groups, 0]),
            "max_suffix_length": T,
            "suffix_rows": None if suffix_rows is None else torch.tensor(suffix_rows, dtype=torch.int32),
        },
    )


def attend_by_hand(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    cu_rows: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    suffix_rows: Tensor | None,
    scale: float,
) -> Tensor:
    """One softmax per row and head over the keys that it may see."""
    out = torch.zeros_like(q)
    ratio = q.shape[1] // prefix_k.shape[1]
    for b in range(len(prefix_lengths)):
        for r in range(cu_rows[b], cu_rows[b + 1]):
            for h in range(q.shape[1]):
                n, t, i = int(prefix_lengths[b]), int(suffix_lengths[r]), h // ratio
                s = r if suffix_rows is None else int(suffix_rows[r])
                keys = torch.cat([prefix_k[b, i, :n], suffix_k[s, i, :t]])
                values = torch.cat([prefix_v[b, i, :n], suffix_v[s, i, :t]])
                if len(keys):
                    out[r, h] = torch.softmax(scale * (keys @ q[r, h]), 0) @ values
    return out
