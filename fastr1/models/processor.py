"""Text and frames as the models of a family take them; no weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase


class Processor(ABC):
    """Text and frames as the models of a family take them.

    Attributes:
        tokenizer: of the checkpoint.
        end_token_ids: a completion ends with any of them.
        pad_token_id: what fills shorter completions; never looked at.
    """

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: tuple[int, ...]
    pad_token_id: int

    @abstractmethod
    def prompt_ids(self, question: str, *, instruction: str = "", origin: str = "question") -> torch.Tensor:
        """The prompt of one question about one video, the place of the video in it: (L,) int64 on the CPU.

        Raises: DataError where it does not fit into the model beside the video; nothing is cut off.
        """

    @abstractmethod
    def conversation_ids(self, question: str, answer: str, *, origin: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt and what is to be said, an end token included: (L,) and (T,) int64 on the CPU.

        Raises: DataError where the two cannot be told apart, or do not fit into the model; nothing is cut off.
        """

    @abstractmethod
    def preprocess_frames(
        self,
        frames: torch.Tensor,  # (F, 3, height, width) uint8 RGB
    ) -> torch.Tensor:  # (F, 3, H, W) float32, on the device of the frames
        """Decoded frames as the vision tower takes them. Thread-safe."""

    @abstractmethod
    def blank_pixels(self, num_frames: int) -> torch.Tensor:
        """Frames of one value, mid grey, in the place of a video: (F, 3, H, W) float32 on the CPU."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the files that `load_processor` reads into an existing folder."""

    def raw_text(self, ids: torch.Tensor) -> str:
        """Every token as it was said, spaces, line ends and special tokens among them: where stop strings are found."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode(self, ids: torch.Tensor) -> str:
        """The text of a completion: special tokens removed, stripped."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
