"""Supervised fine-tuning: losses of the original, the same update however it is split, and a loss that falls."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared_data import shared_path
from torch.nn.utils.rnn import pad_sequence
from trainer_toys import NUM_SAMPLES, exported, make_config, metrics_of, write_world
from twin_toys import pack

from fastr1.models import load_model
from fastr1.models.family import read_config
from fastr1.models.tinyllava import TinyLlavaProcessor
from fastr1.models.tinyllava.config import parse_config
from fastr1.models.tinyllava.tokenizer import load_tokenizer
from fastr1.schema import DataError, SftSample
from fastr1.training.sft import answer_logps, run_sft

FIXTURE = "fixtures/tinyllava/"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def sft_config(world: Path, output: Path, **changes: Any) -> Any:
    return make_config(world, output, task="sft", **{"data__train_file": str(world / "coldstart.json"), **changes})


def original_samples() -> tuple[list[SftSample], dict[str, Any]]:
    content = json.loads(shared_path(FIXTURE + "sft.json").read_text())
    samples = []
    for row in content["rows"]:
        human, gpt = (turn["value"] for turn in row["conversations"])
        samples.append(SftSample(row["id"], human.replace("<image>", "").strip(), gpt, Path("none.mp4"), row["id"]))
    return samples, content["expected"]


def processor_with_limit(folder: Path, max_length: int | None) -> TinyLlavaProcessor:
    """The processor of a model folder, with another maximum length."""
    config = parse_config(read_config(folder), where="config.json")
    limit = config.max_length if max_length is None else max_length
    return TinyLlavaProcessor(load_tokenizer(folder), dataclasses.replace(config, max_length=limit))


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut at 317 positions"])
def test_losses_match_the_original(cut: bool) -> None:
    samples, expected = original_samples()
    folder = shared_path(FIXTURE + "group")
    limit = expected["truncated"]["tokenizer_model_max_length"] if cut else None
    model, processor = load_model(folder, device="cpu", dtype="float32"), processor_with_limit(folder, None)
    pixels = load_file(shared_path(FIXTURE + "group_expected.safetensors"))["pixel_values"]
    examples = [processor.conversation_ids(s.question, s.answer, origin=s.origin) for s in samples]
    room = [(limit or 10_000) - (len(prompt_ids) - 1 + 16) for prompt_ids, _ in examples]
    answers = [answer_ids[:r] for (_, answer_ids), r in zip(examples, room, strict=True)]  # as the original cuts
    ids = pad_sequence(answers, batch_first=True, padding_value=processor.pad_token_id)
    lengths = torch.tensor([len(answer_ids) for answer_ids in answers])
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    with torch.no_grad():
        prompts = [prompt_ids for prompt_ids, _ in examples]
        tokens = model.visual_tokens([model.encode(pixels)]) * len(prompts)
        micro_batches = pack(model, prompts, tokens, mask, max_tokens=400)
        assert len(micro_batches) > 1
        rows = torch.zeros(len(prompts))
        for micro_batch in micro_batches:
            rows[micro_batch.rows] = -answer_logps(micro_batch, prompts, tokens, ids, model)
    batch_loss = ((rows * lengths).sum() / lengths.sum()).item()  # the original weighs every token alike
    if cut:
        assert batch_loss == pytest.approx(expected["truncated"]["batch_loss"], abs=2e-5)
    else:
        assert rows.tolist() == pytest.approx(expected["row_loss"], abs=2e-5)
        assert batch_loss == pytest.approx(expected["batch_loss"], abs=2e-5)


def test_training_lowers_the_loss_and_leaves_the_tower_alone(world: Path, tmp_path: Path) -> None:
    final = run_sft(sft_config(world, tmp_path, optim__max_steps=30, optim__learning_rate=5e-3))
    losses = [row["loss"] for row in metrics_of(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    before, after = exported(world / "base"), exported(final)
    for name in before:
        if name.startswith("vision_tower"):
            assert torch.equal(after[name], before[name])
    assert final == tmp_path / "final"
    load_model(final)


def test_first_loss_is_the_mean_over_samples(world: Path, tmp_path: Path) -> None:
    run_sft(sft_config(world, tmp_path, optim__max_steps=1, optim__per_device_train_batch_size=NUM_SAMPLES))
    batch = metrics_of(tmp_path)[0]["loss"]
    singles = []
    content = json.loads((world / "coldstart.json").read_text())
    for index in range(NUM_SAMPLES):
        file = tmp_path / f"{index}.json"
        file.write_text(json.dumps([content[index]]))
        output = tmp_path / str(index)
        one = {"optim__max_steps": 1, "optim__per_device_train_batch_size": 1, "data__train_file": str(file)}
        run_sft(sft_config(world, output, **one))
        singles.append(metrics_of(output)[0]["loss"])
    assert max(singles) - min(singles) > 0.05
    assert batch == pytest.approx(sum(singles) / NUM_SAMPLES, abs=1e-5)


@pytest.mark.parametrize("split", [(2, 2), (1, 4)])
def test_result_does_not_depend_on_accumulation(world: Path, tmp_path: Path, split: tuple[int, int]) -> None:
    expected = exported(run_sft(sft_config(world, tmp_path / "whole")))
    per_device, accumulation = split
    parts = {"optim__per_device_train_batch_size": per_device, "optim__gradient_accumulation_steps": accumulation}
    actual = exported(run_sft(sft_config(world, tmp_path / "parts", **parts)))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=2e-6, msg=name)
    for row, expected_row in zip(metrics_of(tmp_path / "parts"), metrics_of(tmp_path / "whole"), strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5)


def test_resume_is_exact(world: Path, tmp_path: Path) -> None:
    expected = exported(run_sft(sft_config(world, tmp_path / "whole", optim__max_steps=4)))
    run_sft(sft_config(world, tmp_path / "halves", run__save_steps=2))
    last = {"run__resume_from_checkpoint": "last", "optim__max_steps": 4}
    actual = exported(run_sft(sft_config(world, tmp_path / "halves", **last)))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert metrics_of(tmp_path / "halves") == metrics_of(tmp_path / "whole")


def test_answer_that_cannot_be_separated(world: Path, tmp_path: Path) -> None:
    content = json.loads((world / "coldstart.json").read_text())
    content[2]["conversations"][1]["value"] = "one ASSISTANT: two"
    (tmp_path / "bad.json").write_text(json.dumps(content))
    bad = {"data__train_file": str(tmp_path / "bad.json"), "optim__per_device_train_batch_size": NUM_SAMPLES - 1}
    with pytest.raises(DataError, match=r"bad\.json\[2\]"):
        run_sft(sft_config(world, tmp_path / "error", **bad))
    skip = {"data__policy": "skip", "data__max_bad_fraction": 0.5, "optim__max_steps": 1}
    run_sft(sft_config(world, tmp_path / "skip", **bad, **skip))
    del content[2]
    (tmp_path / "good.json").write_text(json.dumps(content))
    good = {**bad, **skip, "data__train_file": str(tmp_path / "good.json")}
    run_sft(sft_config(world, tmp_path / "good", **good))
    skipped, without = metrics_of(tmp_path / "skip")[0], metrics_of(tmp_path / "good")[0]
    assert skipped["bad_samples"] == 1
    for name in ("loss", "num_tokens", "grad_norm"):
        assert skipped[name] == pytest.approx(without[name], rel=1e-5)


def test_turn_that_does_not_fit_is_an_error(world: Path) -> None:
    turn = {"question": "What is it?", "answer": "<answer> A </answer>", "origin": "file.json[1]"}
    prompt_ids, answer_ids = processor_with_limit(world / "base", None).conversation_ids(**turn)
    positions = len(prompt_ids) - 1 + 4
    whole = positions + len(answer_ids)
    assert processor_with_limit(world / "base", whole).conversation_ids(**turn)[1].tolist() == answer_ids.tolist()
    for limit in (whole - 1, positions, 1):
        with pytest.raises(DataError, match=rf"file\.json\[1\]: the prompt has {positions} positions, the answer "):
            processor_with_limit(world / "base", limit).conversation_ids(**turn)
