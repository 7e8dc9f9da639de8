"""What a rollout took: times, tokens, and about how many bytes its steps read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastr1.models import VideoLanguageModel
from fastr1.rollout.graphs import StepGraphs


class RolloutCosts:
    """Counts of one rollout. Times end when the device has done its work: a rollout ends with a look at the device."""

    def __init__(self) -> None:
        self.warm_up_seconds = self.prefill_seconds = self.decode_seconds = 0.0
        self.prompt_lengths: list[int] = []
        self.num_completions = 0
        self.num_steps = self.computed_rows = self.read_suffix_tokens = 0
        self.num_guesses = self.guessed_tokens = self.right_tokens = 0

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """What later rollouts of no more than this size do not take again: arenas, kernels, graphs."""
        start = time.perf_counter()
        yield
        self.warm_up_seconds += time.perf_counter() - start

    @contextmanager
    def prefill(self, embeds: Sequence[torch.Tensor], num_completions: int) -> Iterator[None]:
        self.num_completions = num_completions
        self.prompt_lengths = [len(rows) for rows in embeds]
        start = time.perf_counter()
        yield
        self.prefill_seconds = time.perf_counter() - start

    @contextmanager
    def decode(self) -> Iterator[None]:
        start, before = time.perf_counter(), self.warm_up_seconds
        yield
        self.decode_seconds = time.perf_counter() - start - (self.warm_up_seconds - before)

    def add_step(self, num_rows: int, suffix_tokens: int) -> None:
        """A step that computed so many rows, padding and ended ones among them, and read so many tokens of
        completions."""
        self.num_steps += 1
        self.computed_rows += num_rows
        self.read_suffix_tokens += suffix_tokens

    def add_guess(self, num_tokens: int, num_right: int) -> None:
        """So many tokens were guessed behind one completion in one step, none perhaps."""
        self.num_guesses += 1
        self.guessed_tokens += num_tokens
        self.right_tokens += num_right

    def metrics(self, model: VideoLanguageModel, num_tokens: int, graphs: StepGraphs | None) -> dict[str, float]:
        """Seconds of warming up; tokens per second, the warm-up included only in those of the whole rollout; 10⁹ bytes
        per second that decoding read; the share of computed rows that gave no token: padding, ended completions and
        wrong guesses; with speculation, tokens of a completion per step, and the share of guessed tokens that were
        right.

        The bytes of a step are those of the weights, of all prompts' keys and values, once each, and of every computed
        row's own. It is too much where all completions of a prompt have ended and for rows of padding, too little where
        a group takes several tiles of the kernel.
        """
        layout, size = model.layout, model.dtype.itemsize
        token_bytes = layout.kv_bytes(size)
        weights = sum(p.numel() for p in model.decoder.layers.parameters())
        weight_bytes = (weights + layout.vocab_size * layout.hidden_size) * size
        read = self.num_steps * (weight_bytes + sum(self.prompt_lengths) * token_bytes)
        read += self.read_suffix_tokens * token_bytes
        found = {
            "prefill_tokens_per_second": sum(self.prompt_lengths) / self.prefill_seconds,
            "tokens_per_second": num_tokens / (self.warm_up_seconds + self.prefill_seconds + self.decode_seconds),
            "warm_up_seconds": self.warm_up_seconds,
            "decode_steps": float(self.num_steps),
        }
        if self.num_steps:
            decoded = num_tokens - self.num_completions  # the first of each was drawn by the prefill
            found["decode_tokens_per_second"] = decoded / self.decode_seconds
            found["decode_gb_per_second"] = read / self.decode_seconds / 1e9
            found["wasted_rows"] = 1 - decoded / self.computed_rows
        if self.num_guesses:
            found["mean_acceptance_length"] = 1 + self.right_tokens / self.num_guesses
            found["draft_acceptance_rate"] = self.right_tokens / max(self.guessed_tokens, 1)
        if graphs:
            found |= {"graph_replays": float(graphs.num_replays), "graph_captures": float(graphs.num_captures)}
        return found
