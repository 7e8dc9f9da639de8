"""The seam of the model families: a second family trains and is evaluated through the code that knows only the seam."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import second_family
import torch
from torch.testing import assert_close
from trainer_toys import INSTRUCTION, NUM_SAMPLES, build_model, build_tokenizer, make_config, metrics_of, write_world
from twin_toys import pack, packed_logits, padded_logits

from fastr1.evaluation.chat import chat
from fastr1.evaluation.checkpoint import evaluate_checkpoint
from fastr1.models import ModelFileError, Processor, VideoLanguageModel, load_model, load_processor, save_model
from fastr1.models.family import FAMILIES
from fastr1.models.tinyllava import TinyLlavaProcessor
from fastr1.reporting.run_log import read_rows
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.training.grpo import run_grpo
from fastr1.training.sft import run_sft

Pair = tuple[VideoLanguageModel, Processor]


@pytest.fixture(scope="module", autouse=True)
def _second_family() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "second", "second_family")
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy videos and questions with a model of the second family, whose end tokens are likely."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    model = second_family.build_model(second_family.CONFIG)
    processor = second_family.SecondProcessor()
    with torch.no_grad():
        model.language_model.lm_head.weight[list(processor.end_token_ids)] *= 4
    save_model(folder / "second", model, processor)
    return folder


@pytest.fixture(params=["tinyllava", "second"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """A model of each family with its processor."""
    if request.param == "second":
        return second_family.build_model(second_family.CONFIG).eval(), second_family.SecondProcessor()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    return model, TinyLlavaProcessor(tokenizer, model.config)


def ragged_batch(pair: Pair) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, two completions each, one of a single token."""
    _, processor = pair
    generator = torch.Generator().manual_seed(0)
    prompts = [processor.prompt_ids("Why? " * n, instruction="Say.") for n in (1, 3, 2)]
    shape = processor.blank_pixels(4).shape
    videos = [torch.randn(shape, generator=generator) for _ in prompts]
    completions = torch.randint(3, 250, (6, 9), generator=generator)
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4, 9, 7, 2])[:, None]
    return prompts, videos, completions, mask


@pytest.mark.parametrize("divides", [False, True], ids=["one micro-batch", "divided groups"])
def test_packed_forward_equals_the_padded_one_in_values_and_all_gradients(pair: Pair, divides: bool) -> None:
    model = pair[0].double()
    prompts, videos, completions, mask = ragged_batch(pair)
    tokens = [t.detach() for t in model.visual_tokens(videos)]
    max_tokens = max(model.prompt_lengths(prompts, tokens)) + 8 if divides else 10**6
    times = Counter(i for micro_batch in pack(model, prompts, tokens, mask, max_tokens) for i in micro_batch.prompts)
    assert (times[1] == 2) == divides
    results = []
    for forward in (partial(packed_logits, max_tokens=max_tokens), padded_logits):
        model.zero_grad()
        logits = forward(model, prompts, videos, completions, mask)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
        (logits * weights * mask[..., None]).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits[mask].detach(), grads))
    (packed, packed_grads), (plain, plain_grads) = results
    assert_close(packed, plain, atol=1e-9, rtol=1e-7)
    assert packed_grads.keys() == plain_grads.keys()
    assert {name.split(".")[0] for name in packed_grads} == {"vision_tower", "connector", "language_model"}
    for name, expected in plain_grads.items():
        scale = max(expected.abs().max().item(), 1)
        assert_close(packed_grads[name], expected, atol=1e-6 * scale, rtol=1e-6, msg=lambda m, n=name: n + m)


@torch.no_grad()
def test_left_padding_does_not_change_a_prompt(pair: Pair) -> None:
    prompts, videos, completions, mask = ragged_batch(pair)
    together = padded_logits(pair[0], prompts, videos, completions, mask)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        alone = padded_logits(pair[0], prompts[i : i + 1], videos[i : i + 1], completions[rows], mask[rows])
        assert_close(together[rows][mask[rows]], alone[mask[rows]], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o007, 0o660)])
def test_saved_files_are_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    model = build_model(build_tokenizer())
    processor = TinyLlavaProcessor(build_tokenizer(), model.config)
    before = os.umask(umask)
    try:
        for _ in range(2):  # also over the files of an earlier save, and what a killed one left
            save_model(tmp_path, model, processor)
            (tmp_path / "model.safetensors.partial").touch(0o600)
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.suffix != ".partial"}
    assert "model.safetensors" in found
    assert found == dict.fromkeys(found, mode)


