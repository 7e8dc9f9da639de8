"""Stand-ins for versions of flash-attn: the signatures of their releases, bodies in plain torch, in any precision."""

from __future__ import annotations

import importlib.machinery
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


def segments(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> list[tuple[slice, slice]]:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    q, k = (
        [slice(*pair) for pair in zip(x.tolist(), x.tolist()[1:], strict=False)] for x in (cu_seqlens_q, cu_seqlens_k)
    )
    return list(zip(q, k, strict=True))


def scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """(H, Tq, Tk); the mask of flash-attn ends in the corner at the bottom right."""
    s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * scale
    hidden = torch.ones(s.shape[1:], dtype=torch.bool).triu(s.shape[2] - s.shape[1] + 1)
    return s.masked_fill(hidden, -math.inf) if causal else s


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    out, lse = torch.full_like(q, math.nan), torch.full((q.shape[1], q.shape[0]), math.nan, dtype=q.dtype)
    for rows, columns in segments(cu_q, cu_k):
        assert rows.stop - rows.start <= max_q
        assert columns.stop - columns.start <= max_k
        s = scores(q[rows], k[columns], scale, causal)
        values = v[columns].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values)
        lse[:, rows] = s.logsumexp(-1)
    return out, lse


def varlen_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dq, dk, dv, scale, causal):
    """The gradients, in dq, dk, dv: of an output and lse that may be those of more keys than are here."""
    assert lse.is_contiguous()
    assert dout.is_contiguous()
    group = q.shape[1] // k.shape[1]
    for x in (dq, dk, dv):
        x.fill_(math.nan)
    for rows, columns in segments(cu_q, cu_k):
        assert rows.stop - rows.start <= max_q
        assert columns.stop - columns.start <= max_k
        if rows.start == rows.stop:  # what a kernel leaves there is its own affair
            continue
        p = (scores(q[rows], k[columns], scale, causal) - lse[:, rows, None]).exp()
        values = v[columns].repeat_interleave(group, dim=1)
        delta = (dout[rows] * out[rows]).sum(-1).t()[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", dout[rows], values) - delta) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[columns].repeat_interleave(group, dim=1))
        dk[columns] = torch.einsum("hqk,qhd->khd", ds, q[rows]).unflatten(1, (-1, group)).sum(2)
        dv[columns] = torch.einsum("hqk,qhd->khd", p, dout[rows]).unflatten(1, (-1, group)).sum(2)


def flash_attn_2() -> dict[str, object]:
    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes=None,
        return_softmax: bool = False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors: bool = False,
    ):
        assert dropout_p == 0
        assert window_size_left == window_size_right == -1
        assert isinstance(causal, bool)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = varlen_forward(q, k, v, *lengths, softmax_scale, causal)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes,
        deterministic: bool,
        rng_state=None,
        zero_tensors: bool = False,
    ):
        assert dropout_p == softcap == 0
        assert window_size_left == window_size_right == -1
        assert isinstance(causal, bool)
        assert isinstance(deterministic, bool)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        varlen_backward(dout, q, k, v, out, softmax_lse, *lengths, dq, dk, dv, softmax_scale, causal)
        return torch.empty(0)

    return {name: f for name, f in locals().items() if callable(f)}


def flash_attn_3() -> dict[str, object]:
    def _flash_attn_forward(
        q,
        k,
        v,
        k_new,
        v_new,
        qv,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_k_new,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        page_table,
        kv_batch_idx,
        leftpad_k,
        rotary_cos,
        rotary_sin,
        seqlens_rotary,
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=1,
        pack_gqa=None,
        sm_margin=0,
    ):
        absent = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
        absent += (rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale)
        assert all(x is None for x in absent)
        assert isinstance(causal, bool)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *varlen_forward(q, k, v, *lengths, softmax_scale, causal), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        max_seqlen_q,
        max_seqlen_k,
        dq,
        dk,
        dv,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        assert sequed_q is None
        assert sequed_k is None
        assert isinstance(causal, bool)
        assert isinstance(deterministic, bool)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        varlen_backward(dout, q, k, v, out, softmax_lse, *lengths, dq, dk, dv, softmax_scale, causal)
        return dq, dk, dv, torch.empty(0)

    return {name: f for name, f in locals().items() if callable(f)}


def flash_attn_4() -> dict[str, object]:
    """Of the many options only those that mean something here, in their order and with their defaults."""

    def _flash_attn_fwd(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        page_table=None,
        softmax_scale=None,
        causal: bool = False,
        softcap=None,
        window_size_left=None,
        window_size_right=None,
        *,
        return_lse: bool = False,
    ):
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = varlen_forward(q, k, v, *lengths, softmax_scale, causal)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left=None,
        window_size_right=None,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic: bool = False,
        dq=None,
        dk=None,
        dv=None,
    ):
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        varlen_backward(dout, q, k, v, out, lse, *lengths, dq, dk, dv, softmax_scale, causal)
        return dq, dk, dv

    return {name: f for name, f in locals().items() if callable(f)}


