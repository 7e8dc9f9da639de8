"""Greedy multiple-choice accuracy on a question file, with unparsable answers counted instead of guessed.

Controls show the same model something else than the clip of the question, to tell how much it looks at the video:
blank frames (what the text alone gives away), one frame repeated (what a picture gives away), frames in random order
(what is left without motion).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastr1.config import INSTRUCTION, Control, DataConfig, GRPOConfig, RunConfig
from fastr1.data.questions import load_questions
from fastr1.models import Processor, VideoLanguageModel, load_model, load_processor
from fastr1.rewards.answers import extract_answer_letter, extract_think
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.schema import Answer, DataError, Sample
from fastr1.video import ClipPrefetcher, load_pixels


def evaluate_checkpoint(
    *,
    model_path: str | Path,
    data_file: str | Path,
    video_root: str | Path,
    num_frames: int = DataConfig.num_frames,
    batch_size: int = RunConfig.per_device_eval_batch_size,
    max_completion_length: int = GRPOConfig.max_completion_length,
    limit: int | None = None,
    instruction: str = INSTRUCTION,
    control: Control | None = None,
    device: str | None = None,
    output: str | Path | None = None,
) -> dict[str, float]:
    """Load a model, answer the questions of a file greedily and return the rates of `summarise_answers`.

    Args:
        instruction: what follows every question in the prompt; use that of the training run.
        control: one of `CONTROLS`, shown in the place of every clip; None: the clip.
        output: write the summary and every answer there as JSON.
    """
    evaluator = Evaluator(
        load_questions(data_file, video_root).samples[:limit],
        load_processor(model_path),
        DataConfig(num_frames=num_frames, instruction=instruction),
        batch_size=batch_size,
        max_completion_length=max_completion_length,
    )
    answers = evaluator.answer(load_model(model_path, device=device), control=control)
    assert answers is not None
    summary = summarise_answers(answers)
    if output is not None:
        content = {"summary": summary, "answers": [asdict(answer) for answer in answers]}
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return summary


class Evaluator:
    """Questions with their prompts, to be put to a model any number of times.

    Raises: DataError where a prompt does not fit into the model.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        data: DataConfig,
        *,
        batch_size: int = RunConfig.per_device_eval_batch_size,
        max_completion_length: int = GRPOConfig.max_completion_length,
    ) -> None:
        self._data = data
        self._processor = processor
        self._batch_size = batch_size
        self._params = SamplingParams(max_completion_length, temperature=0)
        self._questions = [
            (sample, processor.prompt_ids(sample.problem, instruction=data.instruction, origin=sample.origin))
            for sample in samples
        ]

    @torch.no_grad()
    def answer(
        self,
        model: VideoLanguageModel,
        *,
        share: slice = slice(None),
        control: Control | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Answer] | None:
        """Answer a share of the questions. A video that cannot be decoded is an error: nothing is left out of the rate.

        `control` is one of `CONTROLS`, or None. Returns None once `is_cancelled`, asked before every batch, says so.
        """
        if control is not None and control not in CONTROLS:
            raise DataError(f"control is {control!r}; choose from {', '.join(CONTROLS)}, or None for the clip itself")
        was_training = model.training
        model.eval()
        answers: list[Answer] = []
        device, threads = model.device, self._data.num_decode_threads

        def load(question: tuple[Sample, torch.Tensor]) -> torch.Tensor:
            path, preprocess = question[0].video_path, self._processor.preprocess_frames
            pixels = load_pixels(path, self._data, preprocess, device)
            return pixels if control is None else CONTROLS[control](pixels)

        with ClipPrefetcher(load, self._questions[share], num_threads=threads, depth=2 * self._batch_size) as clips:
            while batch := list(islice(clips, self._batch_size)):
                if is_cancelled():
                    model.train(was_training)
                    return None
                videos = [model.encode(pixels) for _, pixels in batch]
                prompts = [prompt_ids.to(device) for (_, prompt_ids), _ in batch]
                rollout = sample_completions(model, self._processor, prompts, videos, self._params)
                lengths = rollout.completion_mask.sum(dim=1).tolist()
                samples = [sample for (sample, _), _ in batch]
                answers += [_judge(*row) for row in zip(samples, rollout.texts, lengths, strict=True)]
        model.train(was_training)
        return answers


def _judge(sample: Sample, text: str, length: int) -> Answer:
    letter = extract_answer_letter(text, sample.options)
    return Answer(
        sample_id=sample.sample_id,
        problem_type=sample.problem_type,
        question=sample.problem,
        completion=text,
        solution=sample.solution,
        letter=letter,
        is_correct=letter == sample.letter,
        is_well_formed=extract_think(text) is not None,
        completion_length=length,
    )


def _shuffled(pixels: torch.Tensor) -> torch.Tensor:
    """The frames in one fixed random order."""
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


# what is shown instead of the frames (F, 3, H, W)
CONTROLS: dict[Control, Callable[[torch.Tensor], torch.Tensor]] = {
    "blank_video": torch.zeros_like,  # mid grey
    "repeated_frame": lambda pixels: pixels[len(pixels) // 2].expand_as(pixels),
    "shuffled_frames": _shuffled,
}


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
