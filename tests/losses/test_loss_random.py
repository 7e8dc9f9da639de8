"""Random shapes, masks, layouts and options of every loss, against the float64 reference: loss, metrics, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_accuracy import assert_as_accurate, rand
from loss_cases import OPTION_NAMES, by_loss, loss_in_reference
from torch import Tensor

from fastr1_kernels import LOSSES, LossOptions, group_advantages, grpo_loss, linear_grpo_loss, reference
from fastr1_kernels.options import OPTION_DEFAULTS, SAMPLER_CORRECTIONS, SCALES

GIVEN = {"epsilon_high": 1.3, "max_completion_length": 7, "importance_sampling_level": "sequence"}


def maybe(strategy: st.SearchStrategy[Any], absent: Any = None) -> st.SearchStrategy[Any]:
    return st.just(absent) | strategy


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "epsilon": st.floats(0.05, 0.5),
    "epsilon_high": maybe(st.floats(0.05, 0.6)),
    "delta": maybe(st.floats(1.7, 2.5)),
    "sapo_temperature_pos": st.floats(0.5, 2.0),
    "sapo_temperature_neg": st.floats(0.5, 2.0),
    "importance_sampling_level": st.sampled_from(["token", "sequence"]),
    "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
    "entropy_coef": maybe(st.floats(-0.5, 0.5), 0.0),
    "max_completion_length": maybe(st.integers(1, 9)),
    "log_ratio_clamp": st.sampled_from([20.0, None, 0.3]),
    "sampler_correction": st.sampled_from(SAMPLER_CORRECTIONS),
    "sampler_cap": st.floats(0.8, 3.0),
    "sampler_floor": st.floats(0.0, 0.8),
    "off_policy_threshold": maybe(st.floats(0.0, 0.5)),
    "top_entropy_quantile": maybe(st.floats(0.2, 0.9), 1.0),
    "scale_rewards": st.sampled_from(SCALES),
    "advantage_eps": st.floats(1e-3, 0.5),
    "leave_one_out": st.booleans(),
    "temperature": st.floats(0.5, 2.0),
}


def kept_tokens(mask: Tensor) -> Tensor:
    """All but what follows the last loss token of its sequence, (B, T) bool."""
    return mask.flip(1).cumsum(1).flip(1) > 0


@st.composite
def calls(draw: st.DrawFn, loss_type: str) -> dict[str, Any]:
    """Arguments of a call that is accepted, with `logits` etc.; tensors are float64 and padded."""
    row, default = LOSSES[loss_type], OPTION_DEFAULTS
    options = {name: draw(strategy) for name, strategy in OPTIONS.items() if name not in row.ignores}
    options |= {name: value for name, value in GIVEN.items() if name in row.needs and options[name] == default[name]}
    b, t, vocabulary, seed = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        draw(st.integers(2, 9)),
        draw(st.integers(0, 999)),
    )
    hidden, weight = rand(b, t, 3, seed=seed), rand(vocabulary, 3, seed=seed + 1)
    ids = torch.randint(vocabulary, (b, t), generator=torch.Generator().manual_seed(seed))
    mask = rand(b, t, seed=seed + 2) < draw(st.sampled_from([9.0, 0.5, -0.5]))  # all, most or few of the tokens
    logps = (hidden @ weight.T / options["temperature"]).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    call = {"loss_type": loss_type, "hidden": hidden, "weight": weight, "token_ids": ids, "mask": mask, **options}
    names = ["ref_logps", "sampler_logps"] + ["old_logps"] * (not row.is_on_policy)
    for i, name in enumerate(names):
        if draw(st.booleans()):
            call[name] = logps + 0.4 * rand(b, t, seed=seed + 3 + i)
    if "ref_logps" in call:
        call["beta"] = draw(st.sampled_from([0.0, 0.1]))
    if not {"old_logps", "sampler_logps"} & set(call):
        call.pop("off_policy_threshold", None)
    call["normalizer"] = draw(st.integers(1, 40) if "normalizer" in row.needs else maybe(st.integers(1, 40)))
    source = draw(st.sampled_from(["rewards", "sequence", "token"]))
    if source == "rewards":
        call |= {"rewards": rand(b, seed=seed + 6), "group_ids": torch.arange(b) % draw(st.integers(1, 3))}
    else:
        call["advantages"] = rand(*((b,) if source == "sequence" else (b, t)), seed=seed + 6)
    # Packed, B advantages for B tokens may be one per sequence or one per token: such calls are refused.
    is_ambiguous = source != "rewards" and kept_tokens(mask).sum() == b
    call["is_packed"] = not is_ambiguous and draw(st.booleans())
    call["return_entropy"] = draw(st.booleans())
    return call


def split(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Keywords of the losses, the tensors hidden, weight and token_ids, and the layout."""
    rows = {name: call[name] for name in ("hidden", "weight", "token_ids")}
    return {k: v for k, v in call.items() if k not in rows and k != "is_packed"}, rows, call["is_packed"]


