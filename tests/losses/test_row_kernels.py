"""What only the row kernels do: masks, ids outside the row, gradients in place, large offsets."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import assert_as_accurate, rand, rounding_floor
from torch import Tensor

from fastr1_kernels import grpo_loss, reference, selective_log_softmax

INF, NAN = float("inf"), float("nan")


def rand_ids(*shape: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(9))


def score(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    from fastr1_kernels.rows import score_rows

    return score_rows(logits, token_ids, mask, temperature=temperature, inplace=inplace)


def test_masked_rows_are_not_read_and_score_zero(kernel_device: str) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]], device=kernel_device)
    logits = rand(2, 3, 40).float().to(kernel_device)
    clean = logits.clone().requires_grad_()
    logits[~mask] = NAN
    logits.requires_grad_()
    ids = rand_ids(2, 3, vocabulary=40).to(kernel_device).masked_fill(~mask, -100)
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


def test_inplace_gradient_takes_the_place_of_the_logits(kernel_device: str) -> None:
    leaf = rand(2, 4, 70).bfloat16().to(kernel_device).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]], device=kernel_device)
    ids = rand_ids(2, 3, vocabulary=35).to(kernel_device)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [2048, 1840, 1801])  # whole blocks; aligned rows; rows without alignment
@pytest.mark.parametrize("slope", [-9.0, 0.0, 9.0])  # the maximum falls, stays, rises from block to block
def test_many_blocks_are_as_accurate_as_torch(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, slope: float, columns: int, dtype: torch.dtype
) -> None:
    from fastr1_kernels.gpu.rows import row_launch_config

    logits = (rand(3, columns) + slope * torch.linspace(0, 1, columns)).to(dtype).to(kernel_device)
    block = {"BLOCK": 512, "num_warps": 1}
    monkeypatch.setattr("fastr1_kernels.gpu.rows.row_launch_config", lambda *rows: row_launch_config(*rows) | block)
    ids = rand_ids(3, vocabulary=columns).to(kernel_device)
    upstream = rand(2, 3, seed=1).to(kernel_device)
    results = []
    for rows, function in (
        (logits, lambda x: selective_log_softmax(x, ids, return_entropy=True)),
        (logits, lambda x: reference.selective_log_softmax(x, ids)),
        (logits.double(), lambda x: reference.selective_log_softmax(x, ids)),
    ):
        leaf = rows.detach().requires_grad_()
        outputs = function(leaf)
        results.append([*outputs, *torch.autograd.grad(outputs, leaf, list(upstream.to(outputs[0].dtype)))])
    for values in zip(*results, strict=True):
        assert_as_accurate(*values, floor=rounding_floor(dtype, kernel_device))


FAR = {
    "sequence": ((2, 1, 50), (2**31, 50, 1)),
    "token": ((1, 2, 50), (50, 2**31, 1)),
    "column": ((1, 1, 3), (1, 1, 2**30)),
}


def far_view(device: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Random numbers whose offsets leave 32 bits."""
    torch.use_deterministic_algorithms(False)  # a filled buffer would really take its 4 GB; untouched it takes none
    view = torch.empty(2**31 + 100, dtype=torch.bfloat16, device=device).as_strided(shape, stride)
    return view.copy_(rand(*shape))


@pytest.mark.parametrize(("shape", "stride"), FAR.values(), ids=FAR.keys())
def test_offsets_beyond_two_to_the_31(kernel_device: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    view = far_view(kernel_device, shape, stride)
    ids = rand_ids(*shape[:2], vocabulary=shape[2]).to(kernel_device)
    got = selective_log_softmax(view, ids, return_entropy=True)
    expected = selective_log_softmax(view.contiguous(), ids, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("use", ["scores", "loss"])
@pytest.mark.parametrize(("shape", "stride"), FAR.values(), ids=FAR.keys())
def test_gradients_beyond_two_to_the_31(
    kernel_device: str, shape: tuple[int, ...], stride: tuple[int, ...], use: str
) -> None:
    view = far_view(kernel_device, shape, stride)
    ids = rand_ids(*shape[:2], vocabulary=shape[2]).to(kernel_device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, -1] = shape[0] * shape[1] == 1  # zeros are written as far away
    gradients = []
    for logits in (view, view.contiguous()):
        logits = logits.requires_grad_().view_as(logits)
        if use == "scores":
            (3 * score(logits, ids, mask, inplace=True)[0].sum()).backward()
        else:
            advantages = torch.ones(shape[0], device=kernel_device)
            (
                3 * grpo_loss(logits, ids, mask=mask, advantages=advantages, loss_type="grpo", inplace=True).loss
            ).backward()
        gradients.append(logits.detach().clone())
    assert gradients[0].ne(0).any()
    assert torch.equal(*gradients)


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
