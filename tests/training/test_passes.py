"""The equivalence of record: packed passes give the loss, gradients and log-probabilities of the padded forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import second_family
import torch
from torch.testing import assert_close
from trainer_toys import build_model, build_tokenizer, problem
from twin_toys import padded_logits

from fastr1.models import Processor, VideoLanguageModel
from fastr1.models.tinyllava import TinyLlavaProcessor
from fastr1.schema import Batch, Rollout, Sample, Scored
from fastr1.training.packing import keep_step
from fastr1.training.passes import compute_logps, compute_loss, plan_steps
from fastr1.training.visual import VisualTokens
from fastr1_kernels import LOSSES, GRPOOutput, LossOptions, grpo_loss, selective_log_softmax

WIDTH = 9
EVERYTHING = 10**6
GROUPS = {"one group of one": [[5]], "ragged": [[9, 1, 4], [1, 1, 1], [2, 7, 9]], "two": [[3, 1], [6, 9]]}


class PlainRanks:
    """Verbs of `DistributedModel` without DeepSpeed, in one process."""

    def __init__(self, model: VideoLanguageModel) -> None:
        self.model = model
        self.num_backward = 0

    def __call__(self, compute: Callable[[VideoLanguageModel], Any]) -> Any:
        return self.model(compute)

    def backward_from(self, outputs: Any, grads: Any) -> None:
        self.num_backward += 1
        torch.autograd.backward(outputs, grads)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture(params=["tinyllava", "second"])
def pair(request: pytest.FixtureRequest) -> tuple[VideoLanguageModel, Processor]:
    """A model of each family in float64, its tower trained too."""
    if request.param == "second":
        model, processor = second_family.build_model(second_family.CONFIG), second_family.SecondProcessor()
    else:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        processor = TinyLlavaProcessor(tokenizer, model.config)
    return model.double().train(), processor


def make_batch(model: VideoLanguageModel, processor: Processor, groups: list[list[int]]) -> tuple[Batch, Any]:
    """Completions of these lengths behind prompts of different lengths, and the videos."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length for group in groups for length in group]
    prompts = [processor.prompt_ids("Why? " * (1 + i), instruction="Say.") for i in range(len(groups))]
    videos = [torch.randn(processor.blank_pixels(4).shape, generator=generator) for _ in groups]
    shape = (len(lengths), WIDTH)
    mask = torch.arange(WIDTH)[None] < torch.tensor(lengths)[:, None]
    rollout = Rollout(
        torch.randint(3, 250, shape, generator=generator),
        mask,
        -torch.rand(shape, generator=generator).double().masked_fill(~mask, 0.0),
        torch.zeros(shape),
        torch.zeros(len(lengths), dtype=torch.bool),
        [""] * len(lengths),
    )
    return Batch(
        samples=[Sample(str(i), problem(i), "ABC", "A", Path("none"), "toy") for i in range(len(groups))],
        prompt_ids=prompts,
        prompt_lengths=model.prompt_lengths(prompts, [t.detach() for t in model.visual_tokens(videos)]),
        pixel_shapes=[tuple(video.shape) for video in videos],
        is_valid=[True] * len(groups),
        rollout=rollout,
        lengths=lengths,
        scored=Scored([0.0] * len(lengths), {}),
        advantages=torch.randn(len(lengths), generator=generator),
        is_counted=[True] * len(lengths),
        has_signal=[True] * len(lengths),
    ), videos


def tight(batch: Batch) -> int:
    """Tokens of the longest prompt with the longest completion: that prompt's group is divided, if it has others."""
    return max(batch.prompt_lengths) + WIDTH - 1


def gradients(model: VideoLanguageModel) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def packed_update(
    model: VideoLanguageModel, batch: Batch, videos: Any, budget: int, **settings: Any
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor, PlainRanks]:
    """Loss, gradients and log-probabilities (B·G·T,) of the packed step."""
    ranks = PlainRanks(model)
    visual = VisualTokens(ranks, videos)  # type: ignore[arg-type]
    (step,) = plan_steps(batch, ranks, prompts_per_step=len(batch.samples), max_tokens=budget)
    loss, logps = 0.0, torch.zeros(batch.rollout.completion_ids.numel(), dtype=torch.float64)
    for micro_batch in step.micro_batches:
        out = ranks(lambda m, mb=micro_batch: compute_loss(m, batch, mb, visual.tokens, check_values=True, **settings))
        out.loss.backward()
        loss += out.loss.item()
        if not micro_batch.is_blank:
            logps[micro_batch.places(WIDTH, torch.device("cpu"))] = out.logps.double()
    visual.backward()
    return loss, gradients(model), logps, ranks


