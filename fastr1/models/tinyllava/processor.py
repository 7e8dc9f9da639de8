"""Text and frames of TinyLLaVA-Video: the prompt template, lengths, and the frames its SigLIP tower was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fastr1.models.family import Processor, read_config
from fastr1.models.tinyllava.config import TinyLlavaConfig, parse_config
from fastr1.models.tinyllava.prompts import build_prompt, split_conversation, tokenize_with_image
from fastr1.models.tinyllava.tokenizer import load_tokenizer, save_tokenizer
from fastr1.schema import DataError
from fastr1.video import preprocess_frames

REMEDY = "shorten the question or raise tokenizer_model_max_length in the config.json of the model"


def load_processor(path: Path) -> TinyLlavaProcessor:
    """From the tokenizer files and config.json of a model folder."""
    return TinyLlavaProcessor(load_tokenizer(path), parse_config(read_config(path), where=str(path / "config.json")))


class TinyLlavaProcessor(Processor):
    """One end token, `<|endoftext|>`; frames are squashed to the tower's square."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TinyLlavaConfig) -> None:
        self.tokenizer = tokenizer
        self.end_token_ids = (int(tokenizer.eos_token_id),)
        self.pad_token_id = int(tokenizer.pad_token_id)
        self._config = config

    def prompt_ids(self, question: str, *, instruction: str = "", origin: str = "question") -> torch.Tensor:
        ids = tokenize_with_image(build_prompt(question, instruction=instruction), self.tokenizer)
        limit = self._config.max_prompt_tokens
        if len(ids) > limit:
            raise DataError(
                f"{origin}: the prompt has {len(ids)} tokens and the model takes {limit} beside the video; {REMEDY}"
            )
        return torch.tensor(ids)

    def conversation_ids(self, question: str, answer: str, *, origin: str) -> tuple[torch.Tensor, torch.Tensor]:
        prompt_ids, answer_ids = split_conversation(question, answer, self.tokenizer, origin=origin)
        max_length, prompt_length = self._config.max_length, len(prompt_ids) - 1 + self._config.num_queries
        if prompt_length + len(answer_ids) > max_length:
            raise DataError(
                f"{origin}: the prompt has {prompt_length} positions, the answer {len(answer_ids)} tokens, and "
                f"tokenizer_model_max_length is {max_length}; shorten the text or raise the limit in the config.json "
                "of the model"
            )
        return torch.tensor(prompt_ids), torch.tensor(answer_ids)

    def preprocess_frames(self, frames: torch.Tensor) -> torch.Tensor:
        side = self._config.image_size
        return preprocess_frames(frames, height=side, width=side)

    def blank_pixels(self, num_frames: int) -> torch.Tensor:
        side = self._config.image_size
        return torch.zeros(num_frames, 3, side, side)

    def save(self, path: Path) -> None:
        save_tokenizer(self.tokenizer, path)
