"""Log-probabilities and entropy, from logits and from a linear head in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastr1_kernels import linear_logps, reference, selective_log_softmax

INF = float("inf")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand_ids(*shape: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(9))


def scores_by_hand(row: list[float], token: int, temperature: float) -> tuple[float, float]:
    """Definition with Python floats."""
    weights = [math.exp(z / temperature - max(row) / temperature) for z in row]
    probs = [w / math.fsum(weights) for w in weights]
    return math.log(probs[token]), -math.fsum(p * math.log(p) for p in probs if p > 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])  # one row, packed, padded, empty
def test_selective_log_softmax_matches_the_definition(shape: tuple[int, ...], temperature: float) -> None:
    logits, ids = rand(*shape, 7), rand_ids(*shape, vocabulary=7)
    logps, entropy = selective_log_softmax(logits, ids, temperature=temperature, return_entropy=True)
    assert logps.shape == entropy.shape == shape
    got = zip(logps.flatten().tolist(), entropy.flatten().tolist(), strict=True)
    rows = zip(logits.reshape(-1, 7).tolist(), ids.flatten().tolist(), strict=True)
    for values, (row, token) in zip(got, rows, strict=True):
        assert values == pytest.approx(scores_by_hand(row, token, temperature), rel=1e-12)


def test_selective_log_softmax_gradients() -> None:
    logits, ids = rand(2, 3, 5).requires_grad_(), rand_ids(2, 3, vocabulary=5)
    function: Callable[..., Any] = lambda z: selective_log_softmax(z, ids, temperature=0.8, return_entropy=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits)


def test_truncated_vocabulary_has_finite_entropy_and_gradients() -> None:
    kept = rand(4, 5).requires_grad_()
    cut = torch.full((4, 3), -INF, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 3])

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(torch.cat([z, cut], 1), ids, return_entropy=True)

    assert torch.autograd.gradcheck(function, kept)
    alone = selective_log_softmax(kept, ids, return_entropy=True)
    for a, b in zip(function(kept), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_entropy_gradient_is_minus_p_times_logp_plus_h() -> None:
    logits = rand(3, 6).requires_grad_()
    _, entropy = selective_log_softmax(logits, torch.zeros(3, dtype=torch.long), return_entropy=True)
    entropy.sum().backward()
    log_probs = logits.detach().log_softmax(-1)
    expected = -log_probs.exp() * (log_probs + entropy.detach()[:, None])
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shift", [-1e4, -101.0, 300.0])
def test_logps_are_shift_invariant(shift: float) -> None:
    logits, ids = rand(4, 9, dtype=torch.float32).round(decimals=2), rand_ids(4, vocabulary=9)
    expected = selective_log_softmax(logits.double(), ids, return_entropy=True)
    got = selective_log_softmax(logits + shift, ids, return_entropy=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4e-7 * abs(shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits, ids = (rand(6, 50) * 5).to(dtype), rand_ids(6, vocabulary=50)
    got = selective_log_softmax(logits, ids, return_entropy=True)
    expected = selective_log_softmax(logits.double(), ids, return_entropy=True)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_logps_of_a_sliced_view_equal_those_of_its_copy_and_leave_it_unchanged() -> None:
    whole = rand(2, 5, 14)
    view, ids = whole[:, 1:, ::2], rand_ids(2, 4, vocabulary=7)
    before = whole.clone()
    assert torch.equal(selective_log_softmax(view, ids), selective_log_softmax(view.contiguous(), ids))
    hidden = whole[:, :-1, 1::2]
    weight = rand(11, 14, seed=2)[:, ::2]
    got = linear_logps(hidden, weight, ids, chunk_size=3)
    copied = linear_logps(hidden.contiguous(), weight.contiguous(), ids, chunk_size=3)
    torch.testing.assert_close(got, copied, rtol=1e-13, atol=0)  # the product may sum in another order
    assert torch.equal(whole, before)


HEADS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"logit_scale": 0.5},
    {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3},
]


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 4, 7, 100])  # 7 rows: no divisor, exact, oversized
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_logps_equals_the_reference_for_any_chunk(
    chunk_size: int | None, head: dict[str, Any], with_bias: bool
) -> None:
    ids = rand_ids(7, vocabulary=11)
    inputs = [rand(7, 5), rand(11, 5, seed=1), rand(11, seed=2)][: 2 + with_bias]
    upstream = rand(2, 7, seed=3)
    results = []
    for chunked in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        bias = leaves[2] if with_bias else None
        if chunked:
            extra = {"return_entropy": True, "chunk_size": chunk_size}
            outputs = linear_logps(leaves[0], leaves[1], ids, bias=bias, **head, **extra)
        else:
            outputs = reference.linear_logps(leaves[0], leaves[1], ids, bias=bias, **head)
        grads = torch.autograd.grad(outputs, leaves, list(upstream))
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_linear_logps_gradients() -> None:
    ids = rand_ids(2, 3, vocabulary=6)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        head = {"softcap": 2.0, "logit_scale": 1.5, "temperature": 0.9}
        return linear_logps(hidden, weight, ids, bias=bias, return_entropy=True, chunk_size=4, **head)  # type: ignore

    inputs = (rand(2, 3, 4).requires_grad_(), rand(6, 4, seed=1).requires_grad_(), rand(6, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


def test_linear_logps_accepts_a_broadcast_upstream_gradient() -> None:
    ids = rand_ids(5, vocabulary=6)
    grads = []
    for expand in (True, False):
        hidden, weight = rand(5, 4).requires_grad_(), rand(6, 4, seed=1)
        upstream = torch.ones((), dtype=torch.float64).expand(5)  # stride 0
        linear_logps(hidden, weight, ids, chunk_size=2).backward(upstream if expand else upstream.clone())
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_linear_logps_is_differentiable_once() -> None:
    hidden, weight, ids = rand(3, 4).requires_grad_(), rand(6, 4), rand_ids(3, vocabulary=6)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(linear_logps(hidden, weight, ids).sum(), hidden, create_graph=True)


class ShapeRecorder(TorchDispatchMode):
    """Remembers the shape of every tensor that an operator returns, and the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.seen.append((str(func), tuple(x.shape), x.dtype))
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logps_never_holds_all_logits_nor_the_gradient_of_a_frozen_head(frozen: bool) -> None:
    hidden = rand(12, 5).bfloat16().requires_grad_()
    weight = rand(31, 5).bfloat16().requires_grad_(not frozen)
    with ShapeRecorder() as recorder:
        linear_logps(hidden, weight, rand_ids(12, vocabulary=31), chunk_size=4).sum().backward()
    assert not any(shape == (12, 31) for _, shape, _ in recorder.seen)
    assert any(shape == (4, 31) for _, shape, _ in recorder.seen)
    made = [dtype for name, shape, dtype in recorder.seen if shape == (31, 5) and "addmm" in name]
    assert made == ([] if frozen else [torch.float32] * 3)
    assert (weight.grad is None) == frozen


