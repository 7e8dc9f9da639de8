"""Memory of a rollout: counted before it is taken, given back before other is, and enough for what comes again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoder_toys import build_text_model, no_videos, params_of, prompts_of
from second_family import SecondProcessor
from torch import nn

from fastr1.models.decoder_stack import describe_decoder
from fastr1.models.family import DecoderLayout
from fastr1.rollout import RolloutEngine, engine, memory
from fastr1.rollout.kv import KeyValueArenas, Room
from fastr1.rollout.memory import RolloutMemoryError, RolloutPlan
from fastr1.rollout.token_step import TokenStep
from fastr1.schema import Rollout

LAYOUT = DecoderLayout(36, 2048, 11008, 16, 2, 128, 151_936, True)


def test_plan_of_the_3b_model() -> None:
    """64 prompts of 612 tokens with 8 completions of up to 512: 36,864 bytes a token."""
    plan = RolloutPlan(LAYOUT, torch.bfloat16, 64, 612, 8, 512)
    assert plan.token_bytes == 36_864
    assert plan.prefix_bytes == 64 * 612 * 36_864
    assert plan.suffix_bytes == 64 * 8 * 512 * 36_864
    assert plan.logits_bytes == 64 * 8 * 151_936 * 8
    plan.check_fits(plan.total_bytes)


def test_what_cannot_fit_says_what_to_lower_and_to_what() -> None:
    plan = RolloutPlan(LAYOUT, torch.bfloat16, 64, 612, 8, 512)
    free = plan.total_bytes // 2
    with pytest.raises(RolloutMemoryError, match="64 prompts of up to 612 tokens") as caught:
        plan.check_fits(free)
    message = str(caught.value)
    for setting, field in (
        ("the number of prompts", "num_prompts"),
        ("grpo.max_completion_length", "completion_length"),
        ("grpo.num_generations", "num_generations"),
    ):
        value = int(message.partition(f"{setting} to ")[2].split()[0])
        replace(plan, **{field: value}).check_fits(free)
        with pytest.raises(RolloutMemoryError):
            replace(plan, **{field: value + 1}).check_fits(free)
    # all that the number of prompts comes from
    for name in ("train_batch_size", "steps_per_generation", "accumulation_steps", "eval_batch_size", "--batch-size"):
        assert name in message
    with pytest.raises(RolloutMemoryError, match="one prompt alone"):
        plan.check_fits(1000)


def test_plan_counts_the_rows_of_guesses() -> None:
    """No more rows than a step may have; fewer guesses are what to lower first."""
    plan = RolloutPlan(LAYOUT, torch.bfloat16, 4, 612, 8, 512, rows_per_completion=9)
    assert plan.logits_bytes == 9 * 32 * 151_936 * 8
    assert replace(plan, num_prompts=16).logits_bytes == 512 * 151_936 * 8
    assert replace(plan, num_prompts=80).logits_bytes == 640 * 151_936 * 8
    free = replace(plan, rows_per_completion=6).total_bytes
    with pytest.raises(RolloutMemoryError, match=r"lower rollout\.num_speculative_tokens to 5 or less, or the number"):
        plan.check_fits(free)
    with pytest.raises(RolloutMemoryError) as caught:
        replace(plan, rows_per_completion=1).check_fits(plan.total_bytes // 20)
    assert "speculative" not in str(caught.value)


def test_engine_refuses_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(engine, "KeyValueArenas", None)
    with pytest.raises(RolloutMemoryError, match="are free"):
        sample(engine_of("llama"), [5])


def test_free_bytes_of_this_machine() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def engine_of(family: str, **options: Any) -> RolloutEngine:
    return RolloutEngine(build_text_model(family), SecondProcessor(), params_of(12), **options)


def sample(sampler: RolloutEngine, lengths: Sequence[int], num_generations: int = 2) -> Rollout:
    return sampler.sample(prompts_of(lengths), no_videos(len(lengths)), num_generations=num_generations)


def joined_bytes(step: TokenStep) -> int:
    """Of the copies that are there now."""
    joined = [side._joined for side in (*step.attention_inputs, *step.mlp_inputs) if side._joined is not None]
    return sum(tensor.nbytes for pair in joined for tensor in pair if tensor is not None)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases and with
@pytest.mark.parametrize("hooked", ["", "layers.0.mlp.up_proj", "layers.1.self_attn.k_proj"])
def test_copies_of_weights_are_counted(family: str, hooked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a rollout holds, no more and no fewer; they are part of what must be free."""
    sampler = engine_of(family)
    if hooked:
        sampler.model.decoder.get_submodule(hooked).register_forward_hook(lambda *_: None)
    counted = describe_decoder(sampler.model.decoder).copied_bytes
    held: list[int] = []
    run = TokenStep.hidden
    monkeypatch.setattr(TokenStep, "hidden", lambda self, rows: held.append(joined_bytes(self)) or run(self, rows))
    sample(sampler, [5])
    assert set(held) == {counted}
    assert counted > 0
    assert sampler.token_step is not None
    assert joined_bytes(sampler.token_step) == 0  # given up with the rollout

    sampler.release()
    needed = RolloutPlan(sampler.model.layout, torch.float32, 1, 5, 2, 12).total_bytes + counted
    monkeypatch.setattr(engine, "free_bytes", lambda device: needed - 1)
    with pytest.raises(RolloutMemoryError, match=r"0\.00 GiB for copies of weights\)"):
        sample(sampler, [5])
    monkeypatch.setattr(engine, "free_bytes", lambda device: needed)
    sample(sampler, [5])


