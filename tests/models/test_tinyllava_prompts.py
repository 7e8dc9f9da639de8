"""Prompt text, token ids, labels and tokenizer files, against the recorded behaviour of the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from shared_data import shared_path
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from fastr1.config import INSTRUCTION
from fastr1.models.tinyllava.prompts import (
    IMAGE_TOKEN_INDEX,
    SYSTEM,
    build_caption_text,
    build_prompt,
    split_conversation,
    tokenize_with_image,
)
from fastr1.models.tinyllava.tokenizer import load_tokenizer, save_tokenizer
from fastr1.schema import DataError

PROBLEM = "What?\nOptions:\nA. x.\nB. y."


def tiny_folder(folder: Path, **config: Any) -> Path:
    """A tokenizer of single bytes in `folder`, needing no other file: enough for the label and file rules."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    vocab["Ġ<"] = 256
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nĠ <\n", encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {"257": {"content": "<|endoftext|>", **plain}, "258": {"content": "<|pad|>", **plain}},
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 3072,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_folder(tmp_path / "tiny"))


@pytest.fixture(scope="module")
def recorded() -> PreTrainedTokenizerBase:
    return load_tokenizer(shared_path("fixtures/tinyllava/group"))


def test_prompt_matches_recorded_text_and_ids(recorded: PreTrainedTokenizerBase) -> None:
    expected = json.loads(shared_path("fixtures/tinyllava/group_expected.json").read_text())
    tensors = load_file(shared_path("fixtures/tinyllava/group_expected.safetensors"))
    forward = expected["forward"]
    prompt = build_prompt(forward["record"]["problem"], instruction=INSTRUCTION)
    assert prompt == forward["prompt"]
    ids = tokenize_with_image(prompt, recorded)
    assert ids == tensors["prompt_ids"].tolist() == tensors["grpo.prompt_ids"].tolist()
    assert ids.index(IMAGE_TOKEN_INDEX) == forward["image_position"] == 31
    assert recorded(forward["completion"]).input_ids == tensors["completion_ids"].tolist()


def test_sft_examples_match_recorded_ids_and_labels(recorded: PreTrainedTokenizerBase) -> None:
    rows = json.loads(shared_path("fixtures/tinyllava/sft.json").read_text())["rows"]
    assert len(rows) > 1
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        prompt = build_prompt(question, instruction="")
        assert row["prompt"] == f"{prompt} {answer}<|endoftext|>"
        prompt_ids, answer_ids = split_conversation(question, answer, recorded)
        assert prompt_ids + answer_ids == row["input_ids"]
        assert [-100] * len(prompt_ids) + answer_ids == row["labels"]


@pytest.mark.parametrize(
    ("problem", "instruction", "user_turn"),
    [
        ("Q?", "Do.", "Q? Do."),
        ("  Q?\n", "Do.", "Q?\n Do."),
        ("<image>\n Q?", "Do.", "Q? Do."),
        ("a<image>b", "Do <image>.", "ab Do ."),
        ("Q? ", "", "Q?"),
    ],
)
def test_prompt_text(problem: str, instruction: str, user_turn: str) -> None:
    assert build_prompt(problem, instruction=instruction) == f"{SYSTEM} USER: <image>\n{user_turn} ASSISTANT:"


def test_caption_text() -> None:
    assert build_caption_text("a cat") == "<image>a cat\n"


def test_pieces_around_the_placeholder_are_tokenised_separately(tiny: PreTrainedTokenizerBase) -> None:
    space_tag = tiny(" <").input_ids
    assert len(space_tag) == 1
    assert tokenize_with_image(" <", tiny) == space_tag
    separate = [*tiny(" ").input_ids, IMAGE_TOKEN_INDEX, *tiny("<").input_ids]
    assert tokenize_with_image(" <image><", tiny) == separate
    assert tokenize_with_image("<image>", tiny) == [IMAGE_TOKEN_INDEX]
    assert tokenize_with_image("", tiny) == []


def test_conversation_is_split_behind_the_prompt(tiny: PreTrainedTokenizerBase) -> None:
    prompt_ids, answer_ids = split_conversation("Q?", "<answer> é\n5 </answer>", tiny)
    assert prompt_ids == tokenize_with_image(build_prompt("Q?", instruction=""), tiny)
    assert tiny.decode(answer_ids) == " <answer> é\n5 </answer><|endoftext|>"
    assert prompt_ids.count(IMAGE_TOKEN_INDEX) == 1


