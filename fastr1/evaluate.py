"""Greedy multiple-choice accuracy on a question file, with unparsable answers counted instead of guessed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastr1.config import INSTRUCTION, DataConfig
from fastr1.data.prompts import build_prompt_ids
from fastr1.data.questions import option_letters
from fastr1.data.records import load_grpo_samples
from fastr1.data.tokenizer import load_tokenizer
from fastr1.models import TinyLlavaVideo, load_model
from fastr1.rewards import extract_answer_letter
from fastr1.rewards.functions import think_format
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.runtime import load_pixels, resolve_device, resolve_dtype
from fastr1.schema import DataError, Sample
from fastr1.video import ClipPrefetcher


@dataclass(frozen=True)
class Answer:
    """One question, what the model said, and how it counts."""

    sample_id: str
    problem_type: str
    question: str
    completion: str
    solution: str
    letter: str | None  # None: unparsable, counted as wrong
    is_correct: bool
    is_well_formed: bool
    completion_length: int


def evaluate_checkpoint(
    *,
    model_path: str | Path,
    data_file: str | Path,
    video_root: str | Path,
    num_frames: int = 16,
    batch_size: int = 16,
    max_completion_length: int = 512,
    limit: int | None = None,
    instruction: str = INSTRUCTION,
    blank_video: bool = False,
    device: str | None = None,
    output: str | Path | None = None,
) -> dict[str, float]:
    """Load a model, answer the questions of a file greedily and return the rates of `summarise_answers`.

    Args:
        instruction: what follows every question in the prompt; use that of the training run.
        blank_video: show every question with frames of one value (mid grey), the blind baseline.
        output: write the summary and every answer there as JSON.
    """
    where = torch.device(device) if device else resolve_device()
    model = load_model(model_path, dtype=resolve_dtype("auto", where), device=where)
    data = DataConfig(num_frames=num_frames, instruction=instruction)
    samples = load_grpo_samples(data_file, video_root).samples[:limit]
    answers = evaluate_samples(
        model,
        load_tokenizer(model_path),
        samples,
        data,
        batch_size=batch_size,
        max_completion_length=max_completion_length,
        blank_video=blank_video,
    )
    summary = summarise_answers(answers)
    if output is not None:
        content = {"summary": summary, "answers": [asdict(answer) for answer in answers]}
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return summary


def evaluate_samples(
    model: TinyLlavaVideo,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    data: DataConfig,
    *,
    batch_size: int = 16,
    max_completion_length: int,
    blank_video: bool = False,
) -> list[Answer]:
    """Answer every sample greedily. A video that cannot be decoded is an error: nothing is left out of the rate."""
    was_training = model.training
    model.eval()
    answers: list[Answer] = []
    with ClipPrefetcher(
        lambda sample: load_pixels(sample.video_path, data, model),
        samples,
        num_threads=data.num_decode_threads,
        depth=2 * batch_size,
    ) as clips:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            pixels = [next(clips) for _ in batch]
            answers += _answer(model, tokenizer, batch, pixels, data, max_completion_length, blank_video)
    model.train(was_training)
    return answers


@torch.no_grad()
def _answer(
    model: TinyLlavaVideo,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    pixels: Sequence[torch.Tensor],
    data: DataConfig,
    max_completion_length: int,
    blank_video: bool,
) -> list[Answer]:
    videos = [model.encode_frames(torch.zeros_like(p) if blank_video else p) for p in pixels]
    limit = model.config.max_prompt_tokens
    prompt_ids = [
        build_prompt_ids(s.problem, tokenizer, instruction=data.instruction, max_tokens=limit, origin=s.origin)
        for s in samples
    ]
    params = SamplingParams(max_completion_length, temperature=0)
    prompts = [torch.tensor(ids, device=model.device) for ids in prompt_ids]
    rollout = sample_completions(model, tokenizer, prompts, videos, params)
    lengths = rollout.completion_mask.sum(dim=1).tolist()
    answers = []
    for sample, text, length in zip(samples, rollout.texts, lengths, strict=True):
        options = option_letters(sample.problem)
        letter = extract_answer_letter(text, options)
        is_correct = letter is not None and letter == extract_answer_letter(sample.solution, options)
        answers.append(
            Answer(
                sample.sample_id,
                sample.problem_type,
                sample.problem,
                text,
                sample.solution,
                letter,
                is_correct,
                think_format(text) > 0,
                length,
            )
        )
    return answers


def summarise_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """`accuracy`, `format_rate`, `unparsable_rate`, mean `completion_length`, and `accuracy/<problem type>`."""
    if not answers:
        raise DataError("there is no question to evaluate; check the data file and the limit")
    total = len(answers)
    summary = {
        "accuracy": sum(a.is_correct for a in answers) / total,
        "format_rate": sum(a.is_well_formed for a in answers) / total,
        "unparsable_rate": sum(a.letter is None for a in answers) / total,
        "completion_length": sum(a.completion_length for a in answers) / total,
        "num_questions": float(total),
    }
    kinds: dict[str, list[Any]] = {}
    for answer in answers:
        kinds.setdefault(answer.problem_type, []).append(answer.is_correct)
    if len(kinds) > 1:
        summary.update({f"accuracy/{kind}": sum(right) / len(right) for kind, right in sorted(kinds.items())})
    return summary
