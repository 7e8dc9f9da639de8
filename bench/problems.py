"""Inputs, reference results and floors of the cases. The reference is written out here, in float64, rows at a time, so
that nothing that is measured is its own judge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import harness
import torch
from harness import Group
from shapes import Case
from torch import Tensor

SEQUENCES = 8
OPTIONS = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.04}
REFERENCE_ROWS = 256


@dataclass
class Inputs:
    """B = 8 sequences of T tokens; `logits` or `hidden` and `weight`, the one that the operation starts from."""

    case: Case
    token_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    advantages: Tensor  # (B,)
    logits: Tensor | None = None  # (B, T, V)
    hidden: Tensor | None = None  # (B, T, D)
    weight: Tensor | None = None  # (V, D)
    old_logps: Tensor | None = None  # (B, T)
    ref_logps: Tensor | None = None

    @property
    def normalizer(self) -> Tensor:
        return self.mask.sum()


def draw(case: Case, linear: bool) -> Inputs:
    """Logits of a trained model's spread: a few likely tokens, of which one is drawn."""
    generator = torch.Generator(harness.device()).manual_seed(harness.SEED)
    shape = (SEQUENCES, case.rows // SEQUENCES)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=harness.device()).to(case.torch_dtype)

    uniform = torch.rand(shape, generator=generator, device=harness.device())
    token_ids = torch.randint(case.vocabulary, shape, generator=generator, device=harness.device())
    advantages = torch.linspace(-1.6, 1.6, SEQUENCES, device=harness.device())
    inputs = Inputs(case, token_ids, uniform >= case.dead, advantages)
    if linear:
        inputs.hidden = normal(*shape, case.width)
        inputs.weight = normal(case.vocabulary, case.width) * (2 / math.sqrt(case.width))
    else:
        inputs.logits = normal(*shape, case.vocabulary) * 2
    return inputs


def logits_of(inputs: Inputs, rows: slice) -> Tensor:
    """Some rows of the logits (n, V) in float64."""
    if inputs.logits is not None:
        return inputs.logits.detach().flatten(0, 1)[rows].double()
    assert inputs.hidden is not None
    assert inputs.weight is not None
    return inputs.hidden.detach().flatten(0, 1)[rows].double() @ inputs.weight.detach().double().T


def chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + REFERENCE_ROWS, rows)) for start in range(0, rows, REFERENCE_ROWS)]


