"""Supervised fine-tuning on conversations about videos: the cold start before GRPO.

The loss of a sample is the mean cross-entropy of its answer tokens, end token included; the loss of an update is the
mean over the samples of all ranks and micro-batches, whose number is fixed before the first micro-step.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from fastr1.config import TrainConfig
from fastr1.data.bad_samples import BAD_SAMPLES_FILE
from fastr1.data.conversations import load_conversations
from fastr1.models.texts import conversation_ids
from fastr1.reporting.statistics import Metrics, TokenSums
from fastr1.schema import DataError, SftSample, Update
from fastr1.training.agreement import on_every_rank
from fastr1.training.loop import Rows, TrainingRun
from fastr1.training.stop import StopRequest
from fastr1_kernels import selective_log_softmax


def run_sft(config: TrainConfig, stop: StopRequest | None = None) -> Path:
    """Fine-tune `config.model.path` on the answers of `config.data.train_file` and write the run folder.

    `config.data.instruction` is not used: the questions of these files carry theirs. `stop` listens already.
    Returns: the folder of the exported model, or the checkpoint where a signal stopped the run early.
    """
    with prepare_sft(config, stop) as run:
        return run.train(SftTrainer(run).step)


def prepare_sft(config: TrainConfig, stop: StopRequest | None = None) -> TrainingRun[SftSample]:
    """The run before a model is built; making it checks all that it will need."""
    return TrainingRun[SftSample](config, load_conversations, conversation_ids, stop)


def answer_logps(
    logits: torch.Tensor,  # (B, T, V)
    answer_ids: torch.Tensor,  # (B, T)
    answer_mask: torch.Tensor,  # (B, T) bool
) -> torch.Tensor:
    """Mean log-probability of each sample's answer tokens: (B,)."""
    # The ids are the tokenizer's own; looking at their values would wait for a GPU.
    is_cheap = logits.device.type == "cpu"
    logps = selective_log_softmax(logits, answer_ids, check_values=is_cheap).masked_fill(~answer_mask, 0.0)
    return logps.sum(dim=1) / answer_mask.sum(dim=1)


class SftTrainer:
    """One supervised update after another."""

    def __init__(self, run: TrainingRun[SftSample]) -> None:
        self.run = run
        self.distributed = run.distributed

    def step(self, update: Update[SftSample]) -> tuple[Metrics, Rows]:
        """One update on this rank's share of the samples. Returns metrics of all ranks."""
        distributed, timer = self.distributed, self.run.timer
        with timer.phase("vision"), distributed.gathered_parameters():
            videos = self.run.encode(update.pixels)
        pairs = [self.run.tokens[i] for i in update.indices]
        is_valid = update.is_valid
        num_samples = distributed.sum_across_ranks(is_valid.sum().double()).item()
        if num_samples == 0:
            reasons = self.run.output_dir / BAD_SAMPLES_FILE
            error = DataError(
                f"update {update.step}: no video could be decoded; repair them, {reasons} has the reasons"
            )
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

    def _pad(self, answers: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids (B, T) and mask (B, T) bool on the device."""
        ids = pad_sequence(answers, batch_first=True, padding_value=self.run.processor.pad_token_id)
        lengths = torch.tensor([len(answer) for answer in answers])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return ids.to(self.distributed.device), mask.to(self.distributed.device)
