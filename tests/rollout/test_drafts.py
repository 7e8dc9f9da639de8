"""Guesses follow the longest end that was said before, to what followed most often; memory has its bound."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastr1.rollout import drafts
from fastr1.rollout.drafts import START, Drafter, History

END = 9


def said(earlier: list[list[int]], *tokens: int, most: int = 8, group: int = 1) -> list[int]:
    """What is guessed behind these tokens."""
    drafter = Drafter(earlier, group, 40, [END])
    drafter.extend(0, tokens)
    return drafter.draft(0, most)


def likeliest_by_hand(texts: list[list[int]], own: list[int], ends: set[int], most: int) -> list[int]:
    """Every end of what was said, longest first, searched in all texts place by place; `texts` begin with START and
    have `own` as their last."""
    places: list[tuple[list[int], int]] = []
    for length in range(len(own), 0, -1):
        end = own[-length:]
        places = [
            (text, place)
            for text in texts
            for place in range(length, len(text) + 1)
            if text[place - length : place] == end and not (text is own and place == len(own))
        ]
        if places:
            break
    guess: list[int] = []
    likelihood = 1.0
    while len(guess) < most:
        following = Counter(text[place] for text, place in places if place < len(text))
        if not following:
            break
        token, count = following.most_common(1)[0]
        likelihood *= count / (following.total() + 0.5)
        if likelihood < drafts.LEAST or token in ends:
            break
        guess.append(token)
        places = [(text, place + 1) for text, place in places if place < len(text) and text[place] == token]
    return guess


texts_of = st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=12), min_size=0, max_size=5)


@given(texts_of, st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=8), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_drafts_are_those_of_a_search_by_hand(earlier: list[list[int]], spurts: list[list[int]], most: int) -> None:
    """One completion that grows by some tokens at a time, over earlier ones and itself."""
    drafter = Drafter(earlier, 1, 32, {3})
    own = [START]
    texts = [*([START, *ids] for ids in earlier), own]
    assert drafter.draft(0, most) == likeliest_by_hand(texts, own, {3}, most)
    for spurt in spurts:
        drafter.extend(0, spurt)
        own += spurt
        assert drafter.draft(0, most) == likeliest_by_hand(texts, own, {3}, most)


def test_the_same_text_is_foretold() -> None:
    text = [4, 5, 6, 7, 8]
    assert said([text] * 8) == text
    assert said([text] * 8, 4, 5) == [6, 7, 8]
    assert said([text] * 8, 4, 5, most=2) == [6, 7]
    assert said([text] * 8, *text) == []
    assert said([text] * 8, most=0) == []
    assert said([], 4) == []


def test_a_longer_end_counts_for_more_than_a_frequent_token() -> None:
    often, once = [1, 2, 3] * 4, [5, 1, 2, 4, 4]
    assert said([often], 1, 2)[:1] == [3]
    assert said([often, once], 5, 1, 2)[:1] == [4]


def test_the_most_frequent_token_is_followed() -> None:
    assert said([[1, 2], [1, 3], [1, 3], [1, 3]], 1) == [3]
    assert said([[1, 2], [1, 3], [1, 4]], 1) == []  # too little to go by


def test_evidence_thins_out_along_a_guess() -> None:
    texts = [[1, *([2] * n), 3] for n in (8, 8, 8, 4, 2, 1)]
    guess = said(texts, 1)
    assert guess == [2] * len(guess)
    assert 1 <= len(guess) < 8


def test_an_end_is_not_guessed_and_nothing_behind_it() -> None:
    assert said([[1, 2, END]] * 8, 1) == [2]
    assert said([[1, END]] * 8, 1) == []


def test_the_group_is_learned_from_while_it_grows() -> None:
    drafter = Drafter([], 5, 9, [END])
    assert drafter.draft(0, 4) == []
    for other in range(1, 5):
        drafter.extend(other, [1, 2, 3, 4])
    assert drafter.draft(0, 3) == [1, 2, 3]
    drafter.extend(0, [1, 2])
    assert drafter.draft(0, 4) == [3, 4]
    for other in range(1, 5):
        drafter.extend(other, [6])
    assert drafter.draft(0, 4) == [3, 4, 6]


def test_a_text_ends_where_it_begins() -> None:
    """All of what completion 1 has said is found thrice; what lies before these texts counts for nothing."""
    drafter = Drafter([], 4, 9, [END])
    drafter.extend(1, [1, 2])
    assert drafter.draft(1, 1) == []  # ahead of the others
    for other, token in ((0, 4), (2, 4), (3, 3)):
        drafter.extend(other, [1, 2, token])
    assert drafter.draft(1, 1) == [4]


def test_what_a_completion_said_itself_is_learned_from() -> None:
    drafter = Drafter([], 1, 6, [END])
    drafter.extend(0, [1, 2, 3, 4, 1, 2])
    assert drafter.draft(0, 1) == [3]


# History


def test_history_keeps_the_last_completions_of_a_prompt() -> None:
    history = History(kept=3)
    assert list(history.recall("a")) == []
    history.remember("a", [[1], [2, 2]])
    history.remember("a", [[3], [4]])
    assert [list(ids) for ids in history.recall("a")] == [[2, 2], [3], [4]]
    assert list(history.recall("b")) == []
    assert history.num_tokens == 4


def test_prompts_least_recently_asked_for_are_forgotten() -> None:
    history = History(max_tokens=6, kept=4)
    for name in "abc":
        history.remember(name, [[1, 2]])
    history.recall("a")
    history.remember("d", [[3, 3]])
    assert [len(history.recall(name)) for name in "abcd"] == [1, 0, 1, 1]
    assert history.num_tokens == 6


@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.lists(st.just(1), max_size=5), max_size=4)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_history_has_a_bound(calls: list[tuple[int, list[list[int]]]]) -> None:
    history = History(max_tokens=12, kept=3)
    for name, completions in calls:
        history.remember(name, completions)
        held = [history.recall(n) for n in range(5)]
        assert history.num_tokens == sum(len(text) for texts in held for text in texts) <= 12
        assert all(len(texts) <= 3 for texts in held)


def test_a_remembered_text_takes_four_bytes_a_token() -> None:
    history = History()
    history.remember("a", [range(1000)])
    assert history.recall("a")[0].itemsize == 4


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_guesses_do_not_depend_on_who_asks_first(order: list[int]) -> None:
    drafter = Drafter([[1, 2, 3, 4]] * 6, 2, 2, [END])
    drafter.extend(0, [1, 2])
    drafter.extend(1, [7, 2])
    guesses = {completion: drafter.draft(completion, 4) for completion in order}
    assert guesses == {0: [3, 4], 1: [3, 4]}