STAND_INS = {
    "flash_attn_2": ("flash_attn.flash_attn_interface", flash_attn_2),
    "flash_attn_3": ("flash_attn_interface", flash_attn_3),
    "flash_attn_4": ("flash_attn.cute.interface", flash_attn_4),
}


def install(patch: pytest.MonkeyPatch, backend: str) -> None:
    """Make `backend` importable in this process, for one test."""
    name, make = STAND_INS[backend]
    parents = name.split(".")[:-1]
    for module_name in [*(".".join(parents[: i + 1]) for i in range(len(parents))), name]:
        if module_name == name or module_name not in sys.modules:
            module = ModuleType(module_name)
            module.__spec__ = importlib.machinery.ModuleSpec(module_name, loader=None)
            module.__path__ = []  # type: ignore[attr-defined]
            patch.setitem(sys.modules, module_name, module)
    vars(sys.modules[name]).update(make())


def kernels(backend: str) -> dict[str, Callable[..., object]]:
    """Stand-ins for the CUDA kernels of torch, their arguments bound by torch's own schemas."""
    aten = torch.ops.aten
    if backend == "varlen":
        calls = aten._flash_attention_forward.default, aten._flash_attention_backward.default
        return {"_forward": _bound(calls[0], _flash_forward), "_backward": _bound(calls[1], _flash_backward)}
    calls = aten._efficient_attention_forward.default, aten._efficient_attention_backward.default
    return {"_forward": _bound(calls[0], _efficient_forward), "_backward": _bound(calls[1], _efficient_backward)}


def _bound(op: torch._ops.OpOverload, body: Callable[[dict[str, Any]], object]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        given = dict(zip((a.name for a in op._schema.arguments if not a.kwarg_only), args, strict=False))
        given.update(kwargs)
        for argument in op._schema.arguments:
            if argument.name not in given:
                assert argument.has_default_value(), argument.name
                given[argument.name] = argument.default_value
            value, wanted = given[argument.name], str(argument.type)
            assert wanted != "Tensor" or isinstance(value, torch.Tensor), argument.name
            assert wanted != "bool" or isinstance(value, bool), argument.name
        assert set(given) == {argument.name for argument in op._schema.arguments}
        assert given["dropout_p"] == 0
        return body(given)

    return call


def _lengths(a: dict[str, Any]) -> tuple[Any, ...]:
    return a["cum_seq_q"], a["cum_seq_k"], a["max_q"], a["max_k"]


def _flash_forward(a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    out, lse = varlen_forward(a["query"], a["key"], a["value"], *_lengths(a), a["scale"], a["is_causal"])
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def _flash_backward(a: dict[str, Any]) -> list[torch.Tensor]:
    grads = [torch.empty_like(a[name]) for name in ("query", "key", "value")]
    given = [a[name] for name in ("grad_out", "query", "key", "value", "out", "logsumexp")]
    varlen_backward(*given, *_lengths(a), *grads, a["scale"], a["is_causal"])
    return grads


def _efficient_forward(a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Dense batches (B, T, H, d); rows of log-sum-exps are infinite up to the next multiple of 32."""
    assert a["compute_log_sumexp"]
    rows = a["query"].shape[1]
    outs, lses = [], []
    for q, k, v in zip(a["query"], a["key"], a["value"], strict=True):
        out, lse = varlen_forward(q, k, v, *_whole(q, k), a["scale"], a["custom_mask_type"] == 1)
        outs.append(out)
        lses.append(torch.nn.functional.pad(lse, (0, -rows % 32), value=math.inf))
    return torch.stack(outs), torch.stack(lses), torch.empty(0), torch.empty(0), rows, a["key"].shape[1]


def _efficient_backward(a: dict[str, Any]) -> list[torch.Tensor]:
    assert (a["max_seqlen_q"], a["max_seqlen_k"]) == (a["query"].shape[1], a["key"].shape[1])
    assert a["query"].shape[2] == a["key"].shape[2]
    assert a["logsumexp"].shape[2] % 32 == 0
    assert a["logsumexp"].is_contiguous()
    assert (a["logsumexp"][..., a["query"].shape[1] :] == math.inf).all()
    grads = [torch.empty_like(a[name]) for name in ("query", "key", "value")]
    names = ("grad_out_", "query", "key", "value", "out")
    for i, lse in enumerate(a["logsumexp"]):
        given = [a[name][i] for name in names]
        lse = lse[:, : a["query"].shape[1]].contiguous()
        into = [grad[i] for grad in grads]
        lengths = _whole(given[1], given[2])
        varlen_backward(given[0].contiguous(), *given[1:], lse, *lengths, *into, a["scale"], a["custom_mask_type"] == 1)
    return [*grads, torch.empty(0)]


def _whole(q: torch.Tensor, k: torch.Tensor) -> tuple[Any, ...]:
    ends = (torch.tensor([0, len(x)], dtype=torch.int32) for x in (q, k))
    return *ends, len(q), len(k)
