"""Ask a model one question about one video."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastr1.config import GRPOConfig, ModelConfig
from fastr1.evaluation.recorded import data_settings, stop_strings
from fastr1.models import load_model, load_processor
from fastr1.rewards.answers import extract_think
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.video import load_pixels


@dataclass(frozen=True)
class ChatAnswer:
    """A completion and its two parts; a part is None where the completion lacks the tags."""

    thinking: str | None
    answer: str | None
    text: str
    is_truncated: bool = False  # ran into the length limit

    def format(self) -> str:
        """Thinking and answer under headings; a completion that is not well formed as it is, and said to be."""
        answer = "" if self.answer is None else f"\n\nanswer:\n{self.answer}"
        if self.thinking is not None:
            return f"thinking:\n{self.thinking}{answer}"
        return f"completion, not in the form <think> … </think> <answer> … </answer>:\n{self.text}{answer}"


def chat(
    model_path: str | Path,
    video_path: str | Path,
    question: str,
    *,
    num_frames: int | None = None,
    max_frames: int | None = None,
    max_completion_length: int = GRPOConfig.max_completion_length,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    instruction: str | None = None,
    backend: str | None = None,
    dtype: str = ModelConfig.dtype,
    device: str | None = None,
) -> ChatAnswer:
    """Answer `question`, sent as it stands plus `instruction`; greedy unless `temperature` is positive.

    Frames, instruction and decoder are those of the model's training unless given here, stop strings are its own (see
    `recorded.py`).
    Raises: DataError for a video or a question that cannot be used; ConfigError for a device that is not here.
    """
    data = data_settings(
        model_path, num_frames=num_frames, max_frames=max_frames, instruction=instruction, backend=backend
    )
    processor, model = load_processor(model_path), load_model(model_path, dtype=dtype, device=device)
    pixels = load_pixels(Path(video_path), data, processor.preprocess_frames, model.device)
    prompt_ids = processor.prompt_ids(question, instruction=data.instruction).to(model.device)
    params = SamplingParams(
        max_completion_length, temperature=temperature, top_p=top_p, stop_strings=stop_strings(model_path)
    )
    with torch.no_grad():
        visual_tokens = model.visual_tokens([pixels])
    rollout = sample_completions(model, processor, [prompt_ids], visual_tokens, params, seed=seed)
    text = rollout.texts[0]
    answer = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    is_truncated = bool(rollout.is_truncated[0])
    return ChatAnswer(extract_think(text), answer[1].strip() if answer else None, text, is_truncated)
