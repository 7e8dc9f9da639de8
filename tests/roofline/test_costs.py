"""FLOPs and bytes of a step: the figures of a 3B model on a large GPU, and torch's own count on a small one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trainer_toys import build_model, build_tokenizer

from fastr1.models import build_model as build_from_config
from fastr1.models.packed_layout import PackedLayout
from fastr1.roofline import (
    Cost,
    GroupWork,
    Machine,
    ModelShape,
    StepLimit,
    StepWork,
    VisualFlops,
    describe_model,
    step_costs,
)
from fastr1.roofline.work import optimizer_bytes

# TinyLLaVA-Video-R1: Qwen2.5-3B, SigLIP-so400m up to its last but one layer, three layers of resampler.
PAPER = {
    "model_type": "tinyllava",
    "connector_type": "groupresampler",
    "group": 16,
    "num_queries": 512,
    "num_resampler_layers": 3,
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
H200 = Machine("H200", 780e12, 4.3e12)  # measured ceilings
VIDEO = (16, 3, 384, 384)
PROMPT = 612
# Eight completions of 300 tokens on average and 512 at most, which is all that is known of them: evenly spread.
LENGTHS = (88, 149, 209, 270, 330, 391, 451, 512)


@pytest.fixture(scope="module")
def paper() -> ModelShape:
    with torch.device("meta"):
        model = build_from_config(PAPER).to(torch.bfloat16)
    model.freeze(["vision_tower"])
    return describe_model(model, PAPER)


def table_of(paper: ModelShape) -> ModelShape:
    """The published table counts the backward pass of the decoder only; that of the connector is 0.75 ms more."""
    return replace(paper, visual=lambda shape: VisualFlops(paper.visual(shape).forward, 0.0))


def paper_step(*, has_reference: bool = True, num_groups: int = 8) -> StepWork:
    return StepWork([GroupWork(PROMPT, LENGTHS, VIDEO)] * num_groups, has_reference)


def test_sizes_of_the_model(paper: ModelShape) -> None:
    assert paper.num_body / 1e9 == pytest.approx(2.775, abs=5e-4)
    assert paper.num_head / 1e9 == pytest.approx(0.311, abs=5e-4)
    assert paper.weight_bytes / 1e9 == pytest.approx(6.17, abs=5e-3)
    assert paper.kv_bytes == 36_864


def test_tower_and_connector_as_torch_counts_them(paper: ModelShape) -> None:
    # 10.6 is both together: the tower alone is 10.27, the connector 0.32.
    assert paper.visual(VIDEO).forward / 1e12 == pytest.approx(10.6, abs=0.05)
    frozen = dict.fromkeys(("trains_tower", "trains_connector"), False)
    counter = type(paper.visual)(PAPER, **frozen)
    with FlopCounterMode(display=False) as tower:
        counter._model.encode(torch.empty(VIDEO, device="meta"))
    connector = paper.visual(VIDEO).forward - tower.get_total_flops()
    assert tower.get_total_flops() / 1e12 == pytest.approx(10.27, abs=5e-3)
    assert connector / 1e12 == pytest.approx(0.32, abs=5e-3)
    # Backward: twice its products, but no gradient of the features, which come from a frozen tower.
    first = 2 * 1152 * 2048 * 16 * 728
    assert paper.visual(VIDEO).backward == pytest.approx(2 * connector - first, rel=1e-3)
    assert counter(VIDEO) == VisualFlops(paper.visual(VIDEO).forward, 0.0)


def test_a_shared_prompt_costs_less_than_half(paper: ModelShape) -> None:
    shared = paper.forward_flops(PROMPT, (300,) * 8).total / 1e12
    unshared = paper.forward_flops(PROMPT, (300,) * 8, shares_prefix=False).total / 1e12
    assert shared == pytest.approx(18.8, abs=0.05)
    # 43.0 with the last token of each completion, which no layer needs to see.
    assert unshared == pytest.approx(42.91, abs=5e-3)
    assert paper.forward_flops(PROMPT, (301,) * 8, shares_prefix=False).total / 1e12 == pytest.approx(43.0, abs=0.05)


def test_floor_of_each_phase_of_the_paper(paper: ModelShape) -> None:
    floor = StepLimit(table_of(paper), H200).floor_seconds(paper_step())
    per_group = {name: 1e3 * seconds / 8 for name, seconds in floor.items()}
    assert per_group == {
        "vision": pytest.approx(13.6, abs=0.05),
        "prefill": pytest.approx(4.4, abs=0.05),
        "decode": pytest.approx(98, abs=0.5),
        "old_policy": 0.0,
        "reference": pytest.approx(24, abs=0.5),
        "train": pytest.approx(72, abs=0.5),
        "optimizer": pytest.approx(2.6, abs=0.05),
    }
    assert sum(per_group.values()) == pytest.approx(215, abs=0.5)
    whole = StepLimit(paper, H200).floor_seconds(paper_step())
    assert 1e3 * (whole["train"] - floor["train"]) / 8 == pytest.approx(0.75, abs=5e-3)


def test_floor_of_the_whole_run_of_the_paper(paper: ModelShape) -> None:
    num_updates = 5_496 / 8
    floor = StepLimit(table_of(paper), H200).floor_seconds(paper_step())
    assert sum(floor.values()) * num_updates / 60 == pytest.approx(19.7, abs=0.05)
    without = StepLimit(table_of(paper), H200).floor_seconds(paper_step(has_reference=False))
    assert without["reference"] == 0
    assert {**without, "reference": floor["reference"]} == floor


def test_a_token_step_of_many_sequences_costs_little_more(paper: ModelShape) -> None:
    def step_ms(num_sequences: int) -> float:
        groups = [GroupWork(PROMPT, (300,) * 8, VIDEO)] * (num_sequences // 8)
        decode = step_costs(paper, StepWork(groups, False))["decode"]
        assert len(decode.flops) == 299  # the first token comes from the prefill
        return 1e3 * decode.floor_seconds(H200) / 299

    assert step_ms(8) == pytest.approx(1.45, abs=5e-3)
    assert step_ms(128) == pytest.approx(1.68, abs=5e-3)
    assert step_ms(128) / step_ms(8) == pytest.approx(1.16, abs=5e-3)


def test_decoding_is_bound_by_memory_up_to_some_two_hundred_sequences(paper: ModelShape) -> None:
    def is_memory_bound(num_sequences: int) -> bool:
        groups = [GroupWork(PROMPT, (300,) * 8, VIDEO)] * (num_sequences // 8)
        decode = step_costs(paper, StepWork(groups, False))["decode"]
        compute, memory = decode.flops / H200.gemm_flops_per_second, decode.bytes / H200.bytes_per_second
        return bool((memory > compute)[149])

    # Weights alone would say 181; keys and values, and attention, move it to 229.
    assert is_memory_bound(224)
    assert not is_memory_bound(240)


def test_decode_counts_who_is_alive(paper: ModelShape) -> None:
    work = StepWork([GroupWork(10, (4, 2), VIDEO), GroupWork(7, (1, 3), VIDEO)], False)
    decode = step_costs(paper, work)["decode"]
    weights, per_pair = paper.num_body + paper.num_head, 4 * 36 * 2048
    # Each step: sequences that go on; completion tokens they see; prompt tokens of groups, and of sequences, going on.
    steps = [(3, 3 * 1, 10 + 7, 2 * 10 + 7), (2, 2 * 2, 10 + 7, 10 + 7), (1, 1 * 3, 10, 10)]
    assert decode.bytes.tolist() == [2 * weights + 36_864 * (own + prompts) for _, own, prompts, _ in steps]
    assert decode.flops.tolist() == [2 * weights * n + per_pair * (own + each) for n, own, _, each in steps]


def test_groups_left_out_are_drawn_and_not_trained(paper: ModelShape) -> None:
    whole, dull = GroupWork(PROMPT, LENGTHS, VIDEO), GroupWork(PROMPT, LENGTHS, VIDEO, trained_lengths=())
    both, one = (step_costs(paper, StepWork(groups, True)) for groups in ([whole, dull], [whole]))
    for name in ("reference", "train"):
        assert both[name].model_flops == one[name].model_flops > 0
    for name in ("vision", "prefill"):
        assert both[name].model_flops == 2 * one[name].model_flops
    nothing = step_costs(paper, StepWork([dull], True))
    assert [float(nothing[name].bytes.sum()) for name in ("reference", "train")] == [0, 0]


def test_checkpointing_costs_one_more_forward_of_the_layers_and_is_no_model_flop(paper: ModelShape) -> None:
    groups = [GroupWork(PROMPT, LENGTHS, VIDEO)]
    plain, again = (step_costs(paper, StepWork(groups, False, is_checkpointed=c))["train"] for c in (False, True))
    head = 2 * paper.num_head * sum(LENGTHS)
    assert again.recomputed == paper.forward_flops(PROMPT, LENGTHS).total - head
    assert again.model_flops == pytest.approx(plain.model_flops)
    assert float(again.flops.sum()) == pytest.approx(plain.model_flops + again.recomputed)


def test_a_frozen_decoder_gets_no_gradient_of_its_weights(paper: ModelShape) -> None:
    forward = paper.forward_flops(PROMPT, LENGTHS)
    assert paper.backward_flops(forward) == 2 * forward.total
    assert replace(paper, trains_decoder=False).backward_flops(forward) == forward.total + forward.attention


def test_bytes_of_the_optimizer(paper: ModelShape) -> None:
    assert (optimizer_bytes(2), optimizer_bytes(4)) == (28, 28)
    assert 28 * paper.num_trainable / 1e9 == pytest.approx(90, abs=0.5)
    alone, shared = (step_costs(paper, replace(paper_step(), num_ranks=n))["optimizer"] for n in (1, 8))
    assert 1e3 * alone.floor_seconds(H200) == pytest.approx(20.8, abs=0.05)
    assert shared.floor_seconds(H200) == pytest.approx(alone.floor_seconds(H200) / 8)


def test_a_phase_is_bound_by_the_slower_of_both_in_each_launch() -> None:
    cost = Cost(torch.tensor([10.0, 1.0]), torch.tensor([1.0, 10.0]))
    assert cost.floor_seconds(Machine("toy", 1.0, 2.0)) == 10 + 5


def test_several_steps_cost_as_many_passes(paper: ModelShape) -> None:
    group = GroupWork(PROMPT, LENGTHS, VIDEO)
    once = step_costs(paper, StepWork([group], has_reference=False))
    twice = step_costs(paper, StepWork([group], False, has_old_policy=True, num_iterations=2, num_steps=4))
    again = paper.visual(VIDEO).forward
    assert float(twice["train"].flops) == 2 * float(once["train"].flops) + again
    assert float(twice["optimizer"].bytes) == 4 * float(once["optimizer"].bytes)
    assert float(once["old_policy"].flops) == 0
    reference = step_costs(paper, StepWork([group], has_reference=True))["reference"]
    assert float(twice["old_policy"].flops) == float(reference.flops)


def test_completions_left_out_of_training_are_only_drawn(paper: ModelShape) -> None:
    some = GroupWork(PROMPT, LENGTHS, VIDEO, trained_lengths=LENGTHS[:2])
    costs = step_costs(paper, StepWork([some], has_reference=False))
    alone = step_costs(paper, StepWork([GroupWork(PROMPT, LENGTHS[:2], VIDEO)], has_reference=False))
    assert float(costs["train"].flops) == float(alone["train"].flops)
    assert float(costs["decode"].flops.sum()) > float(alone["decode"].flops.sum())


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_a_completion_without_tokens_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one token each"):
        GroupWork(PROMPT, lengths, VIDEO)


@pytest.mark.parametrize("shares_prefix", [False, True])
def test_formulas_agree_with_what_torch_counts(shares_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real forward pass, with completions of one length, as padding would count too."""
    # DeepSpeed's stage 3 puts one of its own there, for good, which adds the bias apart.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    model = build_model(build_tokenizer())
    model.config.text._attn_implementation = "eager"  # attention in products that torch counts
    model.packed_attn_implementation = "eager"
    shape = describe_model(model, model.config.raw)
    prompt, completions = torch.tensor([5, 6, -200, 7]), torch.randint(3, 250, (3, 6))
    length, inner = 3 + model.config.num_queries, 5
    forward = shape.forward_flops(length, [6] * 3, shares_prefix=shares_prefix)
    tokens, mask = torch.zeros(model.config.num_queries, 32), torch.ones(3, 6, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        if shares_prefix:
            layout = PackedLayout([length], [[inner] * 3])
            model.project(model.completion_states([prompt], [tokens], completions[:, :-1].flatten(), layout))
        else:
            model.padded_logits([prompt], [tokens], completions, mask)
    counts = counter.get_flop_counts()
    rotation = sum(counts["Qwen2Model.rotary_emb"].values())
    products = {str(op).rpartition(".")[2]: flops for op, flops in counts["Global"].items()}
    assert products["mm"] + products["addmm"] == forward.gemm
    assert set(products) == {"bmm", "mm", "addmm"}
    # Eager attention computes what nobody sees: whole squares, of which the formula has half; packed, everything.
    seen = (1 if shares_prefix else 3) * length**2 / 2 + 3 * inner**2 / 2 + 3 * length * inner
    assert forward.attention == shape.attention_flops(seen)
    computed = (length + 3 * inner) ** 2 if shares_prefix else 3 * (length + inner) ** 2
    assert products["bmm"] - rotation == shape.attention_flops(computed)


def test_backward_agrees_with_what_torch_counts() -> None:
    model = build_model(build_tokenizer())
    model.config.text._attn_implementation = "eager"
    shape = describe_model(model, model.config.raw)
    embeds = torch.randn(1, 9, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = model.project(hidden)
    rotation = sum(counter.get_flop_counts()["Qwen2Model.rotary_emb"].values())
    before = counter.get_total_flops() - rotation
    with counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * before  # the counter starts anew
    gemm = 2 * 9 * (shape.num_body + shape.num_head)
    assert before == gemm + shape.attention_flops(9**2)


def test_trained_parameters_are_counted_where_they_are() -> None:
    model = build_model(build_tokenizer())
    model.freeze(["vision_tower", "language_model"])
    shape = describe_model(model, model.config.raw)
    assert not shape.trains_decoder
    assert shape.num_trainable == sum(p.numel() for p in model.connector.parameters())
    visual = [*model.vision_tower.parameters(), *model.connector.parameters()]
    assert shape.num_visual == sum(p.numel() for p in visual)
    first = visual[-1]
    first.ds_numel = first.numel() + 1000  # what ZeRO-3 says of a parameter whose rest is elsewhere
    assert describe_model(model, model.config.raw).num_trainable == shape.num_trainable + 1000
