"""Log-probabilities of a linear head, a chunk of rows at a time, and what the doors of log-probabilities refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_accuracy import rand
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastr1_kernels import linear_logps, reference, selective_log_softmax

INF = float("inf")


def rand_ids(*shape: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(9))


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
