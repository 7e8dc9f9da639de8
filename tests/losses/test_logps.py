"""Log-probability and entropy of given tokens from logits: torch, and the Triton row kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from kernel_accuracy import assert_as_accurate, rand, rounding_floor
from torch import Tensor

from fastr1_kernels import reference, selective_log_softmax

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def scores_and_gradient(
    logits: Tensor, ids: Tensor, upstream: Tensor, temperature: float, is_reference: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    if is_reference:
        outputs = reference.selective_log_softmax(leaf, ids, temperature)
    else:
        outputs = selective_log_softmax(leaf, ids, temperature=temperature, return_entropy=True)
    (gradient,) = torch.autograd.grad(outputs, leaf, list(upstream.to(outputs[0].dtype)))
    return *outputs, gradient


# One column; below one lane; one block exactly; a block and one column; many blocks and a rest (interpreter: 2 blocks).
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 129, 8193])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 2)])
def test_scores_and_gradient_match_the_reference(kernel_device: str, shape: tuple[int, ...], vocabulary: int) -> None:
    logits = (3 * rand(*shape, vocabulary)).float().to(kernel_device)
    ids = rand_ids(*shape, vocabulary=vocabulary).to(kernel_device)
    upstream = rand(2, *shape, seed=1).to(kernel_device)
    got = scores_and_gradient(logits, ids, upstream, 0.7)
    gold = scores_and_gradient(logits.double(), ids, upstream, 0.7, is_reference=True)
    yardstick = scores_and_gradient(logits, ids, upstream, 0.7, is_reference=True)
    assert got[0].shape == got[1].shape == shape
    for values in zip(got, yardstick, gold, strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_as_accurate_as_torch(backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    logits = (4 * rand(5, 300)).to(dtype).to(backend.device)
    ids = rand_ids(5, vocabulary=300).to(backend.device)
    upstream = rand(2, 5, seed=1).to(backend.device)
    got = scores_and_gradient(logits, ids, upstream, temperature)
    gold = scores_and_gradient(logits.double(), ids, upstream, temperature, is_reference=True)
    yardstick = scores_and_gradient(logits, ids, upstream, temperature, is_reference=True)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[2].dtype == dtype
    for values in zip(got, yardstick, gold, strict=True):
        assert_as_accurate(*values, floor=rounding_floor(dtype, backend.device))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_carries_its_gradient(backend: Backend, used: int) -> None:
    logits = rand(3, 50).float().to(backend.device).requires_grad_()
    ids = rand_ids(3, vocabulary=50).to(backend.device)
    output = selective_log_softmax(logits, ids, return_entropy=True)[used]
    output.sum().backward()  # an upstream gradient of stride 0, and none for the other output
    exact = logits.detach().double().requires_grad_()
    reference.selective_log_softmax(exact, ids)[used].sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize("shift", [-1e4, -101.0, 300.0])
def test_logps_are_shift_invariant(backend: Backend, shift: float) -> None:
    logits, ids = rand(4, 9).float().round(decimals=2).to(backend.device), rand_ids(4, vocabulary=9).to(backend.device)
    expected = selective_log_softmax(logits.double(), ids, return_entropy=True)
    got = selective_log_softmax(logits + shift, ids, return_entropy=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4e-7 * abs(shift))


@pytest.mark.parametrize("shift", [-1024.0, 4096.0])
def test_a_shift_of_the_logits_changes_no_bit(kernel_device: str, shift: float) -> None:
    logits = (rand(4, 200) * 8).round().float().to(kernel_device) / 8  # the shift is exact
    ids = rand_ids(4, vocabulary=200).to(kernel_device)
    upstream = rand(2, 4, seed=1).to(kernel_device)
    plain = scores_and_gradient(logits, ids, upstream, 0.9)
    shifted = scores_and_gradient(logits + shift, ids, upstream, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(plain, shifted, strict=True))


def test_truncated_vocabulary_equals_the_kept_columns_alone(backend: Backend) -> None:
    kept = rand(4, 40).float().to(backend.device)
    cut = torch.full((4, 300), -INF, device=backend.device)
    ids = rand_ids(4, vocabulary=40).to(backend.device)
    upstream = rand(2, 4, seed=1).to(backend.device)
    alone = scores_and_gradient(kept, ids, upstream, 1.0)
    # The cut columns come first: the running maximum starts at -inf and stays there for whole lanes.
    got = scores_and_gradient(torch.cat([cut, kept], 1), ids + 300, upstream, 1.0)
    for a, b in zip((*got[:2], got[2][:, 300:]), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert got[2][:, :300].eq(0).all()


def test_certain_token_has_entropy_and_gradient_zero(backend: Backend) -> None:
    logits = torch.full((1, 9), -INF, device=backend.device)
    logits[0, 4] = 2.5
    upstream = torch.ones(2, 1, device=backend.device)
    outputs = scores_and_gradient(logits, torch.tensor([4], device=backend.device), upstream, 1.0)
    assert all(x.eq(0).all() for x in outputs)


def test_nan_logit_reaches_the_result(backend: Backend) -> None:
    logits = torch.zeros(2, 20, device=backend.device)
    logits[1, 13] = NAN
    upstream = torch.ones(2, 2, device=backend.device)
    ids = torch.zeros(2, dtype=torch.long, device=backend.device)
    for x in scores_and_gradient(logits, ids, upstream, 1.0):
        assert x[0].isfinite().all()
        assert x[1].isnan().any()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_logits_equal_their_copy(backend: Backend, layout: str) -> None:
    whole = rand(3, 5, 62).float().to(backend.device)
    view = {
        "sliced": whole[1:, :-1, ::2],
        "transposed": whole.transpose(1, 2)[:, :31, :4].transpose(1, 2),
        "expanded": whole[:1, :-1, 1::2].expand(2, -1, -1),
    }[layout]
    before = whole.clone()
    ids = rand_ids(*view.shape[:2], vocabulary=view.shape[2]).to(backend.device)
    upstream = rand(2, *ids.shape, seed=1).to(backend.device).float()
    results = []
    for logits in (view, view.contiguous()):
        leaf = logits.detach().requires_grad_()
        outputs = selective_log_softmax(leaf, ids, return_entropy=True)
        results.append([*outputs, *torch.autograd.grad(outputs, leaf, list(upstream))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(whole, before)


def test_no_rows(backend: Backend) -> None:
    logits = torch.zeros(0, 5, 7, device=backend.device, requires_grad=True)
    ids = torch.zeros(0, 5, dtype=torch.long, device=backend.device)
    logps, entropy = selective_log_softmax(logits, ids, return_entropy=True)
    (logps.sum() + entropy.sum()).backward()
    assert logps.shape == entropy.shape == (0, 5)
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


def test_repeated_calls_are_bit_identical_and_leave_the_inputs_unchanged(backend: Backend) -> None:
    logits = rand(6, 3000).bfloat16().to(backend.device)
    ids = rand_ids(6, vocabulary=3000).to(backend.device)
    upstream = rand(2, 6, seed=1).to(backend.device)
    before = logits.clone()
    runs = [scores_and_gradient(logits, ids, upstream, 0.8) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(logits, before)


def test_rows_are_equivariant_to_their_order(backend: Backend) -> None:
    logits, ids = rand(5, 90).float().to(backend.device), rand_ids(5, vocabulary=90).to(backend.device)
    upstream = rand(2, 5, seed=1).to(backend.device)
    order = torch.tensor([3, 0, 4, 1, 2], device=backend.device)
    plain = scores_and_gradient(logits, ids, upstream, 1.0)
    shuffled = scores_and_gradient(logits[order], ids[order], upstream[:, order], 1.0)
    assert all(torch.equal(a[order], b) for a, b in zip(plain, shuffled, strict=True))
