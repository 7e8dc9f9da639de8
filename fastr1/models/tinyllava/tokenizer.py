"""Load and save the Qwen2 tokenizer of a checkpoint folder, from local files only.

Saving writes the files that slow tokenizers of transformers 4 read (vocab.json, merges.txt, added_tokens.json,
special_tokens_map.json, tokenizer_config.json) next to tokenizer.json, so that older tools read the same folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from fastr1.schema import DataError

END_OF_TEXT = "<|endoftext|>"
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The Qwen2 tokenizer in folder `path`: no beginning token, end-of-sequence = padding = `<|endoftext|>`.

    Raises:
        DataError: the folder or its tokenizer files are missing, another tokenizer class is named, or the special
            tokens are not as above. Nothing is corrected silently, because ids of padding and end enter the loss mask.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"tokenizer folder {folder} does not exist; set model.path to a checkpoint folder")
    has_slow_files = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_slow_files and not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{folder} holds neither vocab.json with merges.txt nor tokenizer.json; copy the tokenizer files of the "
            "checkpoint there"
        )
    named = _read_config(folder).get("tokenizer_class", "Qwen2Tokenizer")
    if named not in _CLASSES:
        raise DataError(
            f"{folder}/tokenizer_config.json names {named!r}; this model family uses {' or '.join(_CLASSES)}"
        )
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    _check(tokenizer, folder)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Write the tokenizer files into folder `path` (created if needed), readable by transformers 4 and 5.

    Raises:
        DataError: the tokenizer has no byte-pair vocabulary to write as vocab.json and merges.txt.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE):
        raise DataError(f"{type(tokenizer).__name__} holds no byte-pair vocabulary; use the result of load_tokenizer")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))  # vocab.json and merges.txt
    _write_json(folder / "added_tokens.json", tokenizer.get_added_vocab())
    _write_json(folder / "special_tokens_map.json", _special_tokens_map(tokenizer))
    _write_json(folder / "tokenizer_config.json", _config(tokenizer))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}); copy it from the checkpoint again") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return config


def _check(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    for name in ("eos_token", "pad_token"):
        value = getattr(tokenizer, name)
        if value != END_OF_TEXT:
            raise DataError(
                f"{folder}: {name} is {value!r}; set it to {END_OF_TEXT!r} in tokenizer_config.json "
                "(the base tokenizer, not the chat one)"
            )
    if tokenizer.bos_token is not None:
        raise DataError(f"{folder}: bos_token is {tokenizer.bos_token!r}; set it to null in tokenizer_config.json")
    added = tokenizer("").input_ids
    if added:
        raise DataError(f"{folder}: the tokenizer adds {added} to every text; remove its post-processor")
    ids = tokenizer(END_OF_TEXT).input_ids
    if ids != [tokenizer.eos_token_id]:
        raise DataError(f"{folder}: {END_OF_TEXT!r} becomes {ids}; list it in added_tokens.json")


def _special_tokens_map(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    fields = {token.content: _fields(token) for token in tokenizer.added_tokens_decoder.values()}
    named = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token", "unk_token")}
    return {
        "additional_special_tokens": _other_special_tokens(tokenizer),
        **{name: fields[token] for name, token in named.items() if token is not None},
    }


def _other_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens without a role of their own, in order of id."""
    roles = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token}
    ordered = sorted(tokenizer.added_tokens_decoder.items())
    return [token.content for _, token in ordered if token.special and token.content not in roles]


def _config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ordered = sorted(tokenizer.added_tokens_decoder.items())
    config = {
        "added_tokens_decoder": {str(i): {**_fields(token), "special": token.special} for i, token in ordered},
        "additional_special_tokens": _other_special_tokens(tokenizer),
        "bos_token": tokenizer.bos_token,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.eos_token,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "padding_side": tokenizer.padding_side,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": tokenizer.unk_token,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config


def _fields(token: AddedToken) -> dict[str, Any]:
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
    }


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