def test_saved_folder_gives_the_same_model_and_prompts(pair: Pair, tmp_path: Path) -> None:
    model, processor = pair
    save_model(tmp_path, model, processor)
    again, same = load_model(tmp_path, device="cpu", dtype="float32"), load_processor(tmp_path)
    assert type(again) is type(model)
    assert again.layout == model.layout
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for text in ("What is it?", "naïve  café\n"):
        assert torch.equal(same.prompt_ids(text, instruction="Do."), processor.prompt_ids(text, instruction="Do."))
    assert same.end_token_ids == processor.end_token_ids
    save_model(tmp_path / "half", model, processor, dtype=torch.bfloat16)
    assert load_model(tmp_path / "half", device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_layout_agrees_with_the_parameters(pair: Pair) -> None:
    model, layout = pair[0], pair[0].layout
    assert len(model.decoder.layers) == layout.num_layers
    attention = model.decoder.layers[0].self_attn
    assert attention.q_proj.weight.shape == (layout.num_heads * layout.head_dim, layout.hidden_size)
    assert attention.k_proj.weight.shape == (layout.num_kv_heads * layout.head_dim, layout.hidden_size)
    assert model.decoder.layers[0].mlp.up_proj.weight.shape == (layout.intermediate_size, layout.hidden_size)
    assert model.project(torch.zeros(1, layout.hidden_size)).shape == (1, layout.vocab_size)
    head, embedding = model.language_model.lm_head.weight, model.decoder.embed_tokens.weight
    assert (head is embedding) == layout.is_head_tied


def test_completion_ends_with_any_end_token() -> None:
    model, processor = second_family.build_model(second_family.CONFIG).eval(), second_family.SecondProcessor()
    with torch.no_grad():
        model.language_model.lm_head.weight[list(processor.end_token_ids)] *= 4
    prompt, tokens = processor.prompt_ids("Why?"), model.visual_tokens([processor.blank_pixels(2)])
    rollout = sample_completions(model, processor, [prompt], tokens, SamplingParams(40), num_generations=64)
    last = {ids[mask][-1].item() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)}
    assert set(processor.end_token_ids) <= last
    for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True):
        assert not torch.isin(ids[mask][:-1], torch.tensor(processor.end_token_ids)).any()
    assert not any(end in text for text in rollout.texts for end in second_family.ENDS)


def test_second_family_trains_with_grpo_and_is_evaluated(world: Path, tmp_path: Path) -> None:
    model = {"model__path": str(world / "second")}
    evaluation = {"run__eval_steps": 2, "data__eval_file": str(world / "questions.jsonl")}
    final = run_grpo(make_config(world, tmp_path / "run", grpo__beta=0.1, **model, **evaluation))
    first, second = metrics_of(tmp_path / "run")
    assert abs(first["kl"]) < 1e-6 < second["kl"]
    assert second["sampler_gap"] < 1e-5
    assert second["eval/num_questions"] == NUM_SAMPLES
    before, after = (load_model(folder, device="cpu", dtype="float32") for folder in (world / "second", final))
    assert torch.equal(after.vision_tower.weight, before.vision_tower.weight)  # frozen
    assert not torch.equal(after.connector.weight, before.connector.weight)
    assert read_rows(tmp_path / "run" / "rollouts.jsonl")[0]["video"].endswith(".mp4")
    files = {"model_path": final, "data_file": world / "questions.jsonl", "video_root": world, "device": "cpu"}
    summary = evaluate_checkpoint(**files, num_frames=4, max_completion_length=6, instruction=INSTRUCTION)
    assert summary["accuracy"] == second["eval/accuracy"]
    assert chat(final, world / "0.mp4", "Why?", num_frames=4, max_completion_length=4, device="cpu").text is not None


def test_second_family_learns_answers(world: Path, tmp_path: Path) -> None:
    settings = {"task": "sft", "data__train_file": str(world / "coldstart.json"), "optim__learning_rate": 1e-2}
    run_sft(make_config(world, tmp_path, model__path=str(world / "second"), optim__max_steps=25, **settings))
    losses = [row["loss"] for row in metrics_of(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


def test_unknown_family_is_refused_with_those_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    for load in (load_model, load_processor):
        with pytest.raises(
            ModelFileError, match=r"config\.json: model_type is 'llava'; known are 'tinyllava', 'second'"
        ):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["tinyllava"]}))
    with pytest.raises(ModelFileError, match=r"model_type is \['tinyllava'\]"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", "\xff"])
def test_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelFileError, match=r"config\.json: .*copy the file again"):
        load_model(tmp_path)
