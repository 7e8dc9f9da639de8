"""Multiple-choice accuracy on a question file, with unparsable answers counted instead of guessed.

Controls show the same model something else than the clip of the question, to tell how much it looks at the video:
blank frames (what the text alone gives away), one frame repeated (what a picture gives away), frames in random order
(what is left without motion).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch

from fastr1.config import Control, DataConfig, GRPOConfig, RolloutConfig, RunConfig
from fastr1.data.ledger import BadRow, BadSampleLedger, LoadedSamples, tokenize_samples
from fastr1.models import Processor, VideoLanguageModel
from fastr1.models.texts import prompt_ids
from fastr1.rewards.answers import extract_answer_letter, extract_think
from fastr1.rollout import SamplingParams, build_sampler
from fastr1.schema import Answer, Clip, DataError, Sample
from fastr1.video import ClipPrefetcher, VideoError, load_pixels


class Evaluator:
    """Questions with their prompts, to be put to a model any number of times.

    Attributes: num_rows of the file; the samples of it whose prompts fit; the ledger of the file, which holds the
    questions that were left out so far.
    Raises: DataError where a prompt does not fit into the model, unless `data.policy` is "skip".
    """

    def __init__(
        self,
        loaded: LoadedSamples[Sample],
        processor: Processor,
        data: DataConfig,
        *,
        batch_size: int = RunConfig.per_device_eval_batch_size,
        max_completion_length: int = GRPOConfig.max_completion_length,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_strings: tuple[str, ...] = (),
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self._data = data
        self._rollout = rollout
        self._processor = processor
        self._batch_size = batch_size
        self._params = SamplingParams(
            max_completion_length, temperature=temperature, top_p=top_p, stop_strings=stop_strings
        )
        self._seed = seed
        bound: dict[str, Any] = {"policy": data.policy, "max_bad_fraction": data.max_bad_fraction}
        fitting, prompts = tokenize_samples(loaded, lambda sample: prompt_ids(processor, data, sample), **bound)
        self.samples, self._prompts = fitting.samples, prompts
        self.num_rows = loaded.num_rows
        self.ledger = BadSampleLedger(fitting, **bound)

    @torch.no_grad()
    def answer(
        self,
        model: VideoLanguageModel,
        *,
        share: slice | Sequence[int] = slice(None),
        control: Control | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
        note_clip: Callable[[Sample, Clip], None] = lambda sample, clip: None,
    ) -> tuple[list[Answer], list[BadRow]] | None:
        """Answer a share of `samples`, by their places; `control` is one of `CONTROLS`, or None.

        Draws depend on the seed and the place of a question, not on the batch.
        Returns: the answers, and the questions whose video cannot be decoded (under the policy "error" it stops at the
        first); the caller hands these, of all processes, to the ledger, which applies the policy. None once
        `is_cancelled`, asked before every batch, says so. `note_clip` is given every clip, in the threads that
        load them.
        """
        if control is not None and control not in CONTROLS:
            raise DataError(f"control is {control!r}; choose from {', '.join(CONTROLS)}, or None for the clip itself")
        was_training = model.training
        model.eval()
        answers: list[Answer] = []
        failures: list[BadRow] = []
        device, threads = model.device, self._data.num_decode_threads

        def load(place: int) -> torch.Tensor | BadRow:
            sample, preprocess = self.samples[place], self._processor.preprocess_frames
            try:
                pixels = load_pixels(sample.video_path, self._data, preprocess, device, partial(note_clip, sample))
            except VideoError as error:
                return BadRow(sample.origin, error.problem)
            return pixels if control is None else CONTROLS[control](pixels)

        sample = build_sampler(model, self._processor, self._params, self._rollout)
        places = range(len(self.samples))[share] if isinstance(share, slice) else share
        with ClipPrefetcher(load, places, num_threads=threads, depth=2 * self._batch_size) as clips:
            while batch := list(islice(clips, self._batch_size)):
                if is_cancelled():
                    model.train(was_training)
                    return None
                failures += [result for _, result in batch if isinstance(result, BadRow)]
                if failures and self._data.policy == "error":
                    break
                usable = {place: pixels for place, pixels in batch if not isinstance(pixels, BadRow)}
                if not usable:
                    continue
                with torch.no_grad():
                    visual_tokens = model.visual_tokens([model.encode(pixels) for pixels in usable.values()])
                prompts = [self._prompts[place].to(device) for place in usable]
                rollout = sample(prompts, visual_tokens, seed=self._seed, prompt_keys=list(usable))
                lengths = rollout.completion_mask.sum(dim=1).tolist()
                samples = [self.samples[place] for place in usable]
                answers += [_judge(*row) for row in zip(samples, rollout.texts, lengths, strict=True)]
        model.train(was_training)
        return answers, failures


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
        video=str(sample.video_path),
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


def summarise_answers(answers: Sequence[Answer], num_rows: int | None = None) -> dict[str, float]:
    """`accuracy` and beside it `strict_accuracy`, `format_rate`, `unparsable_rate`, mean `completion_length`, and
    `accuracy/<problem type>`, `strict_accuracy/<problem type>` where there are several.

    `accuracy` is lenient: the right letter is found in the answer. Strict: and the completion is well formed.
    All over `num_questions`, those that were answered; `num_left_out` is how many of `num_rows` were not.
    """
    if not answers and num_rows:
        raise DataError(
            f"none of {num_rows} questions could be asked; bad_samples.jsonl or the log says why: repair them"
        )
    if not answers:
        raise DataError("there is no question to evaluate; check the data file and the limit")
    total = len(answers)
    summary = {
        "accuracy": sum(a.is_correct for a in answers) / total,
        "strict_accuracy": sum(a.is_correct and a.is_well_formed for a in answers) / total,
        "format_rate": sum(a.is_well_formed for a in answers) / total,
        "unparsable_rate": sum(a.letter is None for a in answers) / total,
        "completion_length": sum(a.completion_length for a in answers) / total,
        "num_questions": float(total),
        "num_left_out": float((total if num_rows is None else num_rows) - total),
    }
    kinds: dict[str, list[Answer]] = {}
    for answer in answers:
        kinds.setdefault(answer.problem_type, []).append(answer)
    by_kind = sorted(kinds.items()) if len(kinds) > 1 else []
    summary |= {f"accuracy/{kind}": sum(a.is_correct for a in alike) / len(alike) for kind, alike in by_kind}
    for kind, alike in by_kind:
        summary[f"strict_accuracy/{kind}"] = sum(a.is_correct and a.is_well_formed for a in alike) / len(alike)
    return summary
