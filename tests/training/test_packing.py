"""Packing: what fits goes together, nothing is lost or doubled, everything has its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastr1.training.packing import PackingError, keep_step, pack_groups

CPU = torch.device("cpu")

groups_of_rows = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=0, max_size=5)), min_size=1, max_size=7
)


def split(groups: list[tuple[int, list[int]]]) -> tuple[list[int], dict[int, list[int]], list[int]]:
    """Prompt lengths, rows of every prompt, and lengths of all rows."""
    lengths: list[int] = []
    rows = {}
    for prompt, (_, group) in enumerate(groups):
        rows[prompt] = list(range(len(lengths), len(lengths) + len(group)))
        lengths += group
    return [length for length, _ in groups], rows, lengths


@settings(max_examples=200, deadline=None)
@given(groups_of_rows, st.integers(51, 200))
def test_every_row_is_packed_once_within_the_budget(groups: list[tuple[int, list[int]]], budget: int) -> None:
    prompt_lengths, rows, lengths = split(groups)
    batches = pack_groups(prompt_lengths, rows, lengths, budget)
    packed = [row for batch in batches for row in batch.rows]
    assert sorted(packed) == [row for group in rows.values() for row in group]
    owner = {row: prompt for prompt, group in rows.items() for row in group}
    for batch in batches:
        assert batch.rows
        assert all(owner[row] == p for p, group in zip(batch.prompts, batch.groups, strict=True) for row in group)
        assert len(set(batch.prompts)) == len(batch.prompts)
        assert batch.row_lengths == [lengths[row] for row in batch.rows]
        assert batch.prompt_lengths == tuple(prompt_lengths[p] for p in batch.prompts)
        size = sum(batch.prompt_lengths) + sum(batch.row_lengths) - len(batch.rows)
        assert batch.layout.num_tokens == size <= budget


@settings(max_examples=100, deadline=None)
@given(groups_of_rows, st.integers(51, 200))
def test_half_empty_micro_batches_do_not_pile_up(groups: list[tuple[int, list[int]]], budget: int) -> None:
    prompt_lengths, rows, lengths = split(groups)
    sizes = [batch.layout.num_tokens for batch in pack_groups(prompt_lengths, rows, lengths, budget)]
    assert sum(size <= budget / 2 for size in sizes) <= 1


def test_group_that_fits_is_not_divided_and_larger_ones_repeat_their_prompt() -> None:
    lengths = [5, 5, 5, 5, 5, 5]
    whole = pack_groups([10, 20], {0: [0, 1, 2], 1: [3, 4, 5]}, lengths, 32)
    assert [(b.prompts, b.groups) for b in whole] == [((0,), ((0, 1, 2),)), ((1,), ((3, 4, 5),))]
    divided = pack_groups([10, 20], {0: [0, 1, 2], 1: [3, 4, 5]}, lengths, 28)
    assert [(b.prompts, b.groups) for b in divided] == [((0,), ((0, 1, 2),)), ((1,), ((3, 4),)), ((1,), ((5,),))]


def test_prompt_that_does_not_fit_is_refused_with_the_number_to_set() -> None:
    with pytest.raises(PackingError, match=r"prompt of 30 tokens and a completion of 4 take 33 .* is 32; set it to 33"):
        pack_groups([30], {0: [0, 1]}, [2, 4], 32)
    pack_groups([30], {0: [0, 1]}, [2, 4], 33)


@given(groups_of_rows)
def test_places_pick_the_tokens_of_padded_rows(groups: list[tuple[int, list[int]]]) -> None:
    prompt_lengths, rows, lengths = split(groups)
    width = max(lengths, default=1)
    tokens = [[100 * row + t for t in range(length)] for row, length in enumerate(lengths)]
    matrix = torch.tensor([row + [-1] * (width - len(row)) for row in tokens] or [[]])
    for batch in pack_groups(prompt_lengths, rows, lengths, 100):
        wanted = [token for row in batch.rows for token in tokens[row]]
        inputs = [token for row in batch.rows for token in tokens[row][:-1]]
        assert matrix.flatten()[batch.places(width, CPU)].tolist() == wanted
        assert matrix.flatten()[batch.places(width, CPU, inputs=True)].tolist() == inputs
        assert batch.cu_seqlens(CPU).diff().tolist() == batch.row_lengths
        assert len(batch.layout.predicting_states(CPU)) == len(wanted)


class Ranks:
    """Another rank with so many micro-batches."""

    def __init__(self, other: int) -> None:
        self.other = other

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize(("mine", "other", "blank"), [(2, 1, 0), (2, 2, 0), (1, 3, 2), (0, 0, 1), (0, 2, 2)])
def test_ranks_take_as_many_micro_batches_as_the_one_with_most(mine: int, other: int, blank: int) -> None:
    batches = pack_groups([9, 3], {i: [i] for i in range(mine)}, [2, 2], 12)[:mine]
    if mine == 2:
        batches = [*pack_groups([9], {0: [0]}, [2], 12), *pack_groups([9, 3], {1: [1]}, [2, 2], 12)]
    together = keep_step(Ranks(other), batches, [9, 3], range(2))
    assert together[: len(batches)] == batches
    assert [batch.is_blank for batch in together] == [False] * len(batches) + [True] * blank
    for batch in together[len(batches) :]:
        assert (batch.prompts, batch.layout.num_tokens, batch.row_lengths) == ((1,), 3, [1])


def test_blank_micro_batch_is_of_the_prompts_named() -> None:
    (blank,) = keep_step(Ranks(0), [], [2, 9, 3], range(1, 3))
    assert (blank.prompts, blank.prompt_lengths) == ((2,), (3,))
