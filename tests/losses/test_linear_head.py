"""The options of a linear head: low-rank weights, temperatures of tokens, dtype of the logits, and the kept set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from kernel_accuracy import assert_as_accurate, rand
from loss_cases import ADVANTAGES, MASK, TOKEN_IDS, B, D, T, V, by_some
from torch import Tensor

from fastr1_kernels import LossOptions, linear_grpo_loss, linear_logps, reference, sample_tokens
from fastr1_kernels.head import scale_to

NAN = float("nan")
RANK = 2
TENSORS = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,), "lora_a": (RANK, D), "lora_b": (V, RANK)}
TEMPERATURE = rand(B, T, seed=7).abs() + 0.3
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale_is_temperature": {"logit_scale": 0.5, "temperature": 0.5},
    "negative_scale": {"logit_scale": -0.7},
    "softcap": {"softcap": 1.5, "logit_scale": 1.7, "temperature": 1.3},
    "lora": {"lora_scale": 0.6},
    "temperatures": {"temperature": TEMPERATURE},
    "top_k": {"top_k": 3, "temperature": 0.8},
    "top_p": {"top_p": 0.7},
    "everything": {"temperature": TEMPERATURE, "top_k": 5, "top_p": 0.8, "softcap": 2.0, "lora_scale": -0.4},
}
by_head = pytest.mark.parametrize("name", HEADS)


def leaves_of(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    names = list(TENSORS) if "lora_scale" in HEADS[name] else ["hidden", "weight", "bias"]
    values = {n: rand(*TENSORS[n], seed=i).to(dtype) for i, n in enumerate(names)}
    return {n: x.requires_grad_() for n, x in values.items()}


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@by_head
def test_logps_of_every_head_match_the_reference(name: str, chunk_size: int) -> None:
    upstream, results = list(rand(2, B, T, seed=9)), []
    for function in (linear_logps, reference.linear_logps):
        leaves = leaves_of(name)
        more = {"chunk_size": chunk_size, "return_entropy": True} if function is linear_logps else {}
        outputs = function(token_ids=TOKEN_IDS, **leaves, **HEADS[name], **more)  # type: ignore[operator]
        results.append([*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [3, 6, 100])
@by_head
@by_some
def test_loss_of_every_head_matches_the_reference(arguments: dict[str, Any], name: str, chunk_size: int) -> None:
    arguments = {k: v for k, v in arguments.items() if k != "temperature"}
    head = HEADS[name]
    leaves, exact = leaves_of(name), leaves_of(name)
    output = linear_grpo_loss(
        token_ids=TOKEN_IDS, mask=MASK, advantages=ADVANTAGES, chunk_size=chunk_size, **leaves, **head, **arguments
    )
    options = {k: v for k, v in arguments.items() if hasattr(LossOptions(), k)}
    others = {k: v for k, v in arguments.items() if k not in options}
    logps, entropy = reference.linear_logps(token_ids=TOKEN_IDS, **exact, **head)
    loss, _ = reference.policy_loss_from_logps(
        logps, MASK, ADVANTAGES, LossOptions(**options), entropy=entropy, **others
    )
    got = [output.loss, *torch.autograd.grad(output.loss, list(leaves.values()))]
    expected = [loss, *torch.autograd.grad(loss, list(exact.values()))]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_low_rank_weights_are_those_of_the_whole_matrix() -> None:
    leaves = {n: x.detach() for n, x in leaves_of("lora").items()}
    whole = leaves["weight"] + 0.6 * leaves["lora_b"] @ leaves["lora_a"]
    got = linear_logps(token_ids=TOKEN_IDS, **leaves, lora_scale=0.6)
    torch.testing.assert_close(got, linear_logps(leaves["hidden"], whole, TOKEN_IDS, bias=leaves["bias"]))


def test_kept_set_by_hand() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -1.0]).double()
    hidden, head = torch.ones(1, 1, dtype=torch.float64), logits[:, None]

    def score(token: int, **kept: Any) -> float:
        return linear_logps(hidden, head, torch.tensor([token]), **kept).item()

    p = logits.softmax(0)
    assert score(0, top_k=1) == 0.0
    assert score(0, top_k=2) == pytest.approx((p[0] / p[:3].sum()).log().item())  # the tie stays
    assert score(0, top_p=p[0].item() - 1e-9) == 0.0
    assert score(0, top_p=p[0].item() + 1e-9) == pytest.approx((p[0] / p[:3].sum()).log().item())  # and here
    assert score(3, top_k=1) == pytest.approx((p[3] / (p[0] + p[3])).log().item())  # the token belongs to it
    assert score(4, top_k=9, top_p=1.0) == pytest.approx(p[4].log().item())
    # top_p is taken of what top_k leaves.
    assert score(0, top_k=3, top_p=0.7) == pytest.approx((p[0] / p[:3].sum()).log().item())


@pytest.mark.parametrize("kept", [{"top_p": 0.5}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.6}, {"top_k": 2}], ids=str)
def test_the_kept_set_is_the_samplers_where_logits_are_equal(kept: dict[str, Any]) -> None:
    """As they often are in bfloat16."""
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0])
    rows = logits.expand(64, 7)
    drawn = sample_tokens(rows, torch.arange(64), torch.zeros(64, dtype=torch.int64), **kept)
    scored = linear_logps(torch.ones(64, 1), logits[:, None], drawn.token_ids, **kept)
    assert len(drawn.token_ids.unique()) > 2
    torch.testing.assert_close(scored, drawn.logps)


def test_logits_of_float32_are_not_rounded() -> None:
    values = {n: x.detach().bfloat16() for n, x in leaves_of("lora").items()}
    exact = linear_logps(token_ids=TOKEN_IDS, **{n: x.double() for n, x in values.items()})
    assert (linear_logps(token_ids=TOKEN_IDS, **values) - exact).abs().max() > 1e-3
    kept = linear_logps(token_ids=TOKEN_IDS, logits_dtype=torch.float32, **values)
    torch.testing.assert_close(kept.double(), exact, rtol=1e-5, atol=1e-6)


def test_float16_gradients_of_many_tokens_do_not_vanish() -> None:
    # 1e6 loss tokens in the update: a gradient of a logit is of the order 1e-7, below the smallest float16.
    def gradients(dtype: torch.dtype, scale: float) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (rand(B, T, D), rand(V, D, seed=1))]
        loss = linear_grpo_loss(*leaves, TOKEN_IDS, advantages=ADVANTAGES, normalizer=1e6).loss
        return [x.double() / scale for x in torch.autograd.grad(scale * loss, leaves)]

    for got, exact in zip(gradients(torch.float16, 2.0**14), gradients(torch.float64, 1.0), strict=True):
        assert (got - exact).norm() <= 5e-3 * exact.norm()


def test_second_backward_is_refused() -> None:
    hidden = rand(B, T, D).requires_grad_()
    loss = linear_grpo_loss(hidden, rand(V, D), TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(
            linear_grpo_loss(hidden, rand(V, D), TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo").loss,
            hidden,
            create_graph=True,
        )


@by_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_in_the_kernels_is_as_accurate_as_torch(kernels: Backend, name: str, dtype: torch.dtype) -> None:
    head = {k: v.to(kernels.device) if isinstance(v, Tensor) else v for k, v in HEADS[name].items()}
    common = {"loss_type": "grpo", "mask": MASK, "advantages": ADVANTAGES.float(), "entropy_coef": 0.1}
    common = {k: v.to(kernels.device) if isinstance(v, Tensor) else v for k, v in common.items()}
    rounded = {n: x.detach().to(dtype) for n, x in leaves_of(name).items()}

    def results(dtype: torch.dtype, chunk_size: int | None) -> list[Tensor]:
        leaves = {n: x.to(kernels.device, dtype, copy=True).requires_grad_() for n, x in rounded.items()}
        output = linear_grpo_loss(
            token_ids=TOKEN_IDS.to(kernels.device), chunk_size=chunk_size, **leaves, **head, **common
        )
        return [output.loss, *torch.autograd.grad(output.loss, list(leaves.values()))]

    floor = 2e-2 if dtype == torch.bfloat16 else 1e-5  # the slope of a cap near its ends
    for got, gold in zip(results(dtype, 3), results(torch.float64, None), strict=True):
        assert_as_accurate(got, gold, gold, floor=floor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_a": rand(2, D)}, "lora_a and lora_b: give both or none"),
        ({"lora_a": rand(2, D), "lora_b": rand(V, 3)}, r"lora_b has shape \(7, 3\): expected \(7, 2\)"),
        ({"lora_a": rand(2, D).float(), "lora_b": rand(V, 2)}, "lora_a is torch.float32 and hidden torch.float64"),
        ({"lora_scale": NAN}, "lora_scale=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"logits_dtype": torch.float32}, "logits_dtype=torch.float32 for torch.float64"),
        ({"logits_dtype": torch.bfloat16}, "logits_dtype=torch.bfloat16"),
        ({"temperature": TEMPERATURE[:2]}, r"temperature has shape \(2, 5\)"),
        ({"temperature": TEMPERATURE * 0}, "temperature: give finite numbers > 0"),
    ],
)
def test_wrong_heads_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logps(rand(B, T, D), rand(V, D), TOKEN_IDS, **arguments)
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(rand(B, T, D), rand(V, D), TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo", **arguments)


def test_wrong_counts_are_refused() -> None:
    common: dict[str, Any] = {"loss_type": "grpo", "advantages": ADVANTAGES, "mask": MASK}
    with pytest.raises(ValueError, match="num_loss_tokens=3, but mask has 9 loss tokens"):
        linear_grpo_loss(rand(B, T, D), rand(V, D), TOKEN_IDS, num_loss_tokens=3, **common)
    del common["loss_type"]
    common["options"] = LossOptions(loss_type="grpo", temperature=0.8)
    with pytest.raises(ValueError, match=r"options.temperature=0.8 and temperature"):
        linear_grpo_loss(rand(B, T, D), rand(V, D), TOKEN_IDS, temperature=TEMPERATURE, **common)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_upstream_gradient_is_multiplied_before_the_rounding(dtype: torch.dtype) -> None:
    total, factor = rand(50).to(dtype), torch.tensor(1 / 3, dtype=torch.float64)
    expected = (total * factor.view(1).to(torch.promote_types(dtype, torch.float32))).to(dtype)
    assert torch.equal(scale_to(total.clone(), dtype, factor), expected)
    assert torch.equal(scale_to(total.float(), torch.float16, factor), (total.float() * factor.float()).half())
