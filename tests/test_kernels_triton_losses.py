"""`grpo_loss` in Triton: every objective against float64, and what a trainer relies on. On a GPU, or interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_accuracy import assert_as_accurate, rand, rounding_floor
from test_kernels_losses import ADVANTAGES, LOGITS, MASK, OBJECTIVES, OFF_POLICY, REF, TOKEN_IDS, B, T, V, pack
from torch import Tensor

from fastr1_kernels import GRPOOutput, group_advantages, grpo_loss, reference
from fastr1_kernels.reference import PolicyOptions

NAN, INF = float("nan"), float("inf")
by_objective = pytest.mark.parametrize("arguments", OBJECTIVES.values(), ids=OBJECTIVES.keys())
# One of each kind for properties that do not depend on the objective: one launch, and two row launches.
SOME = {name: OBJECTIVES[name] for name in ("dapo", "temperature", "gspo")}
by_some = pytest.mark.parametrize("arguments", SOME.values(), ids=SOME.keys())


def prepare(x: Any, device: str) -> Any:
    """Floats as float32 on the device, other tensors as they are."""
    if not isinstance(x, Tensor):
        return x
    return x.to(device, torch.float32) if x.is_floating_point() else x.to(device)


def loss_on(device: str, arguments: dict[str, Any], **more: Any) -> tuple[GRPOOutput, Tensor]:
    """Output of the kernels for the inputs of test_kernels_losses in float32, and the gradient of the logits."""
    common = {"mask": MASK, "advantages": ADVANTAGES, "logits": LOGITS, "token_ids": TOKEN_IDS} | arguments | more
    common = {k: prepare(v, device) for k, v in common.items()}
    logits = common.pop("logits").detach().clone().requires_grad_()
    output = grpo_loss(logits, **common)
    output.loss.backward()
    assert logits.grad is not None
    return output, logits.grad


def loss_in_torch(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """The reference in `dtype` on the CPU: loss and gradient, metrics."""
    arguments = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    names = ("old_logps", "ref_logps", "sampler_logps")
    others = {k: arguments[k] for k in names if k in arguments}
    scalars = {k: v for k, v in arguments.items() if k not in (*names, "temperature")}
    logits = LOGITS.to(dtype, copy=True).requires_grad_()
    temperature = arguments.get("temperature", 1.0)
    loss, metrics = reference.grpo_loss(
        logits, TOKEN_IDS, MASK, ADVANTAGES.to(dtype), PolicyOptions(**scalars), temperature=temperature, **others
    )
    return [loss, *torch.autograd.grad(loss, logits)], metrics


@by_objective
def test_loss_gradient_and_metrics_match_the_reference(kernel_device: str, arguments: dict[str, Any]) -> None:
    output, gradient = loss_on(kernel_device, arguments)
    gold, gold_metrics = loss_in_torch(arguments, torch.float64)
    yardstick, _ = loss_in_torch(arguments, torch.float32)
    for values in zip((output.loss, gradient), yardstick, gold, strict=True):
        assert_as_accurate(*values)
    assert output.metrics.keys() == gold_metrics.keys()
    for name, (total, count) in gold_metrics.items():
        assert output.metrics[name][0].item() == pytest.approx(total.item(), rel=3e-6, abs=1e-6), name
        assert output.metrics[name][1].item() == count.item()
    exact = reference.selective_log_softmax(LOGITS, TOKEN_IDS, arguments.get("temperature", 1.0))
    for got, values in zip((output.logps, output.entropy), exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), torch.where(MASK, values, 0), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(output.advantages.cpu().double(), ADVANTAGES)
    assert output.loss.dtype == torch.float32


@by_objective
def test_packed_equals_padded(kernel_device: str, arguments: dict[str, Any]) -> None:
    padded, gradient = loss_on(kernel_device, arguments)
    bounds = torch.tensor([0, 5, 7, 7, 10], dtype=torch.int32)
    inputs = {"logits": LOGITS, "token_ids": TOKEN_IDS, "mask": MASK} | arguments  # the hole of the mask stays
    packed, packed_gradient = loss_on(
        kernel_device, {k: pack(v) for k, v in inputs.items()} | {"cu_seqlens": bounds, "advantages": ADVANTAGES}
    )
    torch.testing.assert_close(packed.loss, padded.loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(packed_gradient, pack(gradient), rtol=1e-6, atol=1e-9)
    assert torch.equal(packed.logps, pack(padded.logps))
    assert torch.equal(packed.entropy, pack(padded.entropy))


@pytest.mark.parametrize("bounds", [[0, 1, 1, 2, 3], [0, 0, 2, 3, 3]])
def test_as_many_packed_rows_as_sequences(kernel_device: str, bounds: list[int]) -> None:
    # Advantages of shape (3,) would fit both; an empty sequence tells (B,) from (N,).
    advantages = torch.tensor([1.0, 5.0, -1.0, 2.0])
    cu_seqlens = torch.tensor(bounds)
    sequence = torch.repeat_interleave(torch.arange(4), cu_seqlens.diff())
    inputs = {"logits": LOGITS[0, :3], "token_ids": TOKEN_IDS[0, :3], "mask": None, "cu_seqlens": cu_seqlens}
    by_sequence, _ = loss_on(kernel_device, {"loss_type": "bnpo", "advantages": advantages, **inputs})
    by_token, _ = loss_on(kernel_device, {"loss_type": "bnpo", "advantages": advantages[sequence], **inputs})
    assert torch.equal(by_sequence.loss, by_token.loss)
    assert by_sequence.loss.item() == pytest.approx(-advantages[sequence].mean().item())


GROUPS: dict[str, dict[str, Any]] = {
    "runs": {"num_generations": 2},
    "labels": {"group_ids": torch.tensor([3, -8, -8, 3])},
    "batch": {"num_generations": 4, "scale_rewards": "batch", "advantage_eps": 0.5},
    "baseline": {"num_generations": 4, "scale_rewards": "none", "leave_one_out": True},
    "global": {"num_generations": 4, "sequence_index": torch.tensor([6, 1, 0, 3])},
    "global_labels": {"group_ids": torch.arange(8) % 3, "sequence_index": torch.tensor([6, 1, 0, 3])},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS.keys())
def test_rewards_become_group_advantages(kernel_device: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    rewards = torch.tensor([1.0, 3.0, 0.0, 7.0, 2.0, 2.0, 9.0, 4.0])
    rewards = rewards if "sequence_index" in options else rewards[:B]
    arguments = {"loss_type": "grpo", "advantages": None, "beta": 0.1, "ref_logps": REF}
    inputs = {"token_ids": TOKEN_IDS.to(kernel_device), "mask": MASK.to(kernel_device)}
    moved = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in (arguments | options).items()}
    output = grpo_loss(LOGITS.float().to(kernel_device), rewards=rewards.to(kernel_device, dtype), **inputs, **moved)
    group = {k.replace("advantage_", ""): v for k, v in options.items() if k != "sequence_index"}
    expected = group_advantages(rewards.double(), **group)[options.get("sequence_index", slice(None))]
    assert output.advantages.shape == (B,)
    torch.testing.assert_close(output.advantages.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    given, _ = loss_on(kernel_device, arguments, advantages=expected)
    torch.testing.assert_close(output.loss, given.loss, rtol=2e-6, atol=1e-7)


def test_advantages_of_empty_sequences_are_written(kernel_device: str) -> None:
    rewards, nothing = torch.tensor([1.0, 0.0]), torch.zeros(2, 0, dtype=torch.long)
    arguments = {"logits": torch.zeros(2, 0, V), "token_ids": nothing, "mask": None, "num_generations": 2}
    output, gradient = loss_on(kernel_device, {"loss_type": "grpo", **arguments}, advantages=None, rewards=rewards)
    torch.testing.assert_close(output.advantages.cpu(), group_advantages(rewards.double(), 2).float())
    assert output.loss == 0
    assert gradient.shape == (2, 0, V)


def test_equal_and_unscored_rewards_train_on_nothing(kernel_device: str) -> None:
    rewards = torch.tensor([0.7, 0.7, 0.7, NAN])
    output, gradient = loss_on(
        kernel_device, {"loss_type": "grpo"}, advantages=None, rewards=rewards, num_generations=4
    )
    assert output.loss == 0
    assert gradient.eq(0).all()


@by_objective
def test_masked_rows_reach_nothing(kernel_device: str, arguments: dict[str, Any]) -> None:
    dead = ~MASK
    dirty = {k: torch.where(dead, INF, v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    clean, clean_gradient = loss_on(kernel_device, arguments)
    output, gradient = loss_on(
        kernel_device,
        dirty,
        logits=LOGITS.masked_fill(dead[..., None], NAN),
        token_ids=TOKEN_IDS.masked_fill(dead, -100),
    )
    assert torch.equal(output.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)
    assert gradient[dead].eq(0).all()
    assert output.logps[dead].eq(0).all()
    assert output.entropy[dead].eq(0).all()


@by_objective
def test_all_masked_batch_gives_loss_zero_and_zero_gradients(kernel_device: str, arguments: dict[str, Any]) -> None:
    for normalizer in (arguments.get("normalizer"), torch.tensor(0)):
        if normalizer is None and arguments["loss_type"] in ("dapo", "cispo"):
            continue
        output, gradient = loss_on(kernel_device, arguments, mask=torch.zeros_like(MASK), normalizer=normalizer)
        assert output.loss == 0
        assert gradient.eq(0).all()
        assert all(pair[0] == 0 and pair[1] == 0 for pair in output.metrics.values())


@by_some
def test_nan_in_a_live_row_shows(kernel_device: str, arguments: dict[str, Any]) -> None:
    logits = LOGITS.clone()
    logits[0, 0, 3] = NAN
    output, gradient = loss_on(kernel_device, arguments, logits=logits)
    assert output.loss.isnan()
    if arguments.get("importance_sampling_level") != "sequence":  # there torch's clamp has stopped the gradient
        assert gradient[0, 0].isnan().any()
        assert gradient[0, 1:].isfinite().all()


@by_some
def test_inplace_gives_the_same_and_overwrites_the_logits_only(kernel_device: str, arguments: dict[str, Any]) -> None:
    whole = torch.zeros(B, T + 1, 2 * V, device=kernel_device)
    whole[:, :-1, ::2] = LOGITS
    others = {"mask": MASK, "advantages": ADVANTAGES} | arguments
    others = {k: prepare(v, kernel_device) for k, v in others.items()}
    results = []
    for inplace in (False, True):
        leaf = whole.clone().requires_grad_()
        logits = leaf * 1.0
        view = logits[:, :-1, ::2]
        output = grpo_loss(view, TOKEN_IDS.to(kernel_device), inplace=inplace, **others)
        output.loss.backward()
        changed = whole.clone()
        changed[:, :-1, ::2] = leaf.grad[:, :-1, ::2] if inplace else whole[:, :-1, ::2]  # type: ignore[index]
        assert torch.equal(logits.detach(), changed)
        results.append([output.loss, leaf.grad, output.logps, output.entropy])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def inplace_loss(logits: Tensor, **more: Any) -> GRPOOutput:
    arguments = {"mask": MASK, "advantages": ADVANTAGES, "loss_type": "grpo", "inplace": True} | more
    arguments = {k: prepare(v, str(logits.device)) for k, v in arguments.items()}
    return grpo_loss(logits, TOKEN_IDS.to(logits.device), **arguments)


def test_inplace_without_gradient_changes_nothing(kernel_device: str) -> None:
    logits = prepare(LOGITS, kernel_device)
    before = logits.clone()
    inplace_loss(logits)
    with torch.no_grad():
        inplace_loss(logits.requires_grad_() * 1.0)
    assert torch.equal(logits, before)


def test_inplace_refusals(kernel_device: str) -> None:
    logits = prepare(LOGITS, kernel_device)
    with pytest.raises(ValueError, match="leaf"):
        inplace_loss(logits.clone().requires_grad_())
    with pytest.raises(ValueError, match="share memory"):
        inplace_loss(logits[:1].clone().requires_grad_().expand(B, -1, -1))
    with pytest.raises(ValueError, match=r"inplace=True is not supported yet for torch\.float64"):
        inplace_loss(logits.double().requires_grad_() * 1.0)
    # tanh needs its output for its own gradient: autograd must notice that it is gone.
    output = inplace_loss(torch.tanh(logits.clone().requires_grad_()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


@by_some
def test_one_backward_pass(kernel_device: str, arguments: dict[str, Any]) -> None:
    others = {"mask": MASK, "advantages": ADVANTAGES} | arguments
    others = {k: prepare(v, kernel_device) for k, v in others.items()}
    logits = prepare(LOGITS, kernel_device).requires_grad_()
    output = grpo_loss(logits, TOKEN_IDS.to(kernel_device), **others)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(output.loss, logits, create_graph=True)


def test_second_backward_through_a_kept_graph_is_refused(kernel_device: str) -> None:
    logits = prepare(LOGITS, kernel_device).requires_grad_()
    output = grpo_loss(
        logits, TOKEN_IDS.to(kernel_device), advantages=ADVANTAGES.float().to(kernel_device), loss_type="grpo"
    )
    (2 * output.loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


@by_some
@pytest.mark.parametrize("use", ["scaled", "expanded", "half"])
def test_upstream_gradient(kernel_device: str, arguments: dict[str, Any], use: str) -> None:
    others = {"mask": MASK, "advantages": ADVANTAGES} | arguments
    others = {k: prepare(v, kernel_device) for k, v in others.items()}
    logits = prepare(LOGITS, kernel_device).requires_grad_()
    loss = grpo_loss(logits, TOKEN_IDS.to(kernel_device), **others).loss
    total, factor = {
        "scaled": (lambda: loss * 3, 3.0),
        "expanded": (lambda: loss.expand(4).sum(), 4.0),
        "half": (lambda: loss.half() / 2, 0.5),
    }[use]
    total().backward()
    _, once = loss_on(kernel_device, arguments)
    torch.testing.assert_close(logits.grad, factor * once, rtol=2e-6, atol=1e-9)


@by_some
def test_repeated_calls_are_bit_identical_and_leave_inputs_unchanged(
    kernel_device: str, arguments: dict[str, Any]
) -> None:
    tensors = {k: prepare(v, kernel_device) for k, v in arguments.items() if isinstance(v, Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    runs = [loss_on(kernel_device, arguments | tensors) for _ in range(3)]
    for output, gradient in runs[1:]:
        assert torch.equal(output.loss, runs[0][0].loss)
        assert torch.equal(gradient, runs[0][1])
        for name, (total, _) in output.metrics.items():
            assert torch.equal(total, runs[0][0].metrics[name][0])
    assert all(torch.equal(before[k], tensors[k]) for k in tensors)


@by_some
def test_order_of_sequences_changes_no_gradient_bit(kernel_device: str, arguments: dict[str, Any]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    inputs = {"logits": LOGITS, "token_ids": TOKEN_IDS, "mask": MASK, "advantages": ADVANTAGES} | arguments
    shuffled = {k: v[order] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    output, gradient = loss_on(kernel_device, arguments)
    other, other_gradient = loss_on(kernel_device, shuffled)
    assert torch.equal(gradient[order.to(kernel_device)], other_gradient)
    torch.testing.assert_close(output.loss, other.loss, rtol=2e-6, atol=1e-7)


def test_micro_batches_add_up_to_the_whole(kernel_device: str) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5])
    group = {"advantages": None, "rewards": rewards, "num_generations": 2}
    for kind, count in (("grpo", B), ("dapo", int(MASK.sum()))):
        arguments = OFF_POLICY | {"loss_type": kind, "normalizer": torch.tensor(count)}
        whole, gradient = loss_on(kernel_device, arguments, **group)
        total, parts = 0.0, []
        for b in range(B):
            inputs = {"logits": LOGITS, "token_ids": TOKEN_IDS, "mask": MASK} | arguments
            local = {k: v[b : b + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
            output, part = loss_on(kernel_device, local | group, sequence_index=torch.tensor([b]))
            total += output.loss.item()
            parts.append(part)
        assert total == pytest.approx(whole.loss.item(), rel=2e-6, abs=1e-7)
        assert torch.equal(torch.cat(parts), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_columns_in_every_dtype(kernel_device: str, dtype: torch.dtype) -> None:
    vocabulary = 8200  # two blocks, the second nearly empty
    logits = (3 * rand(2, 2, vocabulary)).to(dtype)
    ids = torch.tensor([[0, 8199], [8192, 17]])
    near = reference.selective_log_softmax(logits.double(), ids)[0]
    arguments = {"old_logps": near + 0.1, "ref_logps": near - 0.3, "beta": 0.1, "entropy_coef": 0.05}
    options = PolicyOptions(loss_type="grpo", beta=0.1, entropy_coef=0.05)
    results = []
    for kind in ("kernel", dtype, torch.float64):
        if kind == "kernel":
            leaf = logits.to(kernel_device, copy=True).requires_grad_()
            inputs = {k: prepare(v, kernel_device) for k, v in arguments.items()}
            advantages = torch.tensor([1.0, -0.5], device=kernel_device)
            loss = grpo_loss(leaf, ids.to(kernel_device), advantages=advantages, loss_type="grpo", **inputs).loss
        else:
            leaf = logits.to(kind, copy=True).requires_grad_()
            others = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
            loss, _ = reference.grpo_loss(
                leaf, ids, torch.ones(2, 2).bool(), torch.tensor([1.0, -0.5]), options, **others
            )
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    assert results[0][1].dtype == dtype
    for values in zip(*results, strict=True):
        assert_as_accurate(*values, floor=rounding_floor(dtype, kernel_device))


@pytest.mark.parametrize("q", [0.0, 1e-7, 3e-4, -3e-4, 0.0299, 0.4999, -0.4999, 0.5001, -5.0, 15.0, 25.0, -25.0])
def test_k3_and_its_gradient_keep_their_accuracy(kernel_device: str, q: float) -> None:
    ids = torch.tensor([[0]])
    arguments: dict[str, Any] = {"logits": torch.zeros(1, 1, 2), "token_ids": ids, "mask": None, "loss_type": "grpo"}
    arguments |= {"advantages": torch.zeros(1), "beta": 1.0}
    logp = loss_on(kernel_device, arguments, ref_logps=torch.zeros(1, 1))[0].logps.cpu()
    ref = logp + q
    exact = (ref.double() - logp.double()).item()  # what float32 can hold of q
    output, gradient = loss_on(kernel_device, arguments, ref_logps=ref)
    bounded = max(-20.0, min(20.0, exact))
    expected = math.fsum([math.exp(bounded), -bounded, -1.0])
    if abs(exact) < 0.6:
        expected = math.fsum(exact**n / math.factorial(n) for n in range(2, 80))
    assert output.loss.item() == pytest.approx(expected, rel=3e-6, abs=1e-30)
    slope = -math.expm1(exact) if exact == bounded else 0.0
    assert gradient[0, 0].tolist() == pytest.approx([slope / 2, -slope / 2], rel=3e-6, abs=1e-30)


def test_tinyllava_video_r1_bounds_the_output_of_k3(kernel_device: str) -> None:
    logits = torch.zeros(1, 5, 2)
    ref = -math.log(2) + torch.tensor([[-0.5, -60.0, 30.0, -150.0, -INF]])
    arguments = {"loss_type": "tinyllava_video_r1", "beta": 1.0, "ref_logps": ref, "advantages": torch.zeros(1)}
    inputs = {"logits": logits, "token_ids": torch.zeros(1, 5, dtype=torch.long), "mask": None}
    output, gradient = loss_on(kernel_device, arguments | inputs)
    assert output.metrics["kl"][0].item() == pytest.approx(math.exp(-0.5) - 0.5 + 59 + 300, rel=1e-6)
    expected = [-math.expm1(-0.5) / 10, 0.1, 0, 0, 0]
    assert gradient[0, :, 0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clamp", [20.0, None])
@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_huge_live_log_ratio_gives_finite_loss_and_gradient(
    kernel_device: str, gap: float, clamp: float | None
) -> None:
    near = reference.selective_log_softmax(LOGITS, TOKEN_IDS)[0]
    arguments = {"loss_type": "grpo", "log_ratio_clamp": clamp, "old_logps": near + gap, "sampler_logps": near - gap}
    output, gradient = loss_on(kernel_device, arguments, advantages=ADVANTAGES.abs())
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


def test_infinite_kl_is_a_metric_only_without_beta(kernel_device: str) -> None:
    output, gradient = loss_on(kernel_device, {"loss_type": "grpo", "kl_estimator": "k2"}, ref_logps=REF * INF)
    assert output.metrics["kl"][0] == INF
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dapo", "temperature", "gspo", "every_mask"])
def test_real_vocabulary(name: str) -> None:
    vocabulary, generator = 151_936, torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(4, 64, vocabulary, dtype=torch.bfloat16, device="cuda").normal_(0, 3, generator=generator)
    ids = torch.randint(vocabulary, (4, 64), device="cuda", generator=generator)
    mask = torch.arange(64, device="cuda") < torch.tensor([64, 7, 0, 33], device="cuda")[:, None]
    names = ("old_logps", "ref_logps", "sampler_logps")
    noise = dict(zip(names, 0.3 * rand(3, 4, 64).cuda(), strict=True))
    scalars = {k: v for k, v in OBJECTIVES[name].items() if k not in (*names, "temperature")}
    temperature = OBJECTIVES[name].get("temperature", 1.0)
    near = reference.selective_log_softmax(logits, ids, temperature)[0].double()
    others = {k: near + noise[k] for k in names if k in OBJECTIVES[name]}
    advantages = ADVANTAGES.cuda()
    results = []
    for kind in ("kernel", torch.bfloat16, torch.float64):
        leaf = logits.clone().requires_grad_() if kind == "kernel" else logits.to(kind, copy=True).requires_grad_()
        if kind == "kernel":
            inputs = {k: v.float() for k, v in others.items()}
            loss = grpo_loss(
                leaf, ids, mask=mask, advantages=advantages.float(), temperature=temperature, **inputs, **scalars
            ).loss
        else:
            options = PolicyOptions(**scalars)
            loss, _ = reference.grpo_loss(leaf, ids, mask, advantages, options, temperature=temperature, **others)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    for values in zip(*results, strict=True):
        assert_as_accurate(*values, floor=3e-6)