def padded_update(
    model: VideoLanguageModel, batch: Batch, videos: Any, *, normalizer: float, options: LossOptions
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """The same by one padded, unshared forward and the loss of the whole logits."""
    rollout = batch.rollout
    logits = padded_logits(model, batch.prompt_ids, videos, rollout.completion_ids, rollout.completion_mask)
    given = {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps}
    out = grpo_loss(
        logits,
        rollout.completion_ids,
        mask=rollout.completion_mask,
        advantages=batch.advantages,
        normalizer=normalizer,
        options=options,
        **{name: None if x is None else x.view_as(rollout.completion_ids) for name, x in given.items()},
    )
    out.loss.backward()
    return out.loss.item(), gradients(model), out.logps.double().flatten()


def assert_equal_updates(actual: Any, expected: Any) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-9)
    assert_close(actual[2], expected[2], atol=1e-8, rtol=1e-7)
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        atol = 2e-6 * max(value.abs().max().item(), 1e-2)
        assert_close(actual[1][name], value, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def options_of(loss_type: str) -> LossOptions:
    needs = {"epsilon_high": 5.0, "importance_sampling_level": "sequence", "max_completion_length": WIDTH}
    return LossOptions(
        loss_type=loss_type, beta=0.1, **{k: v for k, v in needs.items() if k in LOSSES[loss_type].needs}
    )


@pytest.mark.parametrize("is_tight", [False, True], ids=["one micro-batch", "divided groups"])
@pytest.mark.parametrize("name", GROUPS)
def test_ragged_groups(pair: Any, name: str, is_tight: bool) -> None:
    model, processor = pair
    batch, videos = make_batch(model, processor, GROUPS[name])
    budget = tight(batch) if is_tight else EVERYTHING
    (step,) = plan_steps(batch, PlainRanks(model), prompts_per_step=len(batch.samples), max_tokens=budget)
    times = Counter(prompt for micro_batch in step.micro_batches for prompt in micro_batch.prompts)
    assert (max(times.values()) > 1) == (is_tight and len(batch.lengths) > 1)
    batch.ref_logps = -torch.rand(batch.rollout.completion_ids.numel()).double()
    settings = {"normalizer": 7.0, "options": options_of("dapo")}
    *packed, ranks = packed_update(model, batch, videos, budget, corrects_sampler=False, **settings)
    assert ranks.num_backward == 1
    assert_equal_updates(packed, padded_update(model, batch, videos, **settings))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss(pair: Any, loss_type: str) -> None:
    model, processor = pair
    batch, videos = make_batch(model, processor, GROUPS["ragged"])
    number = batch.rollout.completion_ids.numel()
    batch.ref_logps = -torch.rand(number).double()
    if not LOSSES[loss_type].is_on_policy:
        batch.old_logps = compute_logps_of(model, batch, videos) + 0.1 * torch.randn(number).double()
    settings = {"normalizer": 3.0, "options": options_of(loss_type)}
    *packed, _ = packed_update(model, batch, videos, tight(batch), corrects_sampler=False, **settings)
    assert_equal_updates(packed, padded_update(model, batch, videos, **settings))


@pytest.mark.parametrize("frozen", [(), ("vision_tower",), ("vision_tower", "connector"), ("language_model",)])
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "checkpointed"])
def test_frozen_parts_and_gradient_checkpointing(pair: Any, frozen: tuple[str, ...], recomputes: bool) -> None:
    model, processor = pair
    model.freeze(frozen)
    if recomputes:
        model.enable_gradient_checkpointing()
    batch, videos = make_batch(model, processor, GROUPS["ragged"])
    if "vision_tower" in frozen:
        videos = [model.encode(video).detach() for video in videos]
    settings = {"normalizer": 7.0, "options": LossOptions()}
    *packed, _ = packed_update(model, batch, videos, tight(batch), corrects_sampler=False, **settings)
    trained = {"vision_tower", "connector", "language_model"} - set(frozen)
    assert {name.split(".")[0] for name in packed[1]} == trained
    assert_equal_updates(packed, padded_update(model, batch, videos, **settings))


def compute_logps_of(model: VideoLanguageModel, batch: Batch, videos: Any, temperature: float = 1.0) -> torch.Tensor:
    tokens = [t.detach() for t in model.visual_tokens(videos)]
    (step,) = plan_steps(batch, PlainRanks(model), prompts_per_step=len(batch.samples), max_tokens=tight(batch))
    return compute_logps(model, batch, step.micro_batches, tokens, temperature=temperature, check_values=True).double()


