"""Supervised fine-tuning on conversations about videos: the cold start before GRPO.

The loss of a sample is the mean cross-entropy of its answer tokens, end token included; the loss of an update is the
mean over the samples of all ranks and micro-batches, whose number is fixed before the first micro-step.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from fastr1.config import TrainConfig
from fastr1.data.conversations import load_conversations
from fastr1.reporting.statistics import Metrics, TokenSums
from fastr1.schema import DataError, SftSample, Update
from fastr1.training.agreement import agreement, on_every_rank
from fastr1.training.loop import Rows, TrainingRun
from fastr1.training.stop import StopRequest
from fastr1_kernels import selective_log_softmax

Pair = tuple[torch.Tensor, torch.Tensor]  # prompt and answer ids


def run_sft(config: TrainConfig, stop: StopRequest | None = None) -> Path:
    """Fine-tune `config.model.path` on the answers of `config.data.train_file` and write the run folder.

    `config.data.instruction` is not used: the questions of these files carry theirs. `stop` listens already.
    Returns: the folder of the exported model, or the checkpoint where a signal stopped the run early.
    """
    with prepare_sft(config, stop) as run:
        return run.train(SftTrainer(run).step)


def prepare_sft(config: TrainConfig, stop: StopRequest | None = None) -> TrainingRun[SftSample]:
    """The run before a model is built; making it checks all that it will need."""
    return TrainingRun[SftSample](config, load_conversations, stop)


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
        self.distributed = run.distributed
        # (prompt, answer) of every sample, or why it has none: that goes to the ledger when the sample is due
        self.examples = [self._tokenize(sample) for sample in run.samples]

    def step(self, update: Update[SftSample]) -> tuple[Metrics, Rows]:
        """One update on this rank's share of the samples. Returns metrics of all ranks."""
        distributed, timer = self.distributed, self.run.timer
        with timer.phase("vision"), distributed.gathered_parameters():
            videos = self.run.encode(update.pixels)
        with agreement(distributed):
            pairs, is_tokenized = self._examples_of(update)
        is_valid = update.is_valid & is_tokenized
        num_samples = distributed.sum_across_ranks(is_valid.sum().double()).item()
        if num_samples == 0:
            error = DataError(f'update {update.step}: no sample can be used; set data.policy to "error" to see why')
            raise on_every_rank(error)
        is_valid = is_valid.to(distributed.device)
        sums = TokenSums()
        with timer.phase("train"):
            for rows in self.run.micro_batches(len(pairs)):
                ids, mask = self._pad([answer_ids for _, answer_ids in pairs[rows]])
                prompt_ids = [prompt_ids.to(distributed.device) for prompt_ids, _ in pairs[rows]]
                logits = distributed(prompt_ids, videos[rows], ids, mask, share_prefix=False)
                losses = -answer_logps(logits, ids, mask) * is_valid[rows]
                distributed.backward(losses.sum() / num_samples)
                num_tokens = (mask & is_valid[rows][:, None]).sum()
                sums.add({"loss": (losses.sum(), is_valid[rows].sum()), "num_tokens": (num_tokens, num_tokens * 0)})
        with timer.phase("optimizer"):
            learning_rate = distributed.learning_rate
            grad_norm = distributed.step()
        return {**sums.means(distributed), "grad_norm": grad_norm, "learning_rate": learning_rate}, []

    def _tokenize(self, sample: SftSample) -> Pair | DataError:
        try:
            return self.run.processor.conversation_ids(sample.question, sample.answer, origin=sample.origin)
        except DataError as error:
            return error

    def _examples_of(self, update: Update[SftSample]) -> tuple[list[Pair], torch.Tensor]:
        """(prompt, answer) of every sample and whether it counts (B,). In the place of an unusable one stands a prompt
        with an empty answer, so that every rank takes the same steps; the ledger raises unless it is to be skipped."""
        processor, pairs = self.run.processor, []
        for sample, i in zip(update.samples, update.indices, strict=True):
            example = self.examples[i]
            if isinstance(example, DataError):
                self.run.ledger.record(sample.origin, str(example))
                example = processor.prompt_ids("", origin=sample.origin), torch.tensor(processor.end_token_ids[:1])
            pairs.append(example)
        usable = [not isinstance(self.examples[i], DataError) for i in update.indices]
        return pairs, torch.tensor(usable)

    def _pad(self, answers: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids (B, T) and mask (B, T) bool on the device."""
        ids = pad_sequence(answers, batch_first=True, padding_value=self.run.processor.pad_token_id)
        lengths = torch.tensor([len(answer) for answer in answers])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return ids.to(self.distributed.device), mask.to(self.distributed.device)