def score(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every row (N,), float64."""
    logps, entropy = [], []
    for rows in chunks(inputs.case.rows):
        log_probs = logits_of(inputs, rows).log_softmax(-1)
        logps.append(log_probs.gather(1, inputs.token_ids.view(-1, 1)[rows]).squeeze(1))
        entropy.append(-(log_probs.exp() * log_probs).sum(1))
    return torch.cat(logps), torch.cat(entropy)


def add_policies(inputs: Inputs, logps: Tensor) -> None:
    """Log-probabilities of an older policy and of the reference, near those of the logits."""
    generator = torch.Generator(harness.device()).manual_seed(harness.SEED + 1)
    shape = inputs.token_ids.shape
    noise = [torch.randn(shape, generator=generator, device=harness.device()) for _ in range(2)]
    inputs.old_logps, inputs.ref_logps = (logps.view(shape).float() + 0.1 * x for x in noise)


def token_loss(logps: Tensor, inputs: Inputs) -> Tensor:
    """Loss of every token (B, T) with autograd, without mask: clipped objective and k3."""
    assert inputs.old_logps is not None
    assert inputs.ref_logps is not None
    ratio = (logps - inputs.old_logps).exp()
    a = inputs.advantages[:, None].to(logps.dtype)
    q = inputs.ref_logps - logps
    clipped = ratio.clamp(1 - OPTIONS["epsilon"], 1 + OPTIONS["epsilon_high"])  # type: ignore[operator]
    return -torch.min(ratio * a, clipped * a) + OPTIONS["beta"] * (q.exp() - q - 1)  # type: ignore[operator]


def masked_loss(logps: Tensor, inputs: Inputs) -> Tensor:
    return torch.where(inputs.mask, token_loss(logps, inputs), 0.0).sum() / inputs.normalizer


def loss_group(case: Case, linear: bool) -> Group:
    """Loss and gradients, of the logits or of hidden states and head."""
    inputs, gold, scales = loss_reference(replace(case, frozen=False, cold=False), linear)
    inputs = replace(inputs, case=case)
    names = ("logits", "hidden", *(() if case.frozen else ("weight",)))
    for name in names:
        if getattr(inputs, name) is not None:
            setattr(inputs, name, getattr(inputs, name).detach().requires_grad_())
    gold = {name: x for name, x in gold.items() if name in ("loss", *names)}
    floor, work = gemm_floor(case, 2 if case.frozen else 3) if linear else bandwidth_floor(case, passes=2)
    return Group(case, inputs, gold, scales, floor, work)


_reference: dict[tuple[Case, bool], tuple[Inputs, dict[str, Tensor], dict[str, float]]] = {}


def loss_reference(case: Case, linear: bool) -> tuple[Inputs, dict[str, Tensor], dict[str, float]]:
    """Inputs, the loss and every gradient, and what their errors are relative to; those of the last case are kept."""
    if (case, linear) not in _reference:
        _reference.clear()  # before there are others: of 32,768 rows they are 30 GB
        _reference[case, linear] = compute_reference(case, linear)
    return _reference[case, linear]


def compute_reference(case: Case, linear: bool) -> tuple[Inputs, dict[str, Tensor], dict[str, float]]:
    inputs = draw(case, linear)
    logps, _ = score(inputs)
    add_policies(inputs, logps)
    leaf = logps.view(inputs.token_ids.shape).requires_grad_()
    terms = torch.where(inputs.mask, token_loss(leaf, inputs), 0.0) / inputs.normalizer
    (slope,) = torch.autograd.grad(terms.sum(), leaf)
    gold = {"loss": terms.detach().sum()}
    wide = torch.float32 if torch.cuda.is_available() else torch.float64  # how the gradients are kept
    sources = {"hidden": inputs.hidden, "weight": inputs.weight} if linear else {"logits": inputs.logits}
    for name, x in sources.items():
        assert x is not None
        gold[name] = torch.zeros(x.shape, dtype=wide, device=x.device)
    for rows in chunks(case.rows):
        d_logits = -logits_of(inputs, rows).softmax(-1)
        d_logits.scatter_add_(1, inputs.token_ids.view(-1, 1)[rows], torch.ones_like(d_logits[:, :1]))
        d_logits *= slope.view(-1, 1)[rows]
        if inputs.hidden is None or inputs.weight is None:
            gold["logits"].view(case.rows, -1)[rows] = d_logits.to(wide)
            continue
        gold["hidden"].view(case.rows, -1)[rows] = (d_logits @ inputs.weight.double()).to(wide)
        gold["weight"] += (d_logits.T @ inputs.hidden.flatten(0, 1)[rows].double()).to(wide)
    scales = {name: harness.norm(x) for name, x in gold.items() if name != "loss"}
    scales["loss"] = float(terms.detach().abs().sum())  # the terms cancel
    return inputs, gold, scales


def score_group(case: Case, linear: bool) -> Group:
    """Log-probabilities and entropies, without gradient."""
    inputs = draw(case, linear)
    logps, entropy = score(inputs)
    gold = {"logps": logps, "entropy": entropy}
    scales = {name: float(x.norm()) for name, x in gold.items()}
    floor, work = gemm_floor(case, 1) if linear else bandwidth_floor(case, passes=1)
    return Group(case, inputs, gold, scales, floor, work)


def gemm_floor(case: Case, products: int) -> tuple[float, tuple[float, str]]:
    """Milliseconds of the first bare products of the loss tokens, and their operations."""
    live = round(case.rows * (1 - case.dead))
    times = product_ms(replace(case, frozen=False), 1 if products == 1 else 3)
    return sum(times[:products]), (2.0 * products * live * case.width * case.vocabulary, "TFLOP/s")


@lru_cache(maxsize=1)
def product_ms(case: Case, number: int) -> list[float]:
    """Of the logits, of their gradient times the head, and times hidden; once for a trained and a frozen head."""
    live, width, vocabulary = round(case.rows * (1 - case.dead)), case.width, case.vocabulary
    options: dict[str, Any] = {"dtype": case.torch_dtype, "device": harness.device()}
    hidden, weight = torch.ones(live, width, **options), torch.ones(vocabulary, width, **options)
    logits = torch.empty(live, vocabulary, **options)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    times = [harness.time_ms(lambda: torch.mm(hidden, weight.T, out=logits), 3)]
    if number > 1:
        times.append(harness.time_ms(lambda: torch.mm(logits, weight, out=d_hidden), 3))
        transposed = d_weight.view(width, vocabulary)
        layouts = (
            (lambda: torch.mm(logits.T, hidden, out=d_weight)),
            (lambda: torch.mm(hidden.T, logits, out=transposed)),
        )
        times.append(min(harness.time_ms(layout, 3) for layout in layouts))  # whichever is the faster one here
    return times


def bandwidth_floor(case: Case, passes: int) -> tuple[float, tuple[float, str]]:
    """Milliseconds to move the logits of the loss tokens `passes` times, at the speed of a copy."""
    live = round(case.rows * (1 - case.dead))
    source = torch.ones(2**26, device=harness.device())
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / harness.time_ms(lambda: target.copy_(source), 5)
    moved = float(passes * live * case.vocabulary * case.torch_dtype.itemsize)
    return moved / copied, (moved, "GB/s")