def test_log_probabilities(pair: Any) -> None:
    model, processor = pair
    batch, videos = make_batch(model, processor, GROUPS["ragged"])
    rollout = batch.rollout
    with torch.no_grad():
        logits = padded_logits(model, batch.prompt_ids, videos, rollout.completion_ids, rollout.completion_mask)
    expected = selective_log_softmax(logits, rollout.completion_ids, temperature=0.7)
    mask = rollout.completion_mask
    actual = compute_logps_of(model, batch, videos, 0.7).view_as(mask)
    assert_close(actual[mask], expected[mask].double(), atol=2e-6, rtol=0)
    assert (actual[~mask] == 0).all()


def test_completions_without_signal_are_not_forwarded_and_change_nothing(pair: Any) -> None:
    model, processor = pair
    batch, videos = make_batch(model, processor, GROUPS["ragged"])
    batch.advantages[[0, 3, 4, 5]] = 0.0
    settings = {"normalizer": 7.0, "options": LossOptions()}
    expected = padded_update(model, batch, videos, **settings)
    batch.has_signal = [row not in (0, 3, 4, 5) for row in range(9)]
    (step,) = plan_steps(batch, PlainRanks(model), prompts_per_step=3, max_tokens=EVERYTHING)
    assert [(b.prompts, b.groups) for b in step.micro_batches] == [((0, 2), ((1, 2), (6, 7, 8)))]
    assert (step.num_loss_tokens, step.num_sequences) == (sum(batch.lengths), 9)
    *packed, _ = packed_update(model, batch, videos, tight(batch), corrects_sampler=False, **settings)
    forwarded = torch.tensor(batch.has_signal)[:, None] & batch.rollout.completion_mask
    expected = (*expected[:2], expected[2] * forwarded.flatten())
    assert_equal_updates(packed, expected)


def test_update_without_signal_is_blank_and_has_gradients_of_zero(pair: Any) -> None:
    model, processor = pair
    batch, videos = make_batch(model, processor, GROUPS["two"])
    batch.has_signal = [False] * 4
    loss, grads, _, _ = packed_update(
        model, batch, videos, EVERYTHING, corrects_sampler=False, normalizer=1.0, options=LossOptions()
    )
    assert loss == 0
    assert {name.split(".")[0] for name in grads} == {"vision_tower", "connector", "language_model"}
    assert all((grad == 0).all() for grad in grads.values())


def test_blank_micro_batches_add_nothing(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair
    batch, videos = make_batch(model, processor, GROUPS["two"])
    settings: dict[str, Any] = {"normalizer": 7.0, "options": LossOptions(), "corrects_sampler": False}
    alone = packed_update(model, batch, videos, EVERYTHING, **settings)
    other_rank = SimpleNamespace(gather_objects=lambda value: [value, 3])
    monkeypatch.setattr("fastr1.training.passes.keep_step", lambda _, *args: keep_step(other_rank, *args))
    (step,) = plan_steps(batch, PlainRanks(model), prompts_per_step=2, max_tokens=EVERYTHING)
    assert [micro_batch.is_blank for micro_batch in step.micro_batches] == [False, True, True]
    assert_equal_updates(packed_update(model, batch, videos, EVERYTHING, **settings), alone)


def test_sampler_log_probabilities_reach_the_loss_only_where_asked(pair: Any) -> None:
    model, processor = pair
    batch, videos = make_batch(model, processor, GROUPS["ragged"])
    options = LossOptions(sampler_correction="token_truncate", sampler_cap=1.5)
    plain, corrected = (
        packed_update(model, batch, videos, EVERYTHING, corrects_sampler=on, normalizer=7.0, options=options)
        for on in (False, True)
    )
    rollout = batch.rollout
    logits = padded_logits(model, batch.prompt_ids, videos, rollout.completion_ids, rollout.completion_mask)
    out: GRPOOutput = grpo_loss(
        logits,
        rollout.completion_ids,
        mask=rollout.completion_mask,
        advantages=batch.advantages,
        sampler_logps=rollout.sampler_logps,
        normalizer=7.0,
        options=options,
    )
    out.loss.backward()
    assert_equal_updates(corrected, (out.loss.item(), gradients(model), plain[2]))
    assert abs(plain[0] - corrected[0]) > 1e-3
