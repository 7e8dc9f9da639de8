"""The demo's base model before training: its tokenizer and its architecture at a few million parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from fastr1 import models
from fastr1.config import INSTRUCTION
from fastr1.demo.scenes import COLOURS, COUNTS, DIRECTIONS, KINDS, ask, describe, sample_scene, worked_answer
from fastr1.models.tinyllava.prompts import SYSTEM, build_caption_text, build_prompt

IMAGE_SIZE = 48
TAGS = ("note", "box", "text", "say", "pick", "plan", "mark", "look", "see", "list", "work", "sum")


def build_tokenizer(seed: int, vocab_size: int = 768) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with Qwen2's splitting rules, trained on prompts, captions and options of the demo."""
    rng = np.random.default_rng(seed)
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(_corpus(rng), trainer)
    vocab = bpe.get_vocab()
    merges: Any = [tuple(pair) for pair in _merges(bpe)]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.model_max_length = 1024
    return tokenizer


def _merges(bpe: Tokenizer) -> list[list[str]]:
    return json.loads(bpe.to_str())["model"]["merges"]


def _corpus(rng: np.random.Generator) -> Iterator[str]:
    for i in range(1000):
        scene = sample_scene(rng, KINDS[i % len(KINDS)])
        question = ask(scene, rng)
        yield build_prompt(question.problem, instruction=INSTRUCTION)
        yield f" {worked_answer(scene, question.letter)}"
        yield build_caption_text(describe(scene))
    yield from (SYSTEM, *(f" <{tag}> </{tag}>" * 100 for tag in TAGS), " ".join([*COLOURS, *COUNTS, *DIRECTIONS]))


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> models.VideoLanguageModel:
    """The randomly initialised model, 3.5 million parameters."""
    eos = tokenizer.eos_token_id
    vocab_size = math.ceil(len(tokenizer) / 64) * 64
    raw = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": "groupresampler",
        "group": 8,
        "num_queries": 32,
        "num_resampler_layers": 2,
        "resampler_hidden_size": 768,
        "hidden_size": 192,
        "vision_hidden_size": 128,
        "vocab_size": vocab_size,
        "image_aspect_ratio": "square",
        "llm_model_name_or_path": "qwen2-demo",
        "vision_model_name_or_path": "siglip-demo",
        "tokenizer_name_or_path": "qwen2-demo",
        "tokenizer_model_max_length": 1024,
        "tokenizer_padding_side": "right",
        "tokenizer_use_fast": False,
        "pad_token": tokenizer.pad_token,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_theta": 10000.0,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
            "vocab_size": vocab_size,
            "bos_token_id": eos,
            "eos_token_id": eos,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 12,
        },
    }
    torch.manual_seed(seed)
    return models.build_model(raw)