def expected(keywords: dict[str, Any], logits: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    """Loss, gradient of the logits, and metrics of the padded reference."""
    keywords = dict(keywords)
    advantages, return_entropy = keywords.pop("advantages", None), keywords.pop("return_entropy")
    o = LossOptions(**{k: v for k, v in keywords.items() if k in OPTION_NAMES})
    if advantages is None:
        advantages = group_advantages(
            keywords.pop("rewards"),
            group_ids=keywords.pop("group_ids"),
            scale_rewards=o.scale_rewards,
            eps=o.advantage_eps,
            leave_one_out=o.leave_one_out,
        )
    results, metrics = loss_in_reference(keywords, dtype, logits, ids, keywords.pop("mask"), advantages)
    if not (return_entropy or o.entropy_coef or o.top_entropy_quantile < 1):
        del metrics["entropy"]
    return results, metrics


def packed(inputs: dict[str, Any], mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Inputs without what follows the last loss token of every sequence, and which tokens that leaves, (B, T) bool."""
    kept = mask.flip(1).cumsum(1).flip(1) > 0
    flat = {k: v[kept] if isinstance(v, Tensor) and v.shape[:2] == mask.shape else v for k, v in inputs.items()}
    return flat | {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(1).cumsum(0)])}, kept


def run_examples(check: Callable[[dict[str, Any]], None], loss_type: str, number: int) -> None:
    settings(max_examples=number, derandomize=True, deadline=None, database=None)(given(calls(loss_type))(check))()


@by_loss
def test_grpo_loss_of_random_calls(backend: Backend, loss_type: str) -> None:
    def check(call: dict[str, Any]) -> None:
        keywords, rows, is_packed = split(call)
        logits, ids = rows["hidden"] @ rows["weight"].T, rows["token_ids"]
        gold, metrics = expected(keywords, logits, ids, torch.float64)
        yardstick, _ = expected(keywords, logits, ids, backend.dtype)
        inputs = {"logits": logits, "token_ids": ids, **keywords}
        kept = torch.ones_like(ids, dtype=torch.bool)
        if is_packed:
            inputs, kept = packed(inputs, keywords["mask"])
        inputs = {k: backend.put(v) for k, v in inputs.items()}
        leaf = inputs.pop("logits").detach().clone().requires_grad_()
        output = grpo_loss(leaf, **inputs)
        got = [output.loss, *torch.autograd.grad(output.loss, leaf)]
        assert gold[1][~kept].eq(0).all()
        gold, yardstick = ([loss, gradient[kept].view(leaf.shape)] for loss, gradient in (gold, yardstick))
        floor = 3e-6 if backend.has_kernels else 1e-12
        for values in zip(got, yardstick, gold, strict=True):
            assert_as_accurate(*values, floor=floor)
        assert output.metrics.keys() == metrics.keys()
        for name, pair in metrics.items():
            for got, value in zip(output.metrics[name], pair, strict=True):
                torch.testing.assert_close(got.cpu(), value, rtol=10 * floor, atol=10 * floor, check_dtype=False)

    run_examples(check, loss_type, 6 if backend.has_kernels else 40)


HEADS = st.fixed_dictionaries(
    {
        "softcap": maybe(st.floats(1.0, 4.0)),
        "logit_scale": st.sampled_from([1.0, 0.5, 1.7, -0.8]),
        "lora_scale": st.sampled_from([1.0, -0.6]),
        "top_k": maybe(st.integers(1, 9)),
        "top_p": maybe(st.floats(0.1, 1.0)),
    }
)
# What chooses the way: chunks, and what is read from the device.
WAYS = st.fixed_dictionaries(
    {"chunk_size": st.integers(1, 8), "check_values": st.booleans(), "counts": st.booleans(), "by_token": st.booleans()}
)


@by_loss
def test_linear_grpo_loss_of_random_calls(loss_type: str) -> None:
    def check(call: dict[str, Any], head: dict[str, Any], way: dict[str, Any]) -> None:
        keywords, rows, is_packed = split(call)
        ids, vocabulary = rows["token_ids"], len(rows["weight"])
        tensors = {**{n: rows[n] for n in ("hidden", "weight")}, "bias": rand(vocabulary, seed=20)}
        tensors |= {"lora_a": rand(2, 3, seed=21), "lora_b": rand(vocabulary, 2, seed=22)}
        exact, leaves = ({n: x.clone().requires_grad_() for n, x in tensors.items()} for _ in range(2))
        temperature = keywords["temperature"] * torch.ones(ids.shape, dtype=torch.float64)
        if way.pop("by_token"):
            temperature = temperature * (1 + rand(*ids.shape, seed=23).sigmoid())
            keywords["temperature"] = temperature
        kept = {k: head[k] for k in ("top_k", "top_p")}
        gold_logits = reference.linear_logits(**exact, **{k: v for k, v in head.items() if k not in kept})
        gold_logits = gold_logits / temperature[..., None]
        columns = reference.kept_columns(gold_logits.detach(), ids, **kept)
        gold_logits = torch.where(columns, gold_logits, -torch.inf)
        (loss, d_logits), metrics = expected(keywords | {"temperature": 1.0}, gold_logits, ids, torch.float64)
        gold = [loss, *torch.autograd.grad(gold_logits, list(exact.values()), d_logits)]
        if (number := int(keywords["mask"].sum())) and way.pop("counts", False):
            way["num_loss_tokens"] = number
        inputs = {"hidden": leaves.pop("hidden"), "token_ids": ids, **keywords}
        inputs = packed(inputs, keywords["mask"])[0] if is_packed else inputs
        hidden = inputs["hidden"] = inputs["hidden"].detach().requires_grad_()
        way.pop("counts", None)
        output = linear_grpo_loss(**inputs, **leaves, **head, **way)
        got = [output.loss, *torch.autograd.grad(output.loss, [hidden, *leaves.values()])]
        if is_packed:
            gold[1] = packed({"x": gold[1]}, keywords["mask"])[0]["x"]
        for value, exact_value in zip(got, gold, strict=True):
            # The absolute part is for 1 - p where p is nearly 1.
            torch.testing.assert_close(value, exact_value, rtol=1e-10, atol=1e-14)
        assert output.metrics.keys() == metrics.keys()

    chosen = settings(max_examples=60, derandomize=True, deadline=None, database=None)
    chosen(given(calls(loss_type), HEADS, WAYS)(check))()
