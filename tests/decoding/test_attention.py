"""`decode_attention` equals a softmax per row and head, whatever the groups and lengths; nothing else reaches it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TORCH, Backend
from decoding_cases import State, make_state
from hypothesis import given, settings
from hypothesis import strategies as st

from fastr1_kernels import decode_attention

CASES: dict[str, State] = {
    "full groups, equal lengths": make_state([3, 3], [5, 5], [4] * 6),
    "full groups, suffixes at T": make_state([2, 2], [5, 3], [4] * 4, suffix_width=4, prefix_width=5),
    "full groups, ragged lengths": make_state([2, 2], [7, 3], [4, 1, 2, 5]),
    "ragged groups": make_state([1, 4, 2], [5, 9, 2], [3] * 7),
    "ragged groups and lengths": make_state([1, 4, 2], [5, 9, 2], [3, 1, 2, 6, 1, 1, 5]),
    "empty groups": make_state([0, 2, 0, 1, 0], [5, 6, 7, 4, 3], [2, 3, 1]),
    "no group": make_state([0, 0], [5, 6], [], padding_rows=2),
    "rows of padding": make_state([2, 3], [5, 6], [2, 3, 1, 2, 2], padding_rows=3),
    "one row": make_state([1], [6], [1]),
    "no prefix": make_state([2, 2], [0, 0], [2, 3, 1, 2]),
    "one prompt without a prefix": make_state([2, 2], [0, 4], [2, 3, 1, 2]),
    "no suffix": make_state([2, 2], [3, 4], [0, 0, 0, 0]),
    "some without a suffix": make_state([2, 2], [3, 4], [0, 2, 1, 0]),
    "nothing to attend to": make_state([2, 2], [0, 4], [0, 2, 1, 0]),
    "nothing at all": make_state([2, 1], [0, 0], [0, 0, 0]),
    "one head of keys": make_state([2, 3], [5, 6], [2, 3, 1, 2, 2], heads=(7, 1)),
    "as many heads of keys": make_state([2, 3], [5, 6], [2, 3, 1, 2, 2], heads=(3, 3)),
    "eight heads to one": make_state([2, 1], [5, 6], [2, 3, 1], heads=(8, 1)),
    "seven heads to one": make_state([2, 1], [5, 6], [2, 3, 1], heads=(14, 2)),
    "d no power of two": make_state([2, 1], [5, 6], [2, 3, 1], d=24),
    "d larger": make_state([2, 1], [5, 6], [2, 3, 1], d=80),
    "three tiles": make_state([5, 1, 4], [5, 6, 7], [2, 3, 1, 2, 2, 1, 3, 2, 1, 1], heads=(7, 1)),
    "several rows of a suffix": make_state([4, 3], [5, 6], [2, 3, 4, 1, 5, 6, 7], suffix_rows=[2, 2, 2, 0, 1, 1, 1]),
    "suffixes in another order": make_state([2, 2], [5, 6], [4, 4, 4, 4], suffix_rows=[3, 1, 0, 2]),
    "more rows than suffixes, padding": make_state(
        [3, 0, 2], [7, 3, 9], [1, 2, 3, 2, 3], suffix_rows=[0, 0, 0, 1, 1, 0, 0], padding_rows=2, spare_rows=0
    ),
    "several rows of a suffix, two tiles": make_state(
        [10], [70], [*range(60, 70)], suffix_rows=[1] * 5 + [0] * 5, heads=(7, 1)
    ),
    "many places": make_state([2, 1], [67, 131], [70, 33, 64]),
}


@pytest.mark.parametrize("state", CASES.values(), ids=CASES.keys())
def test_attention_matches_reference(backend: Backend, state: State) -> None:
    got = state.attend(backend)
    assert got.dtype == backend.dtype
    torch.testing.assert_close(got.cpu().double(), state.expected(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("poison", [float("inf"), -float("inf"), 1e30])
def test_what_lies_beyond_the_lengths_reaches_nothing(backend: Backend, poison: float) -> None:
    clean, dirty = (make_state([2, 3], [3, 9], [2, 3, 1, 5, 2], padding_rows=1, poison=p) for p in (0.0, poison))
    assert torch.equal(clean.attend(backend), dirty.attend(backend))


def test_queries_may_be_a_slice_of_a_buffer(backend: Backend) -> None:
    state = make_state([2, 1], [5, 6], [2, 3, 1])
    q, *rest = map(backend.put, state.tensors)
    buffer = torch.cat([q, q + 1], 1)
    assert torch.equal(decode_attention(buffer[:, :4], *rest, **state.options), state.attend(backend))


def test_a_prompt_writes_its_own_rows_only(kernels: Backend) -> None:
    # The programs of another prompt may run later or earlier on a GPU: what is written twice would be a matter of luck.
    from fastr1_kernels.gpu.attention import prefix_kernel

    state = make_state([0, 2, 3], [5, 6, 7], [1] * 5)
    q, prefix_k, prefix_v, lengths, bounds = map(kernels.put, state.tensors[:5])
    sums, logs = (
        torch.full(shape, float("nan"), device=kernels.device) for shape in ((1, *q.shape), (1, *q.shape[:2]))
    )
    sizes = {"KV_HEADS": 2, "RATIO": 2, "D": 16, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16}
    lengths_of = {"stride_qr": q.stride(0), "R": len(q), "P": prefix_k.shape[2], "SPLITS": 1, "TILES": 1}
    tensors = (q, prefix_k, prefix_v, lengths, bounds, sums, logs)
    prefix_kernel[(2 * 2,)](*tensors, **lengths_of, log2_scale=1.0, **sizes)  # two prompts of three
    assert logs[:, :2].isfinite().all()
    assert sums[:, :2].isfinite().all()
    assert logs[:, 2:].isnan().all()
    assert sums[:, 2:].isnan().all()


def test_inputs_are_unchanged(backend: Backend) -> None:
    state = make_state([1, 3], [5, 6], [2, 3, 1, 2], padding_rows=1)
    tensors = tuple(map(backend.put, state.tensors))
    before = [x.clone() for x in tensors]
    decode_attention(*tensors, **state.options)
    for x, y in zip(tensors, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# The interpreter cannot multiply bfloat16.
@pytest.mark.parametrize("d", [64, 136])
def test_kernels_of_half_inputs_match_reference(kernels: Backend, d: int) -> None:
    state = make_state([5, 2], [131, 70], [2, 33, 1, 2, 2, 1, 70], heads=(14, 1), d=d)
    half = replace(kernels, dtype=torch.float16)
    got, expected = state.attend(half), state.expected()
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_in_torch_are_rounded_once(dtype: torch.dtype) -> None:
    state = make_state([1, 2], [5, 6], [2, 3, 1])
    got, exact = state.attend(replace(TORCH, dtype=dtype)), state.attend(replace(TORCH, dtype=torch.float32))
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_plain_torch_matches_reference(data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    places = data.draw(st.lists(st.integers(0, 9), min_size=len(groups), max_size=len(groups)))
    steps = data.draw(st.lists(st.integers(0, 5), min_size=sum(groups), max_size=sum(groups)))
    padding = data.draw(st.integers(0, 2))
    number = sum(groups) + padding
    rows = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=number, max_size=number)) or None
    state = make_state(
        groups,
        places,
        steps,
        heads=data.draw(st.sampled_from([(1, 1), (4, 2), (7, 1), (6, 3)])),
        d=8 * data.draw(st.integers(1, 3)),
        suffix_rows=rows,
        padding_rows=padding,
        seed=data.draw(st.integers(0, 99)),
    )
    torch.testing.assert_close(state.attend(TORCH), state.expected(), rtol=1e-12, atol=1e-12)
