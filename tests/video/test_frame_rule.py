"""The frames a video is represented by."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared_path

from fastr1.video import one_fps_indices, select_indices, uniform_indices


@pytest.mark.parametrize(
    ("num_available", "num_frames", "expected"),
    [
        (16, 16, list(range(16))),  # every frame once
        (17, 4, [0, 5, 10, 16]),  # 5.33 and 10.67 are cut off, not rounded
        (5, 8, [0, 0, 1, 1, 2, 2, 3, 4]),  # a short video repeats frames
        (1, 3, [0, 0, 0]),  # a picture
        (100, 1, [0]),  # one frame: the first
        (100, 2, [0, 99]),  # both ends belong to it
    ],
)
def test_uniform_indices_examples(num_available, num_frames, expected):
    assert uniform_indices(num_available, num_frames) == expected


@given(st.integers(1, 200_000), st.integers(1, 300))
def test_uniform_indices_match_numpy_and_are_plain_ints(num_available, num_frames):
    indices = uniform_indices(num_available, num_frames)
    assert indices == np.linspace(0, num_available - 1, num_frames, dtype=int).tolist()
    assert all(type(index) is int for index in indices)


def test_uniform_indices_are_not_those_of_exact_integer_arithmetic():
    # The lengths at which floating-point linspace falls just short of a whole number.
    different = [
        n for n in range(64, 1000) if uniform_indices(n, 64) != [i * (n - 1) // 63 for i in range(64)]
    ]  # fmt: skip
    assert different


@pytest.mark.parametrize(
    ("num_available", "fps", "max_frames", "expected"),
    [
        (90, 30.0, None, [0, 44, 89]),  # 3 s
        (119, 30.0, None, [0, 59, 118]),  # 3.97 s: whole seconds only
        (10, 30.0, None, [0]),  # less than a second still has a frame
        (90, 30.0, 2, [0, 89]),  # the cap spreads over the whole video
        (90, 30.0, 64, [0, 44, 89]),  # and does nothing when it is not reached
    ],
)
def test_one_fps_indices_examples(num_available, fps, max_frames, expected):
    assert one_fps_indices(num_available, fps, max_frames) == expected
    assert select_indices(num_available, fps, -1, max_frames) == expected


def test_max_frames_does_not_bound_a_fixed_number_of_frames():
    assert select_indices(100, 25.0, 16, max_frames=4) == uniform_indices(100, 16)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: uniform_indices(0, 4), "num_available must be at least 1, got 0"),
        (lambda: uniform_indices(4, 0), "num_frames must be at least 1, got 0"),
        (lambda: select_indices(4, 25.0, 0), "-1 for one frame per second, got 0"),
        (lambda: select_indices(4, 25.0, -2), "got -2"),
        (lambda: one_fps_indices(4, 0.0), "fps must be a positive number, got 0.0"),
        (lambda: one_fps_indices(4, float("nan")), "got nan"),
        (lambda: one_fps_indices(4, 25.0, 0), "max_frames must be at least 1 or None"),
    ],
)
def test_bad_counts_are_refused_by_value(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_indices_match_the_recorded_ones():
    rows = json.loads(shared_path("fixtures/tinyllava/frame_indices.json").read_text())
    assert len(rows) > 10
    for row in rows:
        chosen = select_indices(row["num_frames"], row["fps"], row["requested"], row["max_frames"])
        assert chosen == row["indices"], row