def test_head_gradient_is_summed_in_float32() -> None:
    # 512 chunks of one row: a sum in bfloat16 would lose the later ones.
    rows, ids = 512, rand_ids(512, vocabulary=3)
    hidden = (rand(rows, 2).abs() + 1).bfloat16()
    weight = rand(3, 2, seed=1).bfloat16()
    exact = weight.double().requires_grad_()
    reference.linear_logps(hidden.double(), exact, ids)[0].sum().backward()
    weight.requires_grad_()
    linear_logps(hidden, weight, ids, chunk_size=1).sum().backward()
    assert weight.grad is not None
    assert exact.grad is not None
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 6e-3  # one rounding of the result and those of the logits


def test_linear_logps_under_autocast_repeats_its_product_in_the_backward_pass() -> None:
    hidden, weight, ids = rand(4, 5).float().requires_grad_(), rand(6, 5).float(), rand_ids(4, vocabulary=6)
    plain = linear_logps(hidden, weight, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logps(hidden, weight, ids), plain)


def test_no_rows() -> None:
    hidden, weight = rand(0, 4).requires_grad_(), rand(6, 4).requires_grad_()
    linear_logps(hidden, weight, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


Z, H, W, I = torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)  # noqa: E741


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selective_log_softmax(Z, torch.tensor([0, 5, 0])), "token id 5 is outside the vocabulary of 5"),
        (lambda: selective_log_softmax(Z, torch.tensor([0, 0, -1])), "token id -1"),
        (lambda: selective_log_softmax(Z, torch.zeros(2, dtype=torch.long)), r"token_ids has shape \(2,\)"),
        (lambda: selective_log_softmax(Z, I.float()), "token_ids has dtype torch.float32"),
        (lambda: selective_log_softmax(Z.long(), I), "logits: give a floating-point tensor"),
        (lambda: selective_log_softmax(Z, I, temperature=0.0), "temperature=0.0"),
        (lambda: linear_logps(H, W, I + 5), "token id 5"),
        (lambda: linear_logps(H, W.bfloat16(), I), "weight is torch.bfloat16 and hidden torch.float32"),
        (lambda: linear_logps(H, W[:, :3], I), r"weight has shape \(5, 3\): expected \(5, 4\)"),
        (lambda: linear_logps(H, W, I, bias=torch.zeros(4)), r"bias has shape \(4,\)"),
        (lambda: linear_logps(H, W, I, chunk_size=0), "chunk_size=0"),
        (lambda: linear_logps(H, W, I, softcap=0.0), "softcap=0.0"),
        (lambda: linear_logps(H, W, I, logit_scale=INF), "logit_scale=inf"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
