"""A second model family, as small as one can be: Llama text, a convolution for a tower, frames of 20 × 28 pixels.

It differs from the first wherever a family may: another template with the video at its end, another end token (two of
them), an untied head, a placeholder of its own, frames that are not square.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastr1.models import DecoderLayout, Processor, VideoLanguageModel
from fastr1.models.family import read_config
from fastr1.schema import DataError
from fastr1.video import preprocess_frames

HEIGHT, WIDTH, VIDEO, MAX_PROMPT = 20, 28, -1, 400
ENDS = ("</s>", "<|eot|>")
CONFIG = {"model_type": "second", "hidden_size": 24, "num_layers": 2}


class SecondProcessor(Processor):
    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate([*ENDS, "<pad>", *alphabet])}, []))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        bpe.add_special_tokens([*ENDS, "<pad>"])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=ENDS[0], pad_token="<pad>")
        self.end_token_ids = tuple(self.tokenizer.convert_tokens_to_ids(token) for token in ENDS)
        self.pad_token_id = self.tokenizer.convert_tokens_to_ids("<pad>")

    def prompt_ids(self, question: str, *, instruction: str = "", origin: str = "question") -> torch.Tensor:
        ids = self.tokenizer(f"[Q] {question} {instruction} [A]").input_ids
        if len(ids) > MAX_PROMPT:
            raise DataError(f"{origin}: the prompt has {len(ids)} tokens")
        return torch.tensor([*ids, VIDEO])

    def conversation_ids(self, question: str, answer: str, *, origin: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prompt_ids(question, origin=origin), torch.tensor(self.tokenizer(answer + ENDS[1]).input_ids)

    def preprocess_frames(self, frames: torch.Tensor) -> torch.Tensor:
        return preprocess_frames(frames, height=HEIGHT, width=WIDTH)

    def blank_pixels(self, num_frames: int) -> torch.Tensor:
        return torch.zeros(num_frames, 3, HEIGHT, WIDTH)

    def save(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)


class SecondModel(VideoLanguageModel):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, size = config, config["hidden_size"]
        self.vision_tower = nn.Conv2d(3, 8, kernel_size=(10, 14), stride=(10, 14))
        self.connector = nn.Linear(8, size)
        text = LlamaConfig(
            hidden_size=size,
            intermediate_size=48,
            num_hidden_layers=config["num_layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=259,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        self.language_model = LlamaForCausalLM(text)

    @property
    def layout(self) -> DecoderLayout:
        return DecoderLayout(self.config["num_layers"], self.config["hidden_size"], 48, 4, 2, 6, 259, False)

    @property
    def decoder(self) -> Any:
        return self.language_model.model

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.language_model.lm_head.weight, None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:  # (F, 3, 20, 28) → (4·F, 8)
        return self.vision_tower(pixels.to(self.dtype)).flatten(2).transpose(1, 2).flatten(0, 1)

    def visual_tokens(self, videos: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [self.connector(self.encode(video) if video.dim() == 4 else video) for video in videos]

    def embed_prompt(self, prompt_ids: torch.Tensor, visual_tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.decoder.embed_tokens(prompt_ids[:-1]), visual_tokens])

    def save(self, path: Path, *, state_dict: dict[str, torch.Tensor] | None = None, dtype: Any = None) -> None:
        (path / "config.json").write_text(json.dumps(self.config))
        save_file(
            {k: v.to(dtype or v.dtype) for k, v in (state_dict or self.state_dict()).items()}, path / "w.safetensors"
        )


def load_processor(path: Path) -> SecondProcessor:
    return SecondProcessor()


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> SecondModel:
    model = build_model(read_config(path))
    model.load_state_dict(load_file(path / "w.safetensors"))
    return model.to(device, dtype).eval()


def build_model(config: dict[str, Any]) -> SecondModel:
    torch.manual_seed(0)
    return SecondModel(config)
