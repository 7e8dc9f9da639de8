"""The losses: every objective against its definition, and every property that a trainer relies on."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from conftest import TORCH, Backend
from kernel_accuracy import assert_as_accurate, rand, rounding_floor
from loss_by_hand import loss_by_hand
from loss_cases import (
    ADVANTAGES,
    CASES,
    CU_SEQLENS,
    LOGITS,
    MASK,
    OFF_POLICY,
    OLD,
    REF,
    SAMPLER,
    TOKEN_IDS,
    B,
    T,
    V,
    by_case,
    by_some,
    loss_in_reference,
    loss_of,
    loss_on,
    pack,
)
from torch import Tensor

from fastr1_kernels import LOSSES, group_advantages, grpo_loss, reference

NAN, INF = float("nan"), float("inf")


@by_case
def test_loss_matches_its_definition(arguments: dict[str, Any]) -> None:
    assert loss_of(LOGITS, arguments).loss.item() == pytest.approx(loss_by_hand(arguments), rel=1e-12)


@by_case
def test_loss_gradients(arguments: dict[str, Any]) -> None:
    if "old_logps" not in arguments:
        arguments = arguments | {"advantages": ADVANTAGES * 0}  # a detached ratio hides its gradient from differences
    if LOSSES[arguments["loss_type"]].objective == "capped":
        arguments = arguments | {"epsilon_high": 1e-3}  # every ratio is cut: a constant, for differences too
    assert torch.autograd.gradcheck(lambda z: loss_of(z, arguments).loss, LOGITS.clone().requires_grad_())


@by_case
def test_loss_gradient_and_metrics_match_the_reference(backend: Backend, arguments: dict[str, Any]) -> None:
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    output, gradient = loss_on(backend, arguments)
    assert all(torch.equal(arguments[k], v) for k, v in before.items())
    gold, gold_metrics = loss_in_reference(arguments, torch.float64)
    yardstick, _ = loss_in_reference(arguments, backend.dtype)
    for values in zip((output.loss, gradient), yardstick, gold, strict=True):
        assert_as_accurate(*values, floor=1e-6 if backend.has_kernels else 1e-14)
    assert output.loss.dtype == backend.dtype
    assert output.metrics.keys() == gold_metrics.keys()
    for name, (total, count) in gold_metrics.items():
        backend.assert_close(output.metrics[name][0], total)
        assert output.metrics[name][1].item() == count.item()
    exact = reference.selective_log_softmax(LOGITS, TOKEN_IDS, arguments.get("temperature", 1.0))
    for got, values in zip((output.logps, output.entropy), exact, strict=True):
        backend.assert_close(got, torch.where(MASK, values, 0))
    backend.assert_close(output.advantages, ADVANTAGES)


def levels_of(loss_type: str) -> list[str]:
    row = LOSSES[loss_type]
    if "importance_sampling_level" in row.ignores:
        return ["token"]
    return ["sequence"] if "importance_sampling_level" in row.needs else ["token", "sequence"]


@pytest.mark.parametrize(("loss_type", "level"), [(name, level) for name in LOSSES for level in levels_of(name)])
def test_on_policy_gradient_is_reinforce(loss_type: str, level: str) -> None:
    row = LOSSES[loss_type]
    arguments = {k: v for k, v in CASES[loss_type].items() if k not in (*OFF_POLICY, "epsilon_high")}
    if row.objective == "capped":
        arguments["epsilon_high"] = 5.0
    arguments["importance_sampling_level"] = level
    if row.objective == "sigmoid":  # σ'(0) = 1/4 whatever the temperature is
        arguments["sapo_temperature_neg"] = 3.0
    logits = LOGITS.clone().requires_grad_()
    output = loss_of(logits, arguments)
    output.loss.backward()
    counts = MASK.sum(1, keepdim=True)
    logps = reference.selective_log_softmax(other := LOGITS.clone().requires_grad_(), TOKEN_IDS)[0]
    if level == "sequence" and row.objective != "capped":
        logps = ((logps * MASK).sum(1, keepdim=True) / counts.clamp(min=1)).expand(B, T)
    per_token = MASK.double() / counts.clamp(min=1) if row.reduction == "sequence_means" else MASK.double()
    denominator = arguments.get("normalizer", MASK.sum() if row.counts == "tokens" else B)
    denominator = denominator * arguments.get("max_completion_length", 1)
    (-(logps * ADVANTAGES[:, None] * per_token).sum() / denominator).backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-12, atol=1e-15)
    ratio_sum, count = output.metrics["ratio"]
    assert ratio_sum == count == MASK.sum()


@by_case
def test_packed_equals_padded(backend: Backend, arguments: dict[str, Any]) -> None:
    padded, gradient = loss_on(backend, arguments)
    inputs = {"logits": LOGITS, "token_ids": TOKEN_IDS, "mask": MASK} | arguments  # the hole of the mask stays
    packed, packed_gradient = loss_on(backend, {k: pack(v) for k, v in inputs.items()}, cu_seqlens=CU_SEQLENS)
    backend.assert_close(packed.loss, padded.loss)
    backend.assert_close(packed_gradient, pack(gradient))
    backend.assert_close(packed.logps, pack(padded.logps))
    backend.assert_close(packed.entropy, pack(padded.entropy))
    for name, pair in padded.metrics.items():
        for got, expected in zip(packed.metrics[name], pair, strict=True):
            backend.assert_close(got, expected)


@pytest.mark.parametrize("bounds", [[0, 1, 1, 2, 3], [0, 0, 2, 3, 3]])
def test_as_many_packed_rows_as_sequences(backend: Backend, bounds: list[int]) -> None:
    # Advantages of shape (3,) would fit both; an empty sequence tells (B,) from (N,).
    advantages = torch.tensor([1.0, 5.0, -1.0, 2.0])
    cu_seqlens = torch.tensor(bounds)
    sequence = torch.repeat_interleave(torch.arange(4), cu_seqlens.diff())
    inputs = {"logits": LOGITS[0, :3], "token_ids": TOKEN_IDS[0, :3], "mask": None, "cu_seqlens": cu_seqlens}
    by_sequence, _ = loss_on(backend, {"loss_type": "bnpo", "advantages": advantages, **inputs})
    by_token, _ = loss_on(backend, {"loss_type": "bnpo", "advantages": advantages[sequence], **inputs})
    assert torch.equal(by_sequence.loss, by_token.loss)
    assert by_sequence.loss.item() == pytest.approx(-advantages[sequence].mean().item())


def micro_batches_add_up(backend: Backend, arguments: dict[str, Any], splits: list[int]) -> None:
    count = int(MASK.sum()) if LOSSES[arguments["loss_type"]].counts == "tokens" else B
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5])
    fixed = arguments | {"normalizer": count, "advantages": None, "rewards": rewards, "num_generations": 2}
    whole, gradient = loss_on(backend, fixed)
    sums, parts, start = {"loss": 0.0} | dict.fromkeys(whole.metrics, 0.0), [], 0
    for size in splits:
        rows = slice(start, start + size)
        inputs = {"logits": LOGITS, "token_ids": TOKEN_IDS, "mask": MASK} | fixed
        local = {k: v[rows] if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in inputs.items()}
        output, part = loss_on(backend, local, sequence_index=torch.arange(start, start + size))
        pairs = {"loss": (output.loss, None)} | output.metrics
        sums = {k: v + pairs[k][0].item() for k, v in sums.items()}
        parts.append(part)
        start += size
    backend.assert_close(torch.cat(parts), gradient)
    for name, (total, _) in ({"loss": (whole.loss, None)} | whole.metrics).items():
        backend.assert_close(torch.tensor(sums[name], dtype=torch.float64), total)


@by_some
def test_sequences_alone_add_up_to_the_whole(backend: Backend, arguments: dict[str, Any]) -> None:
    micro_batches_add_up(backend, arguments, [1, 1, 1, 1])


@pytest.mark.parametrize("splits", [[1, 1, 1, 1], [3, 1], [2, 2]])
@pytest.mark.parametrize("name", [name for name, o in CASES.items() if "top_entropy_quantile" not in o])
def test_micro_batches_add_up_to_the_whole(name: str, splits: list[int]) -> None:
    micro_batches_add_up(TORCH, CASES[name], splits)


@pytest.mark.parametrize("loss_type", [name for name, row in LOSSES.items() if "normalizer" not in row.needs])
def test_default_denominator_is_that_of_the_call(loss_type: str) -> None:
    arguments = {k: v for k, v in CASES[loss_type].items() if k != "normalizer"}
    count = int(MASK.sum()) if LOSSES[loss_type].counts == "tokens" else B
    given = loss_of(LOGITS, arguments, normalizer=count).loss
    torch.testing.assert_close(loss_of(LOGITS, arguments).loss, given)
    tensor = torch.tensor(2 * count)
    torch.testing.assert_close(loss_of(LOGITS, arguments, normalizer=tensor).loss, given / 2)


@by_case
def test_masked_rows_reach_nothing(backend: Backend, arguments: dict[str, Any]) -> None:
    dead, junk = ~MASK, cycle([INF, NAN, 1e30, -INF])
    dirty = {k: torch.where(dead, next(junk), v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    clean, clean_gradient = loss_on(backend, arguments)
    output, gradient = loss_on(
        backend,
        dirty,
        logits=LOGITS.masked_fill(dead[..., None], NAN),
        token_ids=TOKEN_IDS.masked_fill(dead, -100),
    )
    assert torch.equal(output.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)
    assert gradient.isfinite().all()
    for x in (gradient, output.logps, output.entropy):
        assert x[dead].eq(0).all()


@by_case
def test_all_masked_batch_gives_loss_zero_and_zero_gradients(backend: Backend, arguments: dict[str, Any]) -> None:
    default = arguments.get("normalizer")
    for normalizer in (default, torch.tensor(0)) if backend.has_kernels else (default, 0, torch.tensor(0), 12):
        if normalizer is None and "normalizer" in LOSSES[arguments["loss_type"]].needs:
            continue
        output, gradient = loss_on(backend, arguments, mask=torch.zeros_like(MASK), normalizer=normalizer)
        assert output.loss == 0
        assert gradient.eq(0).all()
        assert all(pair[0] == 0 and pair[1] == 0 for pair in output.metrics.values())


@pytest.mark.parametrize("shape", [(0, T), (2, 0)])
def test_empty_batch(backend: Backend, shape: tuple[int, int]) -> None:
    advantages = {"advantages": torch.zeros(shape[0])}
    rewards = torch.tensor([1.0, 0.0])
    if shape[0]:  # the advantages of empty sequences are written too
        advantages = {"advantages": None, "rewards": rewards, "num_generations": 2}
    inputs = {"logits": torch.zeros(*shape, V), "token_ids": torch.zeros(shape, dtype=torch.long), "mask": None}
    output, gradient = loss_on(backend, {"loss_type": "grpo", **inputs, **advantages})
    assert output.loss == 0
    assert gradient.shape == (*shape, V)
    if shape[0]:
        backend.assert_close(output.advantages, group_advantages(rewards.double(), 2))


def test_equal_and_unscored_rewards_train_on_nothing(backend: Backend) -> None:
    rewards = torch.tensor([0.7, 0.7, 0.7, NAN])
    output, gradient = loss_on(backend, {"loss_type": "grpo"}, advantages=None, rewards=rewards, num_generations=4)
    assert output.loss == 0
    assert gradient.eq(0).all()


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
def test_rewards_become_group_advantages(backend: Backend, options: dict[str, Any], dtype: torch.dtype) -> None:
    rewards = torch.tensor([1.0, 3.0, 0.0, 7.0, 2.0, 2.0, 9.0, 4.0])
    rewards = rewards if "sequence_index" in options else rewards[:B]
    arguments = {"loss_type": "grpo", "advantages": None, "beta": 0.1, "ref_logps": REF}
    inputs = {k: backend.put(v) for k, v in {"mask": MASK, **arguments, **options}.items()}
    ids, logits = TOKEN_IDS.to(backend.device), backend.put(LOGITS)
    output = grpo_loss(logits, ids, rewards=rewards.to(backend.device, dtype), **inputs)
    group = {k.replace("advantage_", ""): v for k, v in options.items() if k != "sequence_index"}
    expected = group_advantages(rewards.double(), **group)[options.get("sequence_index", slice(None))]
    assert output.advantages.shape == (B,)
    torch.testing.assert_close(output.advantages.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    given, _ = loss_on(backend, arguments, advantages=output.advantages)
    torch.testing.assert_close(output.loss, given.loss, rtol=2e-6, atol=1e-7)


@by_some
def test_nan_in_a_live_row_shows(backend: Backend, arguments: dict[str, Any]) -> None:
    logits = LOGITS.clone()
    logits[0, 0, 3] = NAN
    output, gradient = loss_on(backend, arguments, logits=logits)
    assert output.loss.isnan()
    if arguments.get("importance_sampling_level") != "sequence":  # there torch's clamp has stopped the gradient
        assert gradient[0, 0].isnan().any()
        assert gradient[0, 1:].isfinite().all()


@by_some
@pytest.mark.parametrize("use", ["scaled", "expanded", "half"])
def test_upstream_gradient(backend: Backend, arguments: dict[str, Any], use: str) -> None:
    inputs = {k: backend.put(v) for k, v in ({"mask": MASK, "advantages": ADVANTAGES} | arguments).items()}
    logits = backend.put(LOGITS).detach().clone().requires_grad_()
    loss = grpo_loss(logits, backend.put(TOKEN_IDS), **inputs).loss
    total, factor = {
        "scaled": (lambda: loss * 3, 3.0),
        "expanded": (lambda: loss.expand(4).sum(), 4.0),
        "half": (lambda: loss.half() / 2, 0.5),
    }[use]
    total().backward()
    _, once = loss_on(backend, arguments)
    assert logits.grad is not None
    backend.assert_close(logits.grad, factor * once)


@by_some
def test_repeated_calls_are_bit_identical(backend: Backend, arguments: dict[str, Any]) -> None:
    runs = [loss_on(backend, arguments) for _ in range(3)]
    for output, gradient in runs[1:]:
        assert torch.equal(output.loss, runs[0][0].loss)
        assert torch.equal(gradient, runs[0][1])
        for name, (total, _) in output.metrics.items():
            assert torch.equal(total, runs[0][0].metrics[name][0])


@by_some
def test_loss_is_equivariant_to_the_order_of_sequences(backend: Backend, arguments: dict[str, Any]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    inputs = {"logits": LOGITS, "token_ids": TOKEN_IDS, "mask": MASK, "advantages": ADVANTAGES} | arguments
    shuffled = {k: v[order] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    output, gradient = loss_on(backend, arguments)
    other, other_gradient = loss_on(backend, shuffled)
    backend.assert_close(other.loss, output.loss)
    assert torch.equal(gradient[order.to(backend.device)], other_gradient)


@by_some
def test_strided_logits_and_unchanged_inputs(backend: Backend, arguments: dict[str, Any]) -> None:
    inputs = {k: backend.put(v) for k, v in ({"mask": MASK, "advantages": ADVANTAGES} | arguments).items()}
    whole = torch.zeros(B, T + 1, 2 * V, dtype=backend.dtype, device=backend.device)
    whole[:, :-1, ::2] = backend.put(LOGITS)
    tensors = [whole, TOKEN_IDS, *(v for v in inputs.values() if isinstance(v, Tensor))]
    before = [x.clone() for x in tensors]
    leaf = whole.clone().requires_grad_()
    output = grpo_loss(leaf[:, :-1, ::2], backend.put(TOKEN_IDS), **inputs)
    output.loss.backward()
    assert torch.equal(output.loss, loss_on(backend, arguments)[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(leaf, whole)


def test_per_token_advantages(backend: Backend) -> None:
    per_token = ADVANTAGES[:, None].expand(B, T)
    doubled = torch.where(torch.arange(T) == 0, 2.0, 1.0) * per_token
    for arguments in ({"loss_type": "grpo", "old_logps": OLD}, CASES["gspo"]):
        expected, gradient = loss_on(backend, arguments)
        got, got_gradient = loss_on(backend, arguments, advantages=per_token)
        backend.assert_close(got.loss, expected.loss)
        backend.assert_close(got_gradient, gradient)
        assert not torch.isclose(loss_on(backend, arguments, advantages=doubled)[0].loss, expected.loss)


def test_masked_log_ratio_of_200_stays_out_of_the_sum(backend: Backend) -> None:
    # exp(200) is inf in float32, and inf · 0 is NaN.
    old = torch.where(MASK, OLD, OLD - 200)
    output, gradient = loss_on(backend, {"loss_type": "grpo", "old_logps": old, "log_ratio_clamp": None})
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("clamp", [20.0, None])
@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_huge_live_log_ratio_gives_finite_loss_and_gradient(backend: Backend, gap: float, clamp: float | None) -> None:
    arguments = {"loss_type": "grpo", "log_ratio_clamp": clamp, "old_logps": OLD + gap, "sampler_logps": OLD - gap}
    arguments["advantages"] = ADVANTAGES.abs()  # the unclipped branch is not selected
    # In float64 exp(200) is finite; float32 goes through both backends.
    for single in (backend, replace(backend, dtype=torch.float32)):
        output, gradient = loss_on(single, arguments)
        assert output.loss.isfinite()
        assert gradient.isfinite().all()


def test_cispo_weighs_the_gradient_of_logp_with_the_cut_ratio() -> None:
    logits, other = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    arguments = {"loss_type": "cispo", "normalizer": 1, "epsilon_high": 1.1, "old_logps": OLD}
    output = loss_of(logits, arguments)
    output.loss.backward()
    logps = reference.selective_log_softmax(other, TOKEN_IDS)[0]
    ratio = (logps - OLD).detach().exp()
    assert (ratio > 1.1)[MASK].any()
    assert (ratio < 1.1)[MASK].any()
    (-(ratio.clamp(max=1.1) * ADVANTAGES[:, None] * logps * MASK).sum()).backward()
    torch.testing.assert_close(logits.grad, other.grad)
    assert output.metrics["clip_high"][0] == ((ratio > 1.1) & (ADVANTAGES[:, None] > 0) & MASK).sum()


def test_masks_leave_the_kl_and_the_denominator_alone() -> None:
    arguments = {**OFF_POLICY, "loss_type": "grpo", "old_logps": OLD + 1, "advantages": -ADVANTAGES.abs()}
    masked = loss_of(LOGITS, arguments, off_policy_threshold=0.0)
    kl_alone = loss_of(LOGITS, arguments, advantages=ADVANTAGES * 0)
    assert masked.metrics["on_policy"][0] == 0
    torch.testing.assert_close(masked.loss, kl_alone.loss)


def test_delta_is_the_dual_clip() -> None:
    # Dual clip: where A < 0 the clipped loss is at most c·|A|.
    old = OLD - torch.linspace(-2, 2, B * T, dtype=torch.float64).view(B, T)
    arguments = {"loss_type": "bnpo", "old_logps": old, "delta": 3.0}
    logps = reference.selective_log_softmax(LOGITS, TOKEN_IDS)[0]
    ratio, a = (logps - old).exp(), ADVANTAGES[:, None]
    assert ((ratio > 3) & (a < 0) & MASK).any()
    clipped = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    dual = torch.where(a < 0, torch.min(clipped, -3.0 * a), clipped)
    torch.testing.assert_close(loss_of(LOGITS, arguments).loss, dual[MASK].mean())


def test_clip_metrics_count_tokens_on_the_clipped_side(backend: Backend) -> None:
    old = LOGITS.log_softmax(-1).gather(-1, TOKEN_IDS[..., None])[..., 0].clone()
    old[0, 0] -= 0.5  # ratio 1.65, A > 0: clipped above
    old[0, 1] += 0.5  # ratio 0.61, A > 0: not clipped
    old[1, 0] += 0.5  # ratio 0.61, A < 0: clipped below
    old[1, 1] += 0.7  # likewise
    old[3, 1] += 0.7  # masked
    metrics = loss_on(backend, {"loss_type": "grpo", "old_logps": old})[0].metrics
    assert [x.item() for x in metrics["clip_high"]] == [1, MASK.sum()]
    assert [x.item() for x in metrics["clip_low"]] == [2, MASK.sum()]


def test_only_the_loss_carries_a_gradient(backend: Backend) -> None:
    others = {"old_logps": OLD, "ref_logps": REF, "sampler_logps": SAMPLER, "advantages": ADVANTAGES}
    tensors = {k: backend.put(v).detach().clone().requires_grad_() for k, v in others.items()}
    logits = backend.put(LOGITS).detach().clone().requires_grad_()
    arguments = {"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.1, "mask": backend.put(MASK), **tensors}
    output = grpo_loss(logits, backend.put(TOKEN_IDS), **arguments)
    output.loss.backward()
    assert all(x.grad is None for x in tensors.values())
    outputs = [output.logps, output.entropy, output.advantages, *(x for pair in output.metrics.values() for x in pair)]
    assert not any(x.requires_grad for x in outputs)
    assert all(x.dim() == 0 for pair in output.metrics.values() for x in pair)


def test_loss_is_invariant_to_a_shift_of_the_logits() -> None:
    shift = rand(B, T, 1, seed=8) * 100
    arguments = CASES["temperature"]
    torch.testing.assert_close(
        loss_of(LOGITS + shift, arguments).loss, loss_of(LOGITS, arguments).loss, rtol=1e-11, atol=0
    )


def test_rows_with_every_logit_below_minus_100(backend: Backend) -> None:
    logits = (LOGITS - 1e4).float()
    expected = loss_of(logits.double(), CASES["grpo"]).loss
    output, _ = loss_on(backend, CASES["grpo"], logits=logits)
    torch.testing.assert_close(output.loss.cpu().double(), expected, rtol=1e-6, atol=1e-7)


def test_truncated_vocabulary_in_the_loss(backend: Backend) -> None:
    cut = torch.full((B, T, 3), -INF, dtype=torch.float64)
    expected, gradient = loss_on(backend, CASES["temperature"])
    output, got = loss_on(backend, CASES["temperature"], logits=torch.cat([LOGITS, cut], -1))
    backend.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(got[..., :V], gradient, rtol=1e-5, atol=1e-7)
    assert got[..., V:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_of_lower_precision_is_float32_and_as_accurate_as_the_reference(
    backend: Backend, dtype: torch.dtype
) -> None:
    vocabulary = 8200  # two blocks of a kernel, the second nearly empty
    logits = (3 * rand(2, 2, vocabulary)).to(dtype)
    ids = torch.tensor([[0, 8199], [8192, 17]])
    near = reference.selective_log_softmax(logits.double(), ids)[0]
    arguments = {"old_logps": near + 0.1, "ref_logps": near - 0.3, "beta": 0.1, "entropy_coef": 0.05}
    arguments["loss_type"] = "grpo"
    mask, advantages = torch.ones(2, 2, dtype=torch.bool), torch.tensor([1.0, -0.5])
    leaf = logits.to(backend.device, copy=True).requires_grad_()
    inputs = {k: backend.put(v) for k, v in arguments.items()}
    loss = grpo_loss(leaf, ids.to(backend.device), advantages=backend.put(advantages), **inputs).loss
    gradient = torch.autograd.grad(loss, leaf)[0]
    assert gradient.dtype == dtype
    given = (logits, ids, mask, advantages)
    yardstick, _ = loss_in_reference(arguments, dtype, *given)
    gold, _ = loss_in_reference(arguments, torch.float64, *given)
    for values in zip((loss, gradient), yardstick, gold, strict=True):
        assert_as_accurate(*values, floor=rounding_floor(dtype, backend.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_in_lower_precision_gives_a_float32_loss(backend: Backend, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    arguments = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in CASES["grpo"].items()}
    exact = loss_of(logits.double(), arguments).loss
    arguments |= {"mask": MASK, "advantages": ADVANTAGES.float()}
    inputs = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    output = grpo_loss(logits.to(backend.device), backend.put(TOKEN_IDS), **inputs)
    assert output.loss.dtype == output.logps.dtype == torch.float32
    torch.testing.assert_close(output.loss.cpu().double(), exact, rtol=2e-6, atol=1e-7)


def test_integer_mask_and_int32_ids_are_accepted(backend: Backend) -> None:
    output, gradient = loss_on(backend, {"loss_type": "grpo"}, token_ids=TOKEN_IDS.int(), mask=MASK.int())
    expected, expected_gradient = loss_on(backend, {"loss_type": "grpo"})
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


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
    near = reference.selective_log_softmax(logits, ids, CASES[name].get("temperature", 1.0))[0].double()
    arguments = {k: near + noise[k] if k in names else v for k, v in CASES[name].items()}
    given, advantages = (logits, ids, mask), ADVANTAGES.cuda()
    leaf = logits.clone().requires_grad_()
    inputs = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    loss = grpo_loss(leaf, ids, mask=mask, advantages=advantages.float(), **inputs).loss
    got = [loss, *torch.autograd.grad(loss, leaf)]
    yardstick, _ = loss_in_reference(inputs, torch.bfloat16, *given, advantages)
    gold, _ = loss_in_reference(arguments, torch.float64, *given, advantages)
    for values in zip(got, yardstick, gold, strict=True):
        assert_as_accurate(*values, floor=3e-6)
