"""Supervised fine-tuning on conversations about videos: the cold start before GRPO.

The loss of a sample is the mean cross-entropy of its answer tokens, end-of-sequence included; the loss of an update is
the mean over the samples of all ranks and micro-batches, whose number is fixed before the first micro-step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fastr1.config import TrainConfig
from fastr1.data.prompts import build_prompt, build_sft_example, tokenize_with_image
from fastr1.data.records import load_sft_samples
from fastr1.loop import Metrics, Rows, TrainingRun, Update
from fastr1.reporting.statistics import TokenSums
from fastr1.schema import IGNORE_INDEX, DataError, SftSample
from fastr1_kernels import selective_log_softmax


@dataclass(frozen=True)
class SftExample:
    """One sample as the model sees it: what it is given and what it is to say."""

    prompt_ids: torch.Tensor  # (L,) int64 with one −200
    answer_ids: torch.Tensor  # (T,) int64, end-of-sequence included unless cut


def run_sft(config: TrainConfig) -> Path:
    """Fine-tune `config.model.path` on the answers of `config.data.train_file` and write the run folder.

    `config.data.instruction` is not used: the questions of these files carry theirs.
    Returns: the folder of the exported model, or the checkpoint where a signal stopped the run early.
    """
    with TrainingRun[SftSample](config, load_sft_samples) as run:
        return run.train(SftTrainer(run).step)


def build_example(
    sample: SftSample, tokenizer: PreTrainedTokenizerBase, *, num_visual_tokens: int, max_length: int
) -> SftExample:
    """Token ids of one sample, cut at `max_length` positions, visual tokens included, as generation is.

    Raises: DataError where prompt and answer cannot be told apart, or nothing of the answer is left.
    """
    input_ids, labels = build_sft_example(sample.question, sample.answer, tokenizer, origin=sample.origin)
    boundary = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    room = max_length - (boundary - 1 + num_visual_tokens)
    if room < 1:
        raise DataError(
            f"{sample.origin}: the prompt has {max_length - room} positions and tokenizer_model_max_length is "
            f"{max_length}; shorten the question or raise the limit in the config.json of the model"
        )
    return SftExample(torch.tensor(input_ids[:boundary]), torch.tensor(input_ids[boundary:][:room]))


def answer_logps(
    logits: torch.Tensor,  # (B, T, V)
    answer_ids: torch.Tensor,  # (B, T)
    answer_mask: torch.Tensor,  # (B, T) bool
) -> torch.Tensor:
    """Mean log-probability of each sample's answer tokens: (B,)."""
    logps = selective_log_softmax(logits, answer_ids).masked_fill(~answer_mask, 0.0)
    return logps.sum(dim=1) / answer_mask.sum(dim=1)


class SftTrainer:
    """One supervised update after another."""

    def __init__(self, run: TrainingRun[SftSample]) -> None:
        self.run = run
        self.engine = run.engine

    def step(self, update: Update[SftSample]) -> tuple[Metrics, Rows]:
        """One update on this rank's share of the samples. Returns metrics of all ranks."""
        engine, timer = self.engine, self.run.timer
        with timer.phase("vision"), engine.gathered_parameters():
            videos = self.run.encode(update.pixels)
        examples, is_valid = self._build_examples(update)
        num_samples = engine.sum_across_ranks(is_valid.sum().double()).item()
        if num_samples == 0:
            raise DataError(f'update {update.step}: no sample can be used; set data.policy to "error" to see why')
        sums = TokenSums()
        with timer.phase("train"):
            for rows in self.run.micro_batches(len(examples)):
                ids, mask = self._pad([example.answer_ids for example in examples[rows]])
                prompt_ids = [example.prompt_ids.to(engine.device) for example in examples[rows]]
                logits = engine(prompt_ids, videos[rows], ids, mask, share_prefix=False)
                losses = -answer_logps(logits, ids, mask) * is_valid[rows].to(engine.device)
                engine.backward(losses.sum() / num_samples)
                num_tokens = (mask & is_valid[rows].to(engine.device)[:, None]).sum()
                sums.add({"loss": (losses.sum(), is_valid[rows].sum()), "num_tokens": (num_tokens, num_tokens * 0)})
        with timer.phase("optimizer"):
            learning_rate = engine.learning_rate
            grad_norm = engine.step()
        return {**sums.means(engine), "grad_norm": grad_norm, "learning_rate": learning_rate}, []

    def _build_examples(self, update: Update[SftSample]) -> tuple[list[SftExample], torch.Tensor]:
        """Examples and whether each counts (B,); an unusable one goes to the ledger, which raises unless it is to be
        skipped, and its prompt with an empty answer stands in, so that every rank takes the same steps."""
        config, tokenizer = self.run.model.config, self.run.tokenizer
        examples, is_valid = [], update.is_valid
        for i, sample in enumerate(update.samples):
            try:
                example = build_example(
                    sample, tokenizer, num_visual_tokens=config.num_queries, max_length=config.max_length
                )
            except DataError as error:
                self.run.ledger.record(sample.origin, str(error))
                prompt_ids = tokenize_with_image(build_prompt(sample.question, instruction=""), tokenizer)
                example = SftExample(torch.tensor(prompt_ids), torch.tensor([tokenizer.eos_token_id]))
                is_valid[i] = False
            examples.append(example)
        return examples, is_valid

    def _pad(self, answers: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids (B, T) and mask (B, T) bool on the device."""
        pad = self.run.tokenizer.pad_token_id
        ids = pad_sequence(answers, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(answer) for answer in answers])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return ids.to(self.engine.device), mask.to(self.engine.device)