@pytest.mark.parametrize("answer", ["5", "yes", "\nyes", "  yes", "<think>"])
def test_border_follows_the_prompt_for_any_first_character(tiny: PreTrainedTokenizerBase, answer: str) -> None:
    assert tiny.decode(split_conversation("Q?", answer, tiny)[1]) == f" {answer}<|endoftext|>"


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Q?", "one<|endoftext|>two", "holds '<|endoftext|>'"),
        ("Q<|endoftext|>?", "one", "holds '<|endoftext|>'"),
        ("Q?", "USER: more ASSISTANT: two", "holds ' ASSISTANT: '"),
        ("Say ASSISTANT: now", "one", "holds ' ASSISTANT: '"),
        ("Q?", "see <image>", "holds '<image>'"),
    ],
)
def test_untrustworthy_border_is_reported(
    tiny: PreTrainedTokenizerBase, question: str, answer: str, reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        split_conversation(question, answer, tiny, origin="rows.json[3]")
    assert str(caught.value).startswith("rows.json[3]: ")
    assert reason in str(caught.value)


TEXTS = [
    build_prompt(PROBLEM, instruction=INSTRUCTION).replace("<image>", ""),
    " <think> x </think> <answer> C </answer><|endoftext|>",
    "naïve  café\n\n123\t…",
    "",
]


def assert_same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    assert [first(text).input_ids for text in TEXTS] == [second(text).input_ids for text in TEXTS]
    assert first.get_vocab() == second.get_vocab()
    for name in ("eos_token_id", "pad_token_id", "bos_token", "unk_token", "model_max_length", "padding_side"):
        assert getattr(first, name) == getattr(second, name), name
    ids = first(TEXTS[1]).input_ids
    assert first.decode(ids, skip_special_tokens=True) == second.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("source", ["tiny", "recorded"])
def test_saved_tokenizer_round_trips(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    original = request.getfixturevalue(source)
    save_tokenizer(original, tmp_path / "all")
    assert_same_tokenizer(original, load_tokenizer(tmp_path / "all"))
    # each of the two vocabulary forms is complete on its own
    shutil.copytree(tmp_path / "all", tmp_path / "slow", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert_same_tokenizer(original, load_tokenizer(tmp_path / "slow"))
    shutil.copytree(tmp_path / "all", tmp_path / "fast", ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    assert_same_tokenizer(original, load_tokenizer(tmp_path / "fast"))


def test_saved_files_equal_the_recorded_ones(recorded: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_tokenizer(recorded, tmp_path)
    source = shared_path("fixtures/tinyllava/group")
    for name in ("vocab.json", "added_tokens.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((source / name).read_text()), name
    special = json.loads((source / "special_tokens_map.json").read_text())
    special["unk_token"] = special["eos_token"]  # recorded in the short form "<|endoftext|>"
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == special
    assert (tmp_path / "merges.txt").read_text().split() == (source / "merges.txt").read_text().split()
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    expected = json.loads((source / "tokenizer_config.json").read_text())
    assert written == {key: value for key, value in expected.items() if key != "extra_special_tokens"}


def test_chat_template_survives_saving(tmp_path: Path) -> None:
    original = load_tokenizer(tiny_folder(tmp_path / "a", chat_template="{{ messages }}"))
    save_tokenizer(original, tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").chat_template == original.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token": "<|pad|>"}, "pad_token is '<|pad|>'"),
        ({"eos_token": "<|pad|>"}, "eos_token is '<|pad|>'"),
        ({"bos_token": "<|pad|>"}, "bos_token is '<|pad|>'"),
        ({"tokenizer_class": "LlamaTokenizer"}, "names 'LlamaTokenizer'"),
    ],
)
def test_other_special_tokens_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(tiny_folder(tmp_path / "x", **config))
    assert message in str(caught.value)
    assert str(tmp_path / "x") in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    folder = tiny_folder(tmp_path / "x")
    (folder / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"neither vocab.json with merges.txt nor tokenizer.json"):
        load_tokenizer(folder)
    (tiny_folder(tmp_path / "y") / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        load_tokenizer(tmp_path / "y")


def test_a_tokenizer_that_adds_tokens_is_refused(tmp_path: Path, tiny: PreTrainedTokenizerBase) -> None:
    save_tokenizer(tiny, tmp_path / "x")
    file = tmp_path / "x" / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    assert isinstance(backend.model, BPE)
    backend.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 258)])
    backend.save(str(file))
    with pytest.raises(DataError, match=r"adds \[258\] to every text"):
        load_tokenizer(tmp_path / "x")
