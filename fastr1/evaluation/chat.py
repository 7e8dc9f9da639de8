"""Ask a model one question about one video."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastr1.config import INSTRUCTION, DataConfig, GRPOConfig
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


def chat(
    model_path: str | Path,
    video_path: str | Path,
    question: str,
    *,
    num_frames: int = DataConfig.num_frames,
    max_completion_length: int = GRPOConfig.max_completion_length,
    temperature: float = 0.0,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    device: str | None = None,
) -> ChatAnswer:
    """Answer `question`, sent as it stands plus `instruction`; greedy unless `temperature` is positive."""
    processor, model = load_processor(model_path), load_model(model_path, device=device)
    data = DataConfig(num_frames=num_frames)
    pixels = load_pixels(Path(video_path), data, processor.preprocess_frames, model.device)
    prompt_ids = processor.prompt_ids(question, instruction=instruction).to(model.device)
    params = SamplingParams(max_completion_length, temperature=temperature)
    text = sample_completions(model, processor, [prompt_ids], [pixels], params, seed=seed).texts[0]
    answer = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return ChatAnswer(extract_think(text), answer[1].strip() if answer else None, text)
