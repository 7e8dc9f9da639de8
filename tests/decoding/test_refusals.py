"""What does not fit is refused with the value received."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from decoding_cases import NAMES, make_state

from fastr1_kernels import add_rms_norm, decode_attention, rope_and_store, swiglu

F32 = torch.float32


def attention_arguments() -> dict[str, Any]:
    state = make_state([2, 1], [3, 4], [2, 3, 1])
    tensors = (x.to(F32) if x.is_floating_point() else x for x in state.tensors)
    return dict(zip(NAMES, tensors, strict=True)) | state.options


def rotation_arguments() -> dict[str, Any]:
    return {
        "q": torch.zeros(3, 4, 8),
        **{name: torch.zeros(3, 2, 8) for name in ("k", "v")},
        **{name: torch.zeros(9, 8) for name in ("cos", "sin")},
        "positions": torch.zeros(3, dtype=torch.long),
        **{name: torch.zeros(3, 2, 5, 8) for name in ("k_cache", "v_cache")},
        "lengths": torch.zeros(3, dtype=torch.int32),
    }


ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(3, 4)}, "q (3, 4)"),
    ({"q": torch.zeros(3, 3, 16)}, "H=3, d=16, Hkv=2"),
    ({"q": torch.zeros(3, 16, 4).transpose(1, 2)}, "q has strides (64, 1, 4): give (any, 16, 1)"),
    ({"q": torch.zeros(3, 4, 16, dtype=torch.float64)}, "prefix_k has shape (2, 2, 5, 16), torch.float32"),
    ({"q": torch.zeros(3, 4, 16, requires_grad=True)}, "under torch.no_grad()"),
    ({"prefix_k": torch.zeros(2, 2, 5, 8)}, "prefix_k has shape (2, 2, 5, 8)"),
    ({"prefix_v": torch.zeros(2, 2, 4, 16)}, "prefix_v has shape (2, 2, 4, 16)"),
    ({"prefix_v": torch.zeros(2, 5, 2, 16).transpose(1, 2)}, "prefix_v has strides (160, 16, 32, 1)"),
    ({"prefix_lengths": torch.zeros(2)}, "prefix_lengths has shape (2,), torch.float32"),
    ({"cu_rows": torch.zeros(2, dtype=torch.int32)}, "cu_rows has shape (2,)"),
    ({"suffix_k": torch.zeros(2, 2, 4, 16)}, "S=2"),
    ({"suffix_v": torch.zeros(4, 2, 3, 16)}, "suffix_v has shape (4, 2, 3, 16)"),
    ({"suffix_lengths": torch.zeros(3, dtype=torch.long)}, "suffix_lengths has shape (3,), torch.int64"),
    ({"suffix_lengths": torch.zeros(3, dtype=torch.int32, device="meta")}, "on meta"),
    ({"suffix_rows": torch.zeros(3, dtype=torch.long)}, "suffix_rows has shape (3,), torch.int64"),
    ({"suffix_rows": torch.zeros(2, dtype=torch.int32)}, "suffix_rows has shape (2,)"),
    ({"max_suffix_length": 5}, "max_suffix_length=5"),
    ({"max_suffix_length": -1}, "max_suffix_length=-1"),
    ({"max_group": 4}, "max_group=4"),
    ({"max_group": 1}, "a group of 2 rows with max_group=1"),
    ({"max_suffix_length": 2}, "a suffix of 3 with max_suffix_length=2"),
]
ROTATION: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(3, 4, 8, 1)}, "q (3, 4, 8, 1)"),
    ({"q": torch.zeros(3, 4, 7)}, "d=7"),
    ({"q": torch.zeros(3, 8, 4).transpose(1, 2)}, "q has strides (32, 1, 4)"),
    ({"k": torch.zeros(3, 2, 8, requires_grad=True)}, "under torch.no_grad()"),
    ({"k": torch.zeros(3, 1, 8)}, "v has shape (3, 2, 8)"),
    ({"v": torch.zeros(3, 2, 16)[..., ::2]}, "v has strides (32, 16, 2)"),
    ({"cos": torch.zeros(9, 4)}, "cos has shape (9, 4)"),
    ({"sin": torch.zeros(8, 8)}, "sin has shape (8, 8)"),
    ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions has shape (3,), torch.int32"),
    ({"k_cache": torch.zeros(2, 2, 5, 8)}, "S=2"),
    ({"v_cache": torch.zeros(3, 2, 4, 8)}, "v_cache has shape (3, 2, 4, 8)"),
    ({"v_cache": torch.zeros(3, 5, 2, 8).transpose(1, 2)}, "v_cache has strides (80, 8, 16, 1)"),
    ({"lengths": torch.zeros(2, dtype=torch.int32)}, "lengths has shape (2,)"),
    ({"suffix_rows": torch.zeros(3)}, "suffix_rows has shape (3,), torch.float32"),
    ({"suffix_rows": torch.zeros(4, dtype=torch.int32)}, "suffix_rows has shape (4,)"),
    ({"q_norm": torch.ones(8)}, "give both or none"),
    ({"q_norm": torch.ones(8), "k_norm": torch.ones(4)}, "k_norm has shape (4,)"),
]


@pytest.mark.parametrize(("change", "message"), ATTENTION, ids=[m for _, m in ATTENTION])
def test_attention_refuses(change: dict[str, Any], message: str) -> None:
    decode_attention(**attention_arguments())
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**attention_arguments() | change)


@pytest.mark.parametrize(("change", "message"), ROTATION, ids=[m for _, m in ROTATION])
def test_rotation_refuses(change: dict[str, Any], message: str) -> None:
    rope_and_store(**rotation_arguments())
    with pytest.raises(ValueError, match=re.escape(message)):
        rope_and_store(**rotation_arguments() | change)


def test_norm_and_swiglu_refuse() -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(4)
    for arguments, message in [
        ((weight, None, weight), "x has shape (4,)"),
        ((torch.zeros(2, 8)[:, ::2], None, weight), "strides (8, 2)"),
        ((x, torch.zeros(2, 3), weight), "residual has shape (2, 3)"),
        ((x, torch.zeros(4, 2).T, weight), "residual has strides (1, 2)"),
        ((x, None, weight.double()), "weight has shape (4,), torch.float64"),
        ((x, None, weight.clone().requires_grad_()), "under torch.no_grad()"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            add_rms_norm(*arguments, 1e-6)
    for gate, up, message in [
        (weight, weight, "gate has shape (4,)"),
        (x, torch.zeros(4, 2).T, "up has strides (1, 2)"),
        (x, torch.zeros(2, 3), "up has shape (2, 3)"),
        (x.clone().requires_grad_(), x, "under torch.no_grad()"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            swiglu(gate, up)


def test_weights_that_require_grad_are_taken_without_grad() -> None:
    with torch.no_grad():
        add_rms_norm(torch.zeros(2, 4), None, torch.nn.Parameter(torch.ones(4)), 1e-6)