def test_nothing_is_copied_on_a_gpu() -> None:
    model = build_text_model("qwen2")
    stack = describe_decoder(model.decoder)
    for layer in stack.layers:
        for module in (*layer.attention_inputs, *layer.mlp_inputs):
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
    assert stack.copied_bytes == 0


class Arenas(KeyValueArenas):
    """Tells whether the ones before are still there when others are made."""

    made: list[tuple[Room, bool]]
    last: weakref.ref[torch.Tensor] | None

    def __init__(self, layout: DecoderLayout, room: Room, *kind: Any) -> None:
        is_alive = Arenas.last is not None and Arenas.last() is not None
        Arenas.made.append((room, is_alive))
        super().__init__(layout, room, *kind)
        Arenas.last = weakref.ref(self.suffix_k[0])


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> type[Arenas]:
    monkeypatch.setattr(engine, "KeyValueArenas", Arenas)
    Arenas.made, Arenas.last = [], None
    return Arenas


def test_longer_prompts_get_more_room_once_and_the_log_says_so(
    arenas: type[Arenas], caplog: pytest.LogCaptureFixture
) -> None:
    """What was there is freed first; what it held still fits afterwards."""
    sampler = engine_of("qwen3")
    with caplog.at_level(logging.INFO, "fastr1.rollout"):
        for lengths in ([5, 9, 4], [3, 3], [14], [9, 2, 1], [14, 14]):  # as further prompts of oversampling are
            found = sample(sampler, lengths)
            is_anew = lengths in ([5, 9, 4], [14])
            assert (found.metrics["warm_up_seconds"] > 0) == is_anew
    assert arenas.made == [(Room(3, 9, 6, 12), False), (Room(3, 14, 6, 12), False)]
    (record,) = caplog.records
    assert record.getMessage() == (
        "rollout: 1 prompts of up to 14 tokens with 2 completions of up to 12 need more memory than was kept for 3 "
        "prompts of up to 9 tokens with 6 completions of up to 12; it is made anew"
    )


def test_room_for_both_is_not_taken_where_it_would_not_fit(
    arenas: type[Arenas], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = engine_of("qwen3")
    sample(sampler, [5] * 8)
    plan = sampler._plan(Room(1, 200, 2, 12), torch.float32)
    monkeypatch.setattr(engine, "free_bytes", lambda device: plan.total_bytes)
    sample(sampler, [200])
    assert [room for room, _ in arenas.made] == [Room(8, 5, 16, 12), Room(1, 200, 2, 12)]


def test_room_of_another_kind_is_made_anew(arenas: type[Arenas]) -> None:
    sampler = engine_of("qwen3")
    sample(sampler, [5])
    sampler.model.to(torch.bfloat16)
    sample(sampler, [5])
    assert arenas.made == [(Room(1, 5, 2, 12), False)] * 2
