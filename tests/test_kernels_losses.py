"""The losses: every objective against its definition, and every property that a trainer relies on."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from conftest import shared_path
from safetensors.torch import load_file
from torch import Tensor

from fastr1_kernels import GRPOOutput, group_advantages, grpo_loss, linear_grpo_loss, reference
from fastr1_kernels.reference import PolicyOptions, kl_divergence, policy_loss_from_logps

B, T, V, D = 4, 5, 7, 3
LENGTHS = (5, 2, 0, 3)  # full, short, empty, with a hole (below)
NAN, INF = float("nan"), float("inf")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_mask() -> Tensor:
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[3, 1] = False
    return mask


TOKEN_IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(5))
MASK = make_mask()
ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64)
LOGITS = rand(B, T, V) * 1.5


def near(seed: int, scale: float) -> Tensor:
    """Log-probabilities of a policy near that of LOGITS."""
    return LOGITS.log_softmax(-1).gather(-1, TOKEN_IDS[..., None])[..., 0] + scale * rand(B, T, seed=seed)


OLD, REF, SAMPLER = near(1, 0.3), near(2, 0.5), near(3, 0.6)
OFF_POLICY = {"old_logps": OLD, "ref_logps": REF, "beta": 0.1}

# Every objective, off-policy where it can be. Ratios of 1 ± epsilon exactly do not occur: autograd splits such ties.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", **OFF_POLICY},
    "bnpo": {"loss_type": "bnpo", **OFF_POLICY},
    "dapo": {"loss_type": "dapo", "normalizer": 23, "epsilon_high": 0.28, **OFF_POLICY},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 6, **OFF_POLICY},
    "tinyllava_video_r1": {"loss_type": "tinyllava_video_r1", "ref_logps": REF, "beta": 0.01},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", **OFF_POLICY},
    "gspo_tokens": {"loss_type": "dapo", "normalizer": 9, "importance_sampling_level": "sequence", **OFF_POLICY},
    "delta": {"loss_type": "bnpo", "delta": 1.25, "epsilon": 0.1, "old_logps": OLD},
    "k1": {"loss_type": "grpo", "kl_estimator": "k1", **OFF_POLICY},
    "k2": {"loss_type": "grpo", "kl_estimator": "k2", **OFF_POLICY},
    "entropy_bonus": {"loss_type": "grpo", "entropy_coef": 0.3, "old_logps": OLD},
    "temperature": {"loss_type": "grpo", "temperature": 0.8, "entropy_coef": 0.1, **OFF_POLICY},
    "unclamped": {"loss_type": "grpo", "log_ratio_clamp": None, **OFF_POLICY},
    "clamped": {"loss_type": "grpo", "log_ratio_clamp": 0.25, "epsilon": 0.5, **OFF_POLICY},
    **{
        correction: {"loss_type": "grpo", "sampler_logps": SAMPLER, "sampler_correction": correction, **cap}
        for correction, cap in {
            "token_truncate": {"sampler_cap": 1.2, **OFF_POLICY},
            "token_mask": {"sampler_cap": 1.2, **OFF_POLICY},
            "sequence_truncate": {"sampler_cap": 1.5, **OFF_POLICY},
            "sequence_mask": {"sampler_cap": 1.5, **OFF_POLICY},
            "icepop": {"sampler_cap": 1.4, "sampler_floor": 0.8, **OFF_POLICY},
        }.items()
    },
    "cispo": {"loss_type": "cispo", "normalizer": 11, "epsilon_high": 1.1, **OFF_POLICY},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.4, **OFF_POLICY},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", **OFF_POLICY},
    "off_policy_mask": {"loss_type": "grpo", "off_policy_threshold": 0.05, **OFF_POLICY},
    "off_policy_mask_of_the_sampler": {"loss_type": "bnpo", "off_policy_threshold": 0.2, "sampler_logps": SAMPLER},
    "top_entropy": {"loss_type": "grpo", "top_entropy_quantile": 0.3, **OFF_POLICY},
    "every_mask": {
        "loss_type": "sapo",
        "top_entropy_quantile": 0.6,
        "off_policy_threshold": 0.1,
        "sampler_logps": SAMPLER,
        "sampler_correction": "icepop",
        "entropy_coef": 0.1,
        **OFF_POLICY,
    },
}
by_objective = pytest.mark.parametrize("arguments", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def loss_of(logits: Tensor, arguments: dict[str, Any], **more: Any) -> GRPOOutput:
    common = {"mask": MASK, "advantages": ADVANTAGES} | arguments | more
    return grpo_loss(logits, TOKEN_IDS, **common)


def rows_by_hand(b: int, temperature: float) -> tuple[list[int], list[float], list[float]]:
    """Loss tokens of sequence b, their log-probabilities and entropies."""
    kept = [t for t in range(T) if MASK[b, t]]
    rows = [[z / temperature for z in LOGITS[b, t].tolist()] for t in kept]
    lse = [math.log(math.fsum(math.exp(z) for z in row)) for row in rows]
    logps = [row[TOKEN_IDS[b, t]] - s for row, s, t in zip(rows, lse, kept, strict=True)]
    entropies = [math.fsum(-(z - s) * math.exp(z - s) for z in row) for row, s in zip(rows, lse, strict=True)]
    return kept, logps, entropies


def policy_by_hand(o: dict[str, Any], ratio: float, a: float, logp: float) -> float:
    """The loss of one token before masks, corrections and KL."""
    if o["loss_type"] == "tinyllava_video_r1":
        return -ratio * a
    if o["loss_type"] == "cispo":
        return -min(ratio, o["epsilon_high"]) * a * logp
    if o["loss_type"] == "sapo":
        tau = 1.0 if a > 0 else o.get("sapo_temperature_neg", 1.05)
        return -a * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    clipped = max(1 - o["epsilon"], min(1 + o.get("epsilon_high", o["epsilon"]), ratio))
    return -min(min(ratio, o.get("delta", INF)) * a, clipped * a)


def sampler_weight_by_hand(o: dict[str, Any], gaps: list[float], i: int) -> float:
    """Trainer over sampler, of a token or of a sequence, after truncation or masking."""
    level, _, action = o.get("sampler_correction", "token_truncate").partition("_")
    w, cap = math.exp(math.fsum(gaps) if level == "sequence" else gaps[i]), o.get("sampler_cap", 3.0)
    if level == "icepop":
        return w * (o.get("sampler_floor", 0.5) <= w <= cap)
    return min(w, cap) if action == "truncate" else w * (w <= cap)


def entropy_threshold_by_hand(entropies: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered, place = sorted(entropies), (1 - share) * (len(entropies) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def loss_by_hand(arguments: dict[str, Any]) -> float:
    """The definition with Python floats and loops; nothing shared with the package."""
    o = {"epsilon": 0.2, "beta": 0.0, "entropy_coef": 0.0, "temperature": 1.0, "log_ratio_clamp": 20.0} | arguments
    kind, clamp = o["loss_type"], o["log_ratio_clamp"] or INF
    rows = [rows_by_hand(b, o["temperature"]) for b in range(B)]
    threshold = entropy_threshold_by_hand([h for _, _, e in rows for h in e], o.get("top_entropy_quantile", 1.0))
    sequences: list[list[float]] = []
    for b, (kept, logps, entropies) in enumerate(rows):
        olds = o["old_logps"][b, kept].tolist() if "old_logps" in o else logps
        samplers = o["sampler_logps"][b, kept].tolist() if "sampler_logps" in o else None
        d = [p - q for p, q in zip(logps, olds, strict=True)]
        if o.get("importance_sampling_level") == "sequence":
            d = [math.fsum(d) / max(len(d), 1)] * len(d)
        drift = math.fsum(q - p for p, q in zip(logps, samplers or olds, strict=True)) / max(len(kept), 1)
        a, tokens = ADVANTAGES[b].item(), []
        for i in range(len(kept)):
            loss = policy_by_hand(o, math.exp(max(-clamp, min(clamp, d[i]))), a, logps[i])
            if drift > o.get("off_policy_threshold", INF) and a < 0:
                loss = 0.0
            if entropies[i] < threshold:
                loss = 0.0
            if samplers:
                loss *= sampler_weight_by_hand(o, [q - s for q, s in zip(olds, samplers, strict=True)], i)
            if o["beta"]:
                q = o["ref_logps"][b, kept[i]].item() - logps[i]
                bounded = max(-clamp, min(clamp, q))
                kl = {"k1": -q, "k2": q * q / 2, "k3": math.exp(bounded) - bounded - 1}
                loss += o["beta"] * kl[o.get("kl_estimator", "k3")]
            tokens.append(loss - o["entropy_coef"] * entropies[i])
        sequences.append(tokens)
    total = math.fsum(math.fsum(s) for s in sequences)
    if kind in ("grpo", "sapo", "tinyllava_video_r1"):
        return math.fsum(math.fsum(s) / max(len(s), 1) for s in sequences) / B
    if kind == "luspo":
        return total / B
    if kind == "dr_grpo":
        return total / (B * o["max_completion_length"])
    return total / (o["normalizer"] if "normalizer" in o else sum(len(s) for s in sequences))


@by_objective
def test_loss_matches_its_definition(arguments: dict[str, Any]) -> None:
    assert loss_of(LOGITS, arguments).loss.item() == pytest.approx(loss_by_hand(arguments), rel=1e-12)


@by_objective
def test_loss_gradients(arguments: dict[str, Any]) -> None:
    if "old_logps" not in arguments:
        arguments = arguments | {"advantages": ADVANTAGES * 0}  # a detached ratio hides its gradient from differences
    if arguments["loss_type"] == "cispo":
        arguments = arguments | {"epsilon_high": 1e-3}  # every ratio is cut: a constant, for differences too
    assert torch.autograd.gradcheck(lambda z: loss_of(z, arguments).loss, LOGITS.clone().requires_grad_())


@pytest.mark.parametrize(
    ("kind", "level"),
    [("grpo", "token"), ("grpo", "sequence"), ("bnpo", "token"), ("bnpo", "sequence"), ("tinyllava_video_r1", "token")],
)
def test_on_policy_gradient_is_reinforce(kind: str, level: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    output = loss_of(logits, {"loss_type": kind, "importance_sampling_level": level})
    output.loss.backward()
    counts = MASK.sum(1, keepdim=True)
    logps = reference.selective_log_softmax(other := LOGITS.clone().requires_grad_(), TOKEN_IDS)[0]
    if level == "sequence":
        logps = ((logps * MASK).sum(1, keepdim=True) / counts.clamp(min=1)).expand(B, T)
    weight = MASK / MASK.sum() if kind == "bnpo" else MASK / (counts.clamp(min=1) * B)
    (-(logps * ADVANTAGES[:, None] * weight.double()).sum()).backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-6, atol=1e-7)
    ratio_sum, count = output.metrics["ratio"]
    assert ratio_sum == count == MASK.sum()


@by_objective
def test_loss_equals_the_padded_reference(arguments: dict[str, Any]) -> None:
    names = ("old_logps", "ref_logps", "sampler_logps")
    others = {k: v for k, v in arguments.items() if k in names}
    scalars = {k: v for k, v in arguments.items() if k not in (*names, "temperature")}
    temperature = arguments.get("temperature", 1.0)
    a, b = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    output = loss_of(a, arguments)
    loss, metrics = reference.grpo_loss(
        b, TOKEN_IDS, MASK, ADVANTAGES, PolicyOptions(**scalars), temperature=temperature, **others
    )
    output.loss.backward()
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(a.grad, b.grad)
    assert metrics.keys() == output.metrics.keys()
    for name in metrics:
        torch.testing.assert_close(output.metrics[name], metrics[name])


def pack(x: Any) -> Any:
    """The first LENGTHS[b] rows of every sequence, one after the other."""
    if not isinstance(x, Tensor) or tuple(x.shape[:2]) != (B, T):
        return x
    return torch.cat([x[b, :n] for b, n in enumerate(LENGTHS)])


@by_objective
def test_packed_equals_padded(arguments: dict[str, Any]) -> None:
    a, b = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    padded = loss_of(a, arguments)
    packed = grpo_loss(
        pack(b),
        pack(TOKEN_IDS),
        cu_seqlens=torch.tensor([0, 5, 7, 7, 10], dtype=torch.int32),
        mask=pack(MASK),  # the hole stays
        advantages=ADVANTAGES,
        **{k: pack(v) for k, v in arguments.items()},
    )
    padded.loss.backward()
    packed.loss.backward()
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-16)
    for name in ("logps", "entropy"):
        torch.testing.assert_close(getattr(packed, name), pack(getattr(padded, name)), rtol=1e-14, atol=0)
    for name, pair in padded.metrics.items():
        torch.testing.assert_close(packed.metrics[name], pair, rtol=1e-14, atol=0)


def global_count(kind: str) -> int:
    return int(MASK.sum()) if kind in ("dapo", "bnpo", "cispo") else B


@pytest.mark.parametrize("splits", [[1, 1, 1, 1], [3, 1], [2, 2]])
@pytest.mark.parametrize("name", [name for name, o in OBJECTIVES.items() if "top_entropy_quantile" not in o])
def test_micro_batches_add_up_to_the_whole(name: str, splits: list[int]) -> None:
    arguments = OBJECTIVES[name]
    fixed = arguments | {"normalizer": global_count(arguments["loss_type"])}
    fixed.pop("advantages", None)
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5], dtype=torch.float64)
    group = {"advantages": None, "rewards": rewards, "num_generations": 2}
    whole_logits, logits = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    whole = loss_of(whole_logits, fixed, **group)
    whole.loss.backward()
    total, sums, start = 0.0, dict.fromkeys(whole.metrics, 0.0), 0
    for size in splits:
        rows = slice(start, start + size)
        local = {k: v[rows] if isinstance(v, Tensor) and v.shape == (B, T) else v for k, v in fixed.items()}
        index = torch.arange(start, start + size)
        part = grpo_loss(
            logits[rows],
            TOKEN_IDS[rows],
            mask=MASK[rows],
            rewards=rewards,
            num_generations=2,
            sequence_index=index,
            **local,
        )
        part.loss.backward()
        total += part.loss.item()
        sums = {k: v + part.metrics[k][0].item() for k, v in sums.items()}
        start += size
    assert total == pytest.approx(whole.loss.item(), rel=1e-14, abs=1e-16)
    torch.testing.assert_close(logits.grad, whole_logits.grad, rtol=1e-13, atol=1e-16)
    for metric, value in sums.items():
        assert value == pytest.approx(whole.metrics[metric][0].item(), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "tinyllava_video_r1"])
def test_default_denominator_is_that_of_the_call(kind: str) -> None:
    arguments: dict[str, Any] = {"loss_type": kind, "max_completion_length": 6}
    given = loss_of(LOGITS, arguments, normalizer=global_count(kind)).loss
    torch.testing.assert_close(loss_of(LOGITS, arguments).loss, given)
    tensor = torch.tensor(2 * global_count(kind))
    torch.testing.assert_close(loss_of(LOGITS, arguments, normalizer=tensor).loss, given / 2)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 50])
@by_objective
def test_linear_loss_equals_loss_of_its_logits(arguments: dict[str, Any], chunk_size: int | None) -> None:
    head = {"softcap": 4.0, "logit_scale": 1.2}
    results = []
    for linear in (True, False):
        hidden, weight = rand(B, T, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
        bias = rand(V, seed=2).requires_grad_()
        common = {"mask": MASK, "advantages": ADVANTAGES} | arguments
        if linear:
            output = linear_grpo_loss(hidden, weight, TOKEN_IDS, bias=bias, chunk_size=chunk_size, **head, **common)
        else:
            logits = 4.0 * torch.tanh((hidden @ weight.T + bias) * 1.2 / 4.0)
            output = grpo_loss(logits, TOKEN_IDS, **common)
        output.loss.backward()
        pairs = [x for pair in output.metrics.values() for x in pair]
        results.append([output.loss, hidden.grad, weight.grad, bias.grad, output.logps, output.entropy, *pairs])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_linear_loss_of_half_inputs_is_as_accurate_as_the_loss_of_half_logits() -> None:
    gold_inputs = [rand(B, T, D).bfloat16(), rand(V, D, seed=1).bfloat16()]
    arguments = {"mask": MASK, "advantages": ADVANTAGES, "loss_type": "grpo"}

    def grads(linear: bool, dtype: torch.dtype) -> list[Tensor]:
        hidden, weight = (x.to(dtype).requires_grad_() for x in gold_inputs)
        loss = (
            linear_grpo_loss(hidden, weight, TOKEN_IDS, chunk_size=2, **arguments).loss
            if linear
            else grpo_loss(hidden @ weight.T, TOKEN_IDS, **arguments).loss
        )
        return [x.double() for x in torch.autograd.grad(loss, (hidden, weight))]

    gold, yardstick = grads(False, torch.float64), grads(False, torch.bfloat16)
    for got, eager, exact in zip(grads(True, torch.bfloat16), yardstick, gold, strict=True):
        assert (got - exact).norm() <= 2 * (eager - exact).norm() + 1e-3 * exact.norm()


@by_objective
def test_masked_rows_reach_nothing(arguments: dict[str, Any]) -> None:
    dead = ~MASK
    logits = LOGITS.clone()
    logits[dead] = NAN
    logits.requires_grad_()
    ids = torch.where(MASK, TOKEN_IDS, -100)
    junk = cycle([INF, NAN, 1e30, -INF])
    dirty = {k: torch.where(dead, next(junk), v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    output = grpo_loss(logits, ids, mask=MASK, advantages=ADVANTAGES, **dirty)
    torch.testing.assert_close(output.loss, loss_of(LOGITS, arguments).loss, rtol=1e-14, atol=0)
    output.loss.backward()
    assert logits.grad is not None
    assert logits.grad[dead].eq(0).all()
    assert logits.grad[MASK].isfinite().all()
    assert output.logps[dead].eq(0).all()
    assert output.entropy[dead].eq(0).all()


def test_masked_log_ratio_of_200_stays_out_of_the_sum() -> None:
    # exp(200) is inf in float32, and inf · 0 is NaN.
    old = torch.where(MASK, OLD, OLD - 200).float()
    logits = LOGITS.float().requires_grad_()
    loss = loss_of(logits, {"loss_type": "grpo", "old_logps": old, "log_ratio_clamp": None}).loss
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("clamp", [20.0, None])
@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_huge_live_log_ratio_gives_finite_loss_and_gradient(gap: float, clamp: float | None) -> None:
    logits = LOGITS.float().requires_grad_()
    arguments = {"old_logps": (OLD + gap).float(), "log_ratio_clamp": clamp, "loss_type": "grpo"}
    loss = loss_of(logits, arguments, advantages=ADVANTAGES.abs().float()).loss  # the unclipped branch is not selected
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@by_objective
def test_all_masked_batch_gives_loss_zero_and_zero_gradients(arguments: dict[str, Any]) -> None:
    for normalizer in (arguments.get("normalizer"), 0, torch.tensor(0), 12):
        if normalizer is None and arguments["loss_type"] in ("dapo", "cispo"):
            continue
        logits = LOGITS.clone().requires_grad_()
        output = loss_of(logits, arguments, mask=torch.zeros_like(MASK), normalizer=normalizer)
        output.loss.backward()
        assert output.loss == 0
        assert logits.grad is not None
        assert logits.grad.eq(0).all()
        assert all(pair[0] == 0 and pair[1] == 0 for pair in output.metrics.values())


def test_all_masked_linear_loss_gives_zero_gradients() -> None:
    hidden, weight = rand(B, T, D).requires_grad_(), rand(V, D).requires_grad_()
    none = torch.zeros_like(MASK)
    linear_grpo_loss(hidden, weight, TOKEN_IDS, mask=none, advantages=ADVANTAGES, normalizer=0).loss.backward()
    for x in (hidden, weight):
        assert x.grad is not None
        assert x.grad.eq(0).all()


@pytest.mark.parametrize("shape", [(0, T), (B, 0)])
def test_empty_batch(shape: tuple[int, int]) -> None:
    logits = torch.zeros(*shape, V, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.long)
    output = grpo_loss(logits, ids, advantages=torch.zeros(shape[0]), loss_type="grpo")
    output.loss.backward()
    assert output.loss == 0
    assert logits.grad is not None
    assert logits.grad.shape == (*shape, V)


def test_equal_rewards_train_on_nothing() -> None:
    logits = LOGITS.float().requires_grad_()
    rewards = torch.full((B,), 0.7)
    output = loss_of(logits, {"advantages": None, "rewards": rewards, "num_generations": 4, "loss_type": "grpo"})
    output.loss.backward()
    assert output.loss == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("options", [{}, {"scale_rewards": "batch"}, {"advantage_eps": 0.5}, {"leave_one_out": True}])
def test_rewards_become_group_advantages(options: dict[str, Any]) -> None:
    rewards = torch.tensor([1.0, 0.25, 0.0, 0.5], dtype=torch.float64)
    ids = torch.tensor([3, 8, 8, 3])
    output = loss_of(LOGITS, {"loss_type": "grpo"}, advantages=None, rewards=rewards, group_ids=ids, **options)
    expected = group_advantages(
        rewards, group_ids=ids, **{k.replace("advantage_eps", "eps"): v for k, v in options.items()}
    )
    assert torch.equal(output.advantages, expected)
    torch.testing.assert_close(output.loss, loss_of(LOGITS, {"loss_type": "grpo", "advantages": expected}).loss)


def test_per_token_advantages() -> None:
    per_token = ADVANTAGES[:, None].expand(B, T)
    for arguments in ({"loss_type": "grpo", "old_logps": OLD}, OBJECTIVES["gspo"]):
        expected = loss_of(LOGITS, arguments).loss
        torch.testing.assert_close(loss_of(LOGITS, arguments, advantages=per_token).loss, expected)
        doubled = torch.where(torch.arange(T) == 0, 2.0, 1.0) * per_token
        assert not torch.isclose(loss_of(LOGITS, arguments, advantages=doubled).loss, expected)


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


def test_clip_metrics_count_tokens_on_the_clipped_side() -> None:
    old = LOGITS.log_softmax(-1).gather(-1, TOKEN_IDS[..., None])[..., 0].clone()
    old[0, 0] -= 0.5  # ratio 1.65, A > 0: clipped above
    old[0, 1] += 0.5  # ratio 0.61, A > 0: not clipped
    old[1, 0] += 0.5  # ratio 0.61, A < 0: clipped below
    old[1, 1] += 0.7  # likewise
    old[3, 1] += 0.7  # masked
    metrics = loss_of(LOGITS, {"loss_type": "grpo", "old_logps": old}).metrics
    assert [x.item() for x in metrics["clip_high"]] == [1, MASK.sum()]
    assert [x.item() for x in metrics["clip_low"]] == [2, MASK.sum()]


def test_kl_metric_without_beta_changes_no_gradient() -> None:
    plain = loss_of(LOGITS, {"loss_type": "grpo"})
    watched = loss_of(LOGITS, {"loss_type": "grpo", "ref_logps": REF})
    assert torch.equal(plain.loss, watched.loss)
    q = (REF - plain.logps)[MASK]
    torch.testing.assert_close(watched.metrics["kl"][0], (q.exp() - q - 1).sum())


def test_only_the_loss_carries_a_gradient() -> None:
    tensors = {
        k: v.clone().requires_grad_() for k, v in {"old_logps": OLD, "ref_logps": REF, "sampler_logps": SAMPLER}.items()
    }
    advantages = ADVANTAGES.clone().requires_grad_()
    arguments = {"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.1, "advantages": advantages, **tensors}
    output = loss_of(LOGITS.clone().requires_grad_(), arguments)
    output.loss.backward()
    assert all(x.grad is None for x in (*tensors.values(), advantages))
    outputs = [output.logps, output.entropy, output.advantages, *(x for pair in output.metrics.values() for x in pair)]
    assert not any(x.requires_grad for x in outputs)
    assert all(x.dim() == 0 for pair in output.metrics.values() for x in pair)


@pytest.mark.parametrize("q", [0.0, 1e-7, 3e-4, -3e-4, 0.0299, -0.0299, 0.03, -0.03, 0.5, -5.0, 15.0])
def test_k3_keeps_its_accuracy_near_zero_in_float32(q: float) -> None:
    exact_q = torch.tensor(q, dtype=torch.float32).item()
    x = torch.tensor(-exact_q, requires_grad=True)
    kl = kl_divergence(x, torch.tensor(0.0))
    kl.backward()
    series = math.fsum(exact_q**n / math.factorial(n) for n in range(2, 80))
    assert kl.item() == pytest.approx(series, rel=3e-6, abs=1e-30)
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(-math.expm1(exact_q), rel=3e-6, abs=1e-30)


def test_k3_is_accurate_in_float64_on_both_sides_of_the_series() -> None:
    q = torch.tensor([0.0299999, 0.0300001, -0.0299999, -0.0300001], dtype=torch.float64)
    expected = [math.fsum(x**n / math.factorial(n) for n in range(2, 40)) for x in q.tolist()]
    torch.testing.assert_close(kl_divergence(torch.zeros_like(q), q).tolist(), expected, rtol=1e-13, atol=0)


def test_k3_bounds_its_input() -> None:
    logps = torch.tensor([0.0, -30.0, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-30.0, 0.0, -5.0], dtype=torch.float64)
    kl = kl_divergence(logps, ref, clamp=20.0)
    torch.testing.assert_close(kl[:2].tolist(), [math.exp(-20) + 19, math.exp(20) - 21])
    kl.sum().backward()
    assert logps.grad is not None
    assert logps.grad[:2].eq(0).all()
    assert logps.grad[2] == pytest.approx(-math.expm1(-5))


def test_tinyllava_video_r1_bounds_the_output_of_k3() -> None:
    logps = torch.tensor([[-1.0, -1.0, -9.0, -200.0, -1.0, -1.0]], dtype=torch.float32, requires_grad=True)
    ref = torch.tensor([[-1.5, -61.0, -1.0, 0.0, -150.0, -INF]], dtype=torch.float32)
    options = PolicyOptions(loss_type="tinyllava_video_r1", beta=1.0)
    mask = torch.ones(1, 6, dtype=torch.bool)
    loss, metrics = policy_loss_from_logps(logps, mask, torch.zeros(1), options, ref_logps=ref)
    loss.backward()
    expected = (math.exp(-0.5) - 0.5) + 59.0 + 4 * 100.0
    assert metrics["kl"][0].item() == pytest.approx(expected, rel=1e-6)
    assert logps.grad is not None
    expected_grad = [-math.expm1(-0.5) / 6, 1 / 6, 0, 0, 0, 0]
    assert logps.grad[0].tolist() == pytest.approx(expected_grad, rel=1e-6)


def test_tinyllava_video_r1_matches_the_original_trainer() -> None:
    data = {
        k.removeprefix("grpo."): v
        for k, v in load_file(shared_path("fixtures/tinyllava/group_expected.safetensors")).items()
        if k.startswith("grpo.")
    }
    advantages = group_advantages(data["rewards"], len(data["rewards"]))
    torch.testing.assert_close(advantages, data["advantages"], rtol=1e-6, atol=1e-6)
    options = PolicyOptions(loss_type="tinyllava_video_r1", beta=0.01)
    mask = data["completion_mask"].bool()
    loss, metrics = policy_loss_from_logps(data["logps"], mask, advantages, options, ref_logps=data["ref_logps"])
    torch.testing.assert_close(loss, data["loss"], rtol=1e-5, atol=1e-7)
    assert metrics["ratio"][0] == mask.sum()


def test_loss_is_equivariant_to_the_order_of_sequences() -> None:
    order = torch.tensor([2, 0, 3, 1])
    arguments = OBJECTIVES["dapo"]
    shuffled = {k: v[order] if isinstance(v, Tensor) else v for k, v in arguments.items()}
    a, b = LOGITS.clone().requires_grad_(), LOGITS[order].requires_grad_()
    loss_of(a, arguments).loss.backward()
    grpo_loss(b, TOKEN_IDS[order], mask=MASK[order], advantages=ADVANTAGES[order], **shuffled).loss.backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad[order], b.grad, rtol=1e-13, atol=1e-16)


def test_loss_is_invariant_to_a_shift_of_the_logits() -> None:
    shift = rand(B, T, 1, seed=8) * 100
    arguments = OBJECTIVES["temperature"]
    torch.testing.assert_close(
        loss_of(LOGITS + shift, arguments).loss, loss_of(LOGITS, arguments).loss, rtol=1e-11, atol=0
    )


def test_rows_with_every_logit_below_minus_100() -> None:
    logits = (LOGITS - 1e4).float()
    expected = loss_of(logits.double(), OBJECTIVES["grpo"]).loss
    torch.testing.assert_close(loss_of(logits, OBJECTIVES["grpo"]).loss.double(), expected, rtol=1e-6, atol=1e-7)


def test_truncated_vocabulary_in_the_loss() -> None:
    kept = LOGITS.clone().requires_grad_()
    cut = torch.full((B, T, 3), -INF, dtype=torch.float64)
    arguments = OBJECTIVES["temperature"]
    loss = loss_of(torch.cat([kept, cut], -1), arguments).loss
    loss.backward()
    torch.testing.assert_close(loss, loss_of(LOGITS, arguments).loss)
    assert kept.grad is not None
    assert kept.grad.isfinite().all()


@by_objective
def test_non_contiguous_logits_and_unchanged_inputs(arguments: dict[str, Any]) -> None:
    whole = torch.zeros(B, T + 1, 2 * V, dtype=torch.float64)
    whole[:, :-1, ::2] = LOGITS
    tensors = [whole, TOKEN_IDS, MASK, ADVANTAGES, *(v for v in arguments.values() if isinstance(v, Tensor))]
    before = [x.clone() for x in tensors]
    leaf = whole.clone().requires_grad_()
    view = leaf[:, :-1, ::2]
    output = loss_of(view, arguments)
    output.loss.backward()
    assert torch.equal(output.loss, loss_of(LOGITS, arguments).loss)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(leaf, whole)


def test_stride_zero_upstream_gradient() -> None:
    hidden, weight = rand(B, T, D).requires_grad_(), rand(V, D)
    loss = linear_grpo_loss(hidden, weight, TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo").loss
    loss.expand(3).sum().backward()
    once = rand(B, T, D).requires_grad_()
    linear_grpo_loss(once, weight, TOKEN_IDS, advantages=ADVANTAGES, loss_type="grpo").loss.backward()
    assert once.grad is not None
    torch.testing.assert_close(hidden.grad, 3 * once.grad)


def test_repeated_calls_are_bit_identical() -> None:
    runs = []
    for _ in range(2):
        hidden, weight = rand(B, T, D).float().requires_grad_(), rand(V, D).float().requires_grad_()
        loss = linear_grpo_loss(hidden, weight, TOKEN_IDS, chunk_size=3, advantages=ADVANTAGES, loss_type="grpo").loss
        loss.backward()
        runs.append((loss, hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_of_lower_precision_is_float32_and_close(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    output = loss_of(logits, OBJECTIVES["grpo"])
    assert output.loss.dtype == output.logps.dtype == torch.float32
    exact = loss_of(logits.double(), OBJECTIVES["grpo"]).loss
    torch.testing.assert_close(output.loss.double(), exact, rtol=2e-6, atol=1e-7)


def test_integer_mask_and_int32_ids_are_accepted() -> None:
    output = grpo_loss(LOGITS, TOKEN_IDS.int(), mask=MASK.int(), advantages=ADVANTAGES, loss_type="grpo")
    assert torch.equal(output.loss, loss_of(LOGITS, {"loss_type": "grpo"}).loss)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "ppo"}, "loss_type='ppo' is not supported.*grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, tiny"),
    ({"loss_type": "cispo"}, "loss_type='cispo' divides by.*give normalizer"),
    ({"loss_type": "cispo", "normalizer": 9}, "epsilon_high=None"),
    ({"loss_type": "cispo", "normalizer": 9, "epsilon_high": 5.0, "delta": 9.0}, "delta=9.0 has no effect"),
    ({"loss_type": "sapo", "epsilon_high": 0.3}, "epsilon_high=0.3 has no effect"),
    ({"loss_type": "sapo", "sapo_temperature_neg": 0}, "sapo_temperature_neg=0"),
    ({"loss_type": "luspo"}, "importance_sampling_level='token': loss_type='luspo' needs 'sequence'"),
    ({"off_policy_threshold": 0.1}, "off_policy_threshold has no effect on-policy"),
    ({"off_policy_threshold": -0.1, "old_logps": OLD}, "off_policy_threshold=-0.1"),
    ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0.0"),
    ({"top_entropy_quantile": 1.5}, "top_entropy_quantile=1.5"),
    ({"sampler_floor": -1}, "sampler_floor=-1"),
    ({"loss_type": "dapo"}, "give normalizer"),
    ({"loss_type": "dr_grpo"}, "max_completion_length=None"),
    ({"importance_sampling_level": "batch"}, "importance_sampling_level='batch'"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
    ({"sampler_correction": "tis"}, "sampler_correction='tis' is not supported.*token_mask.*icepop"),
    ({"beta": 0.1}, "beta=0.1 needs ref_logps"),
    ({"beta": -0.1}, "beta=-0.1"),
    ({"beta": NAN}, "beta=nan"),
    ({"epsilon": "0.2"}, "epsilon='0.2'"),
    ({"epsilon_high": -1}, "epsilon_high=-1"),
    ({"delta": 1.2}, "delta=1.2: give a finite number > 1.2"),
    ({"temperature": 0}, "temperature=0"),
    ({"log_ratio_clamp": 0}, "log_ratio_clamp=0"),
    ({"normalizer": -1}, "normalizer=-1"),
    ({"normalizer": 0}, "normalizer=0, but this call has loss tokens"),
    ({"normalizer": torch.ones(2)}, r"normalizer has shape \(2,\)"),
    ({"max_completion_length": 1.5}, "max_completion_length=1.5"),
    ({"advantages": None}, "exactly one of rewards and advantages"),
    ({"rewards": torch.zeros(B), "num_generations": 2}, "exactly one of rewards and advantages"),
    ({"num_generations": 2}, "num_generations describes rewards"),
    ({"advantages": torch.zeros(B + 1)}, r"advantages has shape \(5,\)"),
    ({"advantages": [0.0] * B}, "advantages is a list"),
    ({"advantages": None, "rewards": torch.zeros(2 * B), "num_generations": 2}, r"rewards has shape \(8,\)"),
    ({"advantages": None, "rewards": torch.tensor([1.0, INF, 0, 0]), "num_generations": 2}, "reward 1 is inf"),
    (
        {
            "advantages": None,
            "rewards": torch.zeros(8),
            "num_generations": 2,
            "sequence_index": torch.tensor([0, 1, 2, 8]),
        },
        "leaves the 8 rewards",
    ),
    ({"scale_rewards": "std"}, "scale_rewards='std'"),
    ({"mask": MASK.double()}, "mask has dtype torch.float64"),
    ({"mask": MASK[:, :-1]}, r"mask has shape \(4, 4\): expected \(4, 5\)"),
    ({"old_logps": OLD[:, :-1]}, r"old_logps has shape \(4, 4\)"),
    ({"old_logps": TOKEN_IDS}, "old_logps has dtype torch.int64"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is for packed"),
    ({"inplace": True}, "inplace=True is not supported yet"),
    ({"loss_type": "tinyllava_video_r1", "old_logps": OLD}, "old_logps has no effect"),
    ({"loss_type": "tinyllava_video_r1", "delta": 2.0}, "delta=2.0 has no effect"),
    ({"loss_type": "tinyllava_video_r1", "epsilon_high": 0.3}, "epsilon_high=0.3 has no effect"),
    ({"loss_type": "tinyllava_video_r1", "kl_estimator": "k1"}, "kl_estimator='k1' has no effect"),
    ({"loss_type": "tinyllava_video_r1", "importance_sampling_level": "sequence"}, "'sequence' has no effect"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(LOGITS, {"loss_type": "grpo"} | arguments)


@pytest.mark.parametrize("bounds", [[0, 5, 7], [1, 5, 20], [0, 9, 5, 20], [], None])
def test_wrong_boundaries_are_refused(bounds: list[int] | None) -> None:
    logits, ids = LOGITS.flatten(0, 1), TOKEN_IDS.flatten()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        grpo_loss(logits, ids, cu_seqlens=cu_seqlens, advantages=torch.zeros(3), loss_type="grpo")


@pytest.mark.parametrize("token", [-1, V])
def test_id_outside_the_vocabulary_is_refused_unless_masked(token: int) -> None:
    ids = TOKEN_IDS.clone()
    ids[1, 4] = token  # masked
    arguments: dict[str, Any] = {"mask": MASK, "advantages": ADVANTAGES, "loss_type": "grpo"}
    grpo_loss(LOGITS, ids, **arguments)
    ids[0, 0] = token
    calls: list[Callable[[], GRPOOutput]] = [
        lambda: grpo_loss(LOGITS, ids, **arguments),
        lambda: linear_grpo_loss(rand(B, T, D), rand(V, D), ids, **arguments),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of {V}"):
            call()


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="epsilonn"):
        loss_of(LOGITS, {"epsilonn": 0.2})
