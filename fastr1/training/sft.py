"""Supervised fine-tuning on conversations about videos: the cold start before GRPO.

The loss of a sample is the mean cross-entropy of its answer tokens, end token included; the loss of an update is the
mean over the samples of all ranks and micro-batches, whose number is fixed before the first micro-step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from fastr1.config import TrainConfig
from fastr1.data.conversations import load_conversations
from fastr1.models import VideoLanguageModel
from fastr1.models.texts import conversation_ids
from fastr1.reporting.statistics import Metrics, TokenSums
from fastr1.schema import SftSample, Update
from fastr1.training.agreement import agreement
from fastr1.training.longest import check_longest
from fastr1.training.loop import Rows, TrainingRun
from fastr1.training.packing import MicroBatch, keep_step, pack_groups
from fastr1.training.passes import completion_states
from fastr1.training.stop import StopRequest
from fastr1.training.visual import VisualTokens
from fastr1_kernels import linear_logps


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


class SftTrainer:
    """One supervised update after another."""

    def __init__(self, run: TrainingRun[SftSample]) -> None:
        self.run = run
        self.distributed = run.distributed
        check_longest(run, [(prompt, len(answer)) for prompt, answer in run.tokens])

    def step(self, update: Update[SftSample]) -> tuple[Metrics, Rows]:
        """One update on this rank's share of the samples. Returns metrics of all ranks."""
        distributed, timer, device = self.distributed, self.run.timer, self.distributed.device
        with timer.phase("vision"):
            visual = VisualTokens(distributed, self.run.encode(self.run.fill(update.pixels)))
        num_samples = distributed.sum_across_ranks(torch.tensor(float(sum(update.is_valid)))).item()
        pairs = [self.run.tokens[i] for i in update.indices]
        prompt_ids = [prompt.to(device) for prompt, _ in pairs]
        answers = pad_sequence([answer for _, answer in pairs], batch_first=True).to(device)
        with timer.phase("train"):
            sums = TokenSums()
            for micro_batch in self._pack(update, prompt_ids, visual, [len(answer) for _, answer in pairs]):
                logps = distributed(partial(answer_logps, micro_batch, prompt_ids, visual.tokens, answers))
                loss = -logps.sum() * (not micro_batch.is_blank)
                distributed.backward(loss / num_samples)
                numbers = torch.zeros(2) if micro_batch.is_blank else num_rows_and_tokens(micro_batch)
                num_rows, num_tokens = numbers.to(device)
                sums.add({"loss": (loss, num_rows), "num_tokens": (num_tokens, num_tokens * 0)})
            visual.backward()
        with timer.phase("optimizer"):
            learning_rate = distributed.learning_rate
            grad_norm = distributed.step()
        return {**sums.means(distributed), "grad_norm": grad_norm, "learning_rate": learning_rate}, []

    def _pack(
        self,
        update: Update[SftSample],
        prompt_ids: Sequence[torch.Tensor],
        visual: VisualTokens,
        lengths: Sequence[int],
    ) -> list[MicroBatch]:
        """Micro-batches of the usable samples, each a prompt with one completion. All ranks call it."""
        with self.distributed.gathered_parameters():
            prompt_lengths = self.run.model.prompt_lengths(prompt_ids, visual.detached)
        usable = {place: [place] for place, is_valid in enumerate(update.is_valid) if is_valid}
        budget = self.run.config.optim.max_tokens_per_micro_batch
        with agreement(self.distributed):
            micro_batches = pack_groups(prompt_lengths, usable, lengths, budget)
        return keep_step(self.distributed, micro_batches, prompt_lengths, range(len(prompt_lengths)))


def num_rows_and_tokens(micro_batch: MicroBatch) -> torch.Tensor:
    """Its answers and their tokens, (2,)."""
    return torch.tensor([len(micro_batch.rows), sum(micro_batch.row_lengths)], dtype=torch.float32)


def answer_logps(
    micro_batch: MicroBatch,
    prompt_ids: Sequence[torch.Tensor],  # B × (L_i,)
    visual_tokens: Sequence[torch.Tensor],  # B × (Q, D)
    answers: torch.Tensor,  # (B, T) ids, right-padded
    model: VideoLanguageModel,
) -> torch.Tensor:
    """Mean log-probability of the tokens of each answer in a micro-batch: (answers,)."""
    device = answers.device
    places = micro_batch.places(answers.shape[1], device)
    states = completion_states(model, micro_batch, prompt_ids, visual_tokens, answers)
    weight, bias = model.head
    # The ids are the tokenizer's own; looking at their values would wait for a GPU.
    is_cheap = device.type == "cpu"
    logps = linear_logps(states, weight, answers.flatten()[places], bias=bias, check_values=is_cheap)
    lengths = torch.tensor(micro_batch.row_lengths, device=device)
    rows = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=len(places))
    return torch.zeros(len(lengths), device=device).index_add(0, rows, logps) / lengths
