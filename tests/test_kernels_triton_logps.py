"""The Triton row kernels: log-probability, entropy and gradient. On a GPU, or on a CPU with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import assert_as_accurate, rand, rounding_floor
from torch import Tensor

from fastr1_kernels import reference, selective_log_softmax

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_ids(*shape: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(9))


def score(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    from fastr1_kernels.gpu.rows import score_rows

    return score_rows(logits, token_ids, mask, temperature=temperature, inplace=inplace)


def scores_and_gradient(
    logits: Tensor, ids: Tensor, upstream: Tensor, temperature: float, kernel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    if kernel:
        outputs = selective_log_softmax(leaf, ids, temperature=temperature, return_entropy=True)
    else:
        outputs = reference.selective_log_softmax(leaf, ids, temperature)
    (gradient,) = torch.autograd.grad(outputs, leaf, list(upstream.to(outputs[0].dtype)))
    return *outputs, gradient


# One column; below one lane; one block exactly; a block and one column; many blocks and a rest (interpreter: 2 blocks).
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 129, 8193])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 2)])
def test_scores_and_gradient_match_the_reference(kernel_device: str, shape: tuple[int, ...], vocabulary: int) -> None:
    logits = (3 * rand(*shape, vocabulary)).float().to(kernel_device)
    ids = make_ids(*shape, vocabulary=vocabulary).to(kernel_device)
    upstream = rand(2, *shape, seed=1).to(kernel_device)
    got = scores_and_gradient(logits, ids, upstream, 0.7, kernel=True)
    gold = scores_and_gradient(logits.double(), ids, upstream, 0.7, kernel=False)
    yardstick = scores_and_gradient(logits, ids, upstream, 0.7, kernel=False)
    assert got[0].shape == got[1].shape == shape
    for values in zip(got, yardstick, gold, strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_as_accurate_as_torch(kernel_device: str, dtype: torch.dtype, temperature: float) -> None:
    logits = (4 * rand(5, 300)).to(dtype).to(kernel_device)
    ids = make_ids(5, vocabulary=300).to(kernel_device)
    upstream = rand(2, 5, seed=1).to(kernel_device)
    got = scores_and_gradient(logits, ids, upstream, temperature, kernel=True)
    gold = scores_and_gradient(logits.double(), ids, upstream, temperature, kernel=False)
    yardstick = scores_and_gradient(logits, ids, upstream, temperature, kernel=False)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[2].dtype == dtype
    for values in zip(got, yardstick, gold, strict=True):
        assert_as_accurate(*values, floor=rounding_floor(dtype, kernel_device))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_carries_its_gradient(kernel_device: str, used: int) -> None:
    logits = rand(3, 50).float().to(kernel_device).requires_grad_()
    ids = make_ids(3, vocabulary=50).to(kernel_device)
    output = selective_log_softmax(logits, ids, return_entropy=True)[used]
    output.sum().backward()  # an upstream gradient of stride 0, and none for the other output
    exact = logits.detach().double().requires_grad_()
    reference.selective_log_softmax(exact, ids)[used].sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize("shift", [-1024.0, 4096.0])
def test_a_shift_of_the_logits_changes_no_bit(kernel_device: str, shift: float) -> None:
    logits = (rand(4, 200) * 8).round().float().to(kernel_device) / 8  # the shift is exact
    ids = make_ids(4, vocabulary=200).to(kernel_device)
    upstream = rand(2, 4, seed=1).to(kernel_device)
    plain = scores_and_gradient(logits, ids, upstream, 0.9, kernel=True)
    shifted = scores_and_gradient(logits + shift, ids, upstream, 0.9, kernel=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, shifted, strict=True))


def test_truncated_vocabulary_equals_the_kept_columns_alone(kernel_device: str) -> None:
    kept = rand(4, 40).float().to(kernel_device)
    cut = torch.full((4, 300), -INF, device=kernel_device)
    ids = make_ids(4, vocabulary=40).to(kernel_device)
    upstream = rand(2, 4, seed=1).to(kernel_device)
    alone = scores_and_gradient(kept, ids, upstream, 1.0, kernel=True)
    # The cut columns come first: the running maximum starts at -inf and stays there for whole lanes.
    got = scores_and_gradient(torch.cat([cut, kept], 1), ids + 300, upstream, 1.0, kernel=True)
    for a, b in zip((*got[:2], got[2][:, 300:]), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert got[2][:, :300].eq(0).all()


def test_certain_token_has_entropy_and_gradient_zero(kernel_device: str) -> None:
    logits = torch.full((1, 9), -INF, device=kernel_device)
    logits[0, 4] = 2.5
    upstream = torch.ones(2, 1, device=kernel_device)
    outputs = scores_and_gradient(logits, torch.tensor([4], device=kernel_device), upstream, 1.0, kernel=True)
    assert all(x.eq(0).all() for x in outputs)


def test_nan_logit_reaches_the_result(kernel_device: str) -> None:
    logits = torch.zeros(2, 20, device=kernel_device)
    logits[1, 13] = NAN
    upstream = torch.ones(2, 2, device=kernel_device)
    ids = torch.zeros(2, dtype=torch.long, device=kernel_device)
    for x in scores_and_gradient(logits, ids, upstream, 1.0, kernel=True):
        assert x[0].isfinite().all()
        assert x[1].isnan().any()


def test_masked_rows_are_not_read_and_score_zero(kernel_device: str) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]], device=kernel_device)
    logits = rand(2, 3, 40).float().to(kernel_device)
    clean = logits.clone().requires_grad_()
    logits[~mask] = NAN
    logits.requires_grad_()
    ids = make_ids(2, 3, vocabulary=40).to(kernel_device).masked_fill(~mask, -100)
    outputs = score(logits, ids, mask)
    expected = selective_log_softmax(clean, ids.clamp(min=0), return_entropy=True)
    for got, all_rows in zip(outputs, expected, strict=True):
        assert torch.equal(got, torch.where(mask, all_rows, 0).flatten())
    # NaN upstream in a masked row, as from 0 · inf, stays out too.
    upstream = torch.where(mask, 1.0, NAN)
    (gradient,) = torch.autograd.grad(outputs, logits, [upstream.flatten()] * 2)
    (all_rows,) = torch.autograd.grad(expected, clean, [torch.ones_like(expected[0])] * 2)
    assert torch.equal(gradient, torch.where(mask[..., None], all_rows, 0))


@pytest.mark.parametrize("token", [-1, -(2**40), 40, 2**40])
def test_id_outside_the_row_is_never_read(kernel_device: str, token: int) -> None:
    logits = rand(1, 40).float().to(kernel_device).requires_grad_()
    logp, entropy = score(logits, torch.tensor([token], device=kernel_device))
    assert logp.item() == -INF
    assert entropy.isfinite().all()
    (gradient,) = torch.autograd.grad(logp, logits)
    torch.testing.assert_close(gradient, -logits.detach().softmax(-1))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_logits_equal_their_copy(kernel_device: str, layout: str) -> None:
    whole = rand(3, 5, 62).float().to(kernel_device)
    view = {
        "sliced": whole[1:, :-1, ::2],
        "transposed": whole.transpose(1, 2)[:, :31, :4].transpose(1, 2),
        "expanded": whole[:1, :-1, 1::2].expand(2, -1, -1),
    }[layout]
    before = whole.clone()
    ids = make_ids(*view.shape[:2], vocabulary=view.shape[2]).to(kernel_device)
    upstream = rand(2, *ids.shape, seed=1).to(kernel_device).float()
    results = []
    for logits in (view, view.contiguous()):
        leaf = logits.detach().requires_grad_()
        outputs = selective_log_softmax(leaf, ids, return_entropy=True)
        results.append([*outputs, *torch.autograd.grad(outputs, leaf, list(upstream))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(whole, before)


def test_inplace_gradient_takes_the_place_of_the_logits(kernel_device: str) -> None:
    leaf = rand(2, 4, 70).bfloat16().to(kernel_device).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]], device=kernel_device)
    ids = make_ids(2, 3, vocabulary=35).to(kernel_device)
    gradients = []
    for inplace in (False, True):
        logits = leaf * 1.0
        view = logits[:, 1:, ::2]
        outputs = score(view, ids, mask[:, 1:], inplace=inplace)
        (outputs[0].sum() + 0.3 * outputs[1].sum()).backward()
        gradients.append(leaf.grad)
        leaf.grad = None
    assert torch.equal(*gradients)  # type: ignore[arg-type]
    assert torch.equal(view.detach(), gradients[0][:, 1:, ::2])  # type: ignore[index]
    assert torch.equal(logits[:, 0].detach(), leaf[:, 0].detach())  # outside the view nothing is written


def test_second_backward_after_inplace_is_refused(kernel_device: str) -> None:
    logits = rand(2, 20).float().to(kernel_device).requires_grad_() * 1.0
    logp, _ = score(logits, torch.tensor([1, 2], device=kernel_device), inplace=True)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_scores_are_differentiable_once(kernel_device: str) -> None:
    logits = rand(2, 20).float().to(kernel_device).requires_grad_()
    logps = selective_log_softmax(logits, torch.tensor([1, 2], device=kernel_device))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(logps.sum(), logits, create_graph=True)


def test_no_rows(kernel_device: str) -> None:
    logits = torch.zeros(0, 5, 7, device=kernel_device, requires_grad=True)
    ids = torch.zeros(0, 5, dtype=torch.long, device=kernel_device)
    logps, entropy = selective_log_softmax(logits, ids, return_entropy=True)
    (logps.sum() + entropy.sum()).backward()
    assert logps.shape == entropy.shape == (0, 5)
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


def test_repeated_calls_are_bit_identical_and_leave_the_inputs_unchanged(kernel_device: str) -> None:
    logits = rand(6, 3000).bfloat16().to(kernel_device)
    ids = make_ids(6, vocabulary=3000).to(kernel_device)
    upstream = rand(2, 6, seed=1).to(kernel_device)
    before = logits.clone()
    runs = [scores_and_gradient(logits, ids, upstream, 0.8, kernel=True) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(logits, before)


def test_rows_are_equivariant_to_their_order(kernel_device: str) -> None:
    logits, ids = rand(5, 90).float().to(kernel_device), make_ids(5, vocabulary=90).to(kernel_device)
    upstream = rand(2, 5, seed=1).to(kernel_device)
    order = torch.tensor([3, 0, 4, 1, 2], device=kernel_device)
    plain = scores_and_gradient(logits, ids, upstream, 1.0, kernel=True)
    shuffled = scores_and_gradient(logits[order], ids[order], upstream[:, order], 1.0, kernel=True)
    assert all(torch.equal(a[order], b) for a, b in zip(plain, shuffled, strict=True))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2, 1, 50), (2**31, 50, 1)), ((1, 2, 50), (50, 2**31, 1)), ((1, 1, 3), (1, 1, 2**30))],
    ids=["sequence", "token", "column"],
)
def test_offsets_beyond_two_to_the_31(kernel_device: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    torch.use_deterministic_algorithms(False)  # a filled buffer would really take its 4 GB; untouched it takes none
    buffer = torch.empty(2**31 + 100, dtype=torch.bfloat16, device=kernel_device)
    view = buffer.as_strided(shape, stride)
    view.copy_(rand(*shape))
    ids = make_ids(*shape[:2], vocabulary=shape[2]).to(kernel_device)
    got = selective_log_softmax(view, ids, return_entropy=True)
    expected = selective_log_softmax(view.contiguous(), ids, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_vocabulary_beyond_two_to_the_31_logits() -> None:
    rows, vocabulary = 14_200, 151_936  # 2.16e9 logits
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits.normal_(0, 3, generator=generator)
    ids = torch.randint(vocabulary, (rows,), device="cuda", generator=generator)
    some = torch.tensor([0, 1, 7_000, 14_133, 14_134, 14_199], device="cuda")
    exact = logits[some].double().requires_grad_()
    expected = reference.selective_log_softmax(exact, ids[some])
    (expected_gradient,) = torch.autograd.grad(expected, exact, [torch.ones(6, device="cuda").double()] * 2)
    logits.requires_grad_()
    outputs = score(logits, ids)
    (gradient,) = torch.autograd.grad(outputs, logits, [torch.ones(rows, device="cuda")] * 2)
    for got, gold in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got[some].double(), gold, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[some].double(), expected_gradient, rtol=1e-2, atol=1e-6)
