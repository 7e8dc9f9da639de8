"""Where the tokens of a packed micro-batch lie."""

from __future__ import annotations

import pytest
import torch

from fastr1.models.packed_layout import PackedLayout, Run

LAYOUT = PackedLayout([3, 2], [[2, 0], [1]])


def test_positions_count_on_from_the_end_of_the_prompt() -> None:
    assert LAYOUT.positions("cpu").tolist() == [[0, 1, 2, 0, 1, 3, 4, 2]]
    assert LAYOUT.positions("cpu").dtype == torch.int64


def test_predicting_states_are_those_of_every_token_of_every_completion() -> None:
    # Completions of 3, 1 and 2 tokens: behind the last prompt token, index 2 or 4, come their inputs.
    assert LAYOUT.predicting_states("cpu").tolist() == [2, 5, 6, 2, 4, 7]


def test_a_micro_batch_of_one_token_completions_has_no_tail() -> None:
    layout = PackedLayout([2, 1], [[0, 0], [0]])
    assert (layout.num_tokens, layout.num_prompt_tokens) == (3, 3)
    assert layout.predicting_states("cpu").tolist() == [1, 1, 2]
    assert layout.prefix.runs == ()
    assert layout.unread_prompts == (slice(0, 2), slice(2, 3))


def test_parts_hold_every_segment_once() -> None:
    assert (LAYOUT.num_prompt_tokens, LAYOUT.num_tokens) == (5, 8)
    assert [x.tolist() for x in LAYOUT.causal.cu_seqlens(torch.device("cpu"))] == [[0, 3, 5, 7, 8]] * 2
    assert [x.tolist() for x in LAYOUT.prefix.cu_seqlens(torch.device("cpu"))] == [[0, 2, 3], [0, 3, 5]]
    assert (LAYOUT.prefix.max_query_length, LAYOUT.prefix.max_key_length) == (2, 3)
    assert LAYOUT.unread_prompts == ()


def test_runs_join_neighbours_of_equal_lengths_only() -> None:
    layout = PackedLayout([4, 4, 4, 4, 6], [[1, 1], [2], [0], [2], [2]])
    assert layout.causal.runs == (
        Run(4, 0, 4, 0, 4),
        Run(1, 16, 6, 16, 6),
        Run(2, 22, 1, 22, 1),
        Run(3, 24, 2, 24, 2),
    )
    # Queries of prompts 1 and 3 lie side by side, their keys do not.
    assert layout.prefix.runs == (Run(2, 0, 2, 0, 4), Run(1, 4, 2, 12, 4), Run(1, 6, 2, 16, 6))


def test_tensors_are_made_once() -> None:
    assert LAYOUT.predicting_states("cpu") is LAYOUT.predicting_states(torch.device("cpu"))
    assert LAYOUT.positions("cpu") is LAYOUT.positions("cpu")
    assert LAYOUT.causal.cu_seqlens(torch.device("cpu"))[0] is LAYOUT.causal.cu_seqlens(torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "has no prompt"),
        ([3], [[1], [2]], "1 prompts and completions of 2"),
        ([3, 0], [[1], [1]], "prompt 1 has 0 tokens"),
        ([3, 2], [[1], [1, -1]], "a completion of prompt 1 has -1 input tokens"),
    ],
)
def test_impossible_lengths_are_refused(prompts: list[int], completions: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout(prompts, completions)


def test_single_queries_are_not_announced_as_a_decoding_step() -> None:
    layout = PackedLayout([3, 4, 2], [[1, 0], [0], [0, 1]])
    assert layout.prefix.query_lengths == (1, 0, 1)
    assert layout.prefix.max_query_length == 2
