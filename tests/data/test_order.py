"""The order of samples: a permutation per epoch, nothing dropped, exact resume, no dependence on ranks."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastr1.data.order import SampleOrder


@pytest.mark.parametrize(
    ("num_samples", "prompts_per_update", "num_epochs", "num_updates"),
    [
        (5496, 8, 1.0, 687),
        (5496, 8, 2.0, 1374),
        (10, 4, 1.0, 3),
        (10, 4, 3.0, 8),  # 30 prompts in 8 updates, not 3 · 3
        (110, 11, 1.1, 11),  # in floating point 1.1 · 110 is a little over 121
        (3, 8, 1.0, 1),
        (16, 4, 0.5, 2),
    ],
)
def test_number_of_updates(num_samples: int, prompts_per_update: int, num_epochs: float, num_updates: int) -> None:
    sampler = SampleOrder(num_samples, prompts_per_update=prompts_per_update, seed=0, num_epochs=num_epochs)
    assert len(sampler) == num_updates
    assert len(list(sampler)) == num_updates


def test_max_steps_overrides_epochs() -> None:
    sampler = SampleOrder(10, prompts_per_update=4, seed=0, num_epochs=1.0, max_steps=7)
    assert len(list(sampler)) == 7
    assert sampler.epoch(5) == 2.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40))
def test_stream_is_a_permutation_per_epoch(num_samples: int, prompts_per_update: int, seed: int) -> None:
    sampler = SampleOrder(num_samples, prompts_per_update=prompts_per_update, seed=seed, num_epochs=3)
    updates = list(sampler)
    assert {len(update) for update in updates} == {prompts_per_update}
    stream = [index for update in updates for index in update]
    for epoch in range(3):
        assert sorted(stream[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


def test_small_dataset_wraps_into_the_next_epoch() -> None:
    (update,) = SampleOrder(3, prompts_per_update=8, seed=1)
    assert sorted(update[:3]) == sorted(update[3:6]) == [0, 1, 2]
    assert len(update) == 8
    assert sorted(Counter(update).values()) == [2, 3, 3]


def test_epochs_and_seeds_shuffle_differently_and_repeatably() -> None:
    def stream(seed: int) -> list[list[int]]:
        return list(SampleOrder(50, prompts_per_update=50, seed=seed, num_epochs=2))

    first, second = stream(42)
    assert first != list(range(50))
    assert first != second
    assert stream(42) == [first, second]
    assert stream(43)[0] not in (first, second)


def test_order_never_changes() -> None:
    """The order is part of a run's identity: a change of Python or of this file must not alter it."""
    sampler = SampleOrder(8, prompts_per_update=8, seed=42, num_epochs=2)
    assert list(sampler) == [[4, 7, 6, 2, 0, 3, 5, 1], [0, 1, 5, 7, 6, 3, 4, 2]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 12))
def test_resume_continues_exactly(num_samples: int, prompts_per_update: int, stop_after: int) -> None:
    def fresh() -> SampleOrder:
        return SampleOrder(num_samples, prompts_per_update=prompts_per_update, seed=5, max_steps=12)

    whole = list(fresh())
    interrupted = fresh()
    head = list(islice(interrupted, stop_after))
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert head + list(resumed) == whole


def test_looking_ahead_does_not_move_on() -> None:
    sampler = SampleOrder(10, prompts_per_update=4, seed=0, max_steps=5)
    ahead = [sampler.indices(update) for update in (4, 1, 0, 2, 3)]
    assert sampler.next_update == 0
    whole = list(sampler)
    assert ahead == [whole[update] for update in (4, 1, 0, 2, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"prompts_per_update": 0}, "prompts_per_update is 0"),
        ({"num_epochs": 0.0}, "num_train_epochs is 0.0"),
        ({"num_epochs": float("nan")}, "num_train_epochs is nan"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, float], message: str) -> None:
    arguments = {"num_samples": 10, "prompts_per_update": 4, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        SampleOrder(**arguments)  # type: ignore[arg-type]
