"""Ask a model one question about one video."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastr1.config import INSTRUCTION, DataConfig
from fastr1.data.prompts import build_prompt_ids
from fastr1.data.tokenizer import load_tokenizer
from fastr1.models import load_model
from fastr1.rewards.functions import extract_think
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.runtime import load_pixels, resolve_device, resolve_dtype


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
    num_frames: int = 16,
    max_completion_length: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    device: str | None = None,
) -> ChatAnswer:
    """Answer `question`, sent as it stands plus `instruction`; greedy unless `temperature` is positive."""
    where = torch.device(device) if device else resolve_device()
    model = load_model(model_path, dtype=resolve_dtype("auto", where), device=where)
    tokenizer = load_tokenizer(model_path)
    pixels = load_pixels(Path(video_path), DataConfig(num_frames=num_frames), model)
    ids = build_prompt_ids(question, tokenizer, instruction=instruction, max_tokens=model.config.max_prompt_tokens)
    prompt_ids = torch.tensor(ids, device=where)
    params = SamplingParams(max_completion_length, temperature=temperature)
    text = sample_completions(model, tokenizer, [prompt_ids], [pixels], params, seed=seed).texts[0]
    answer = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return ChatAnswer(extract_think(text), answer[1].strip() if answer else None, text)
