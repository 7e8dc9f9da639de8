"""What a step costs: FLOPs and bytes of each of its phases, from the lengths that were drawn.

Bytes are those that no schedule avoids: weights once per pass and phase, keys and values, gradients and the state of
the optimizer. Activations are left out, and so is what ranks send to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastr1.roofline.model import ForwardFlops, ModelShape

if TYPE_CHECKING:
    from fastr1.roofline.machine import Machine


@dataclass(frozen=True)
class GroupWork:
    """A prompt with its video and completions.

    Raises: ValueError for a completion without a token, which no rollout draws.
    """

    prompt_length: int  # P, visual tokens included
    completion_lengths: tuple[int, ...]  # T of each of the G completions, end token included
    pixel_shape: tuple[int, ...]  # (F, 3, H, W)
    trained_lengths: tuple[int, ...] | None = (
        None  # of those in the training passes; None: all; (): of a group left out
    )

    def __post_init__(self) -> None:
        if not self.completion_lengths or min(self.completion_lengths) < 1:
            raise ValueError(
                f"completion_lengths is {self.completion_lengths}; a group has completions of at least one token each"
            )


@dataclass(frozen=True)
class StepWork:
    """One update of one rank."""

    groups: Sequence[GroupWork]
    has_reference: bool  # grpo.beta is not 0
    has_old_policy: bool = False  # log-probabilities before the first of several steps of the optimizer
    num_iterations: int = 1  # training passes over the completions
    num_steps: int = 1  # of the optimizer, in all of them
    shares_prefix: bool = True  # in the training and reference passes
    is_checkpointed: bool = False  # decoder layers run forward once more in the backward pass
    num_ranks: int = 1  # that share the state of the optimizer

    @property
    def trained(self) -> list[GroupWork]:
        """The groups of the training passes, with the completions that take part."""
        return [
            group if group.trained_lengths is None else replace(group, completion_lengths=group.trained_lengths)
            for group in self.groups
            if group.trained_lengths != ()
        ]


@dataclass(frozen=True)
class Cost:
    """A phase as launches one after another, each bound by the slower of products and memory: (n,) float64 each."""

    flops: torch.Tensor
    bytes: torch.Tensor
    recomputed: float = 0.0  # the part of the FLOPs that only saves memory

    @classmethod
    def once(cls, flops: float, num_bytes: float, recomputed: float = 0.0) -> Cost:
        numbers = torch.tensor([[flops], [num_bytes]], dtype=torch.float64)
        return cls(numbers[0], numbers[1], recomputed)

    @property
    def model_flops(self) -> float:
        """What utilisation counts: the FLOPs that the result needs, nothing recomputed."""
        return float(self.flops.sum()) - self.recomputed

    def floor_seconds(self, machine: Machine) -> float:
        """Σ max(FLOPs / rate of products, bytes / rate of memory)."""
        compute, memory = self.flops / machine.gemm_flops_per_second, self.bytes / machine.bytes_per_second
        return float(torch.maximum(compute, memory).sum())


def step_costs(model: ModelShape, work: StepWork) -> dict[str, Cost]:
    """The cost of vision, prefill, decode, old_policy, reference, train and optimizer."""
    optimizer = optimizer_bytes(model.dtype_bytes) * model.num_trainable / work.num_ranks
    return {
        "vision": _vision(model, work),
        "prefill": _prefill(model, work),
        "decode": _decode(model, work),
        "old_policy": _scoring(model, work, work.has_old_policy),
        "reference": _scoring(model, work, work.has_reference),
        "train": _train(model, work),
        "optimizer": Cost.once(0.0, optimizer * work.num_steps),
    }


def optimizer_bytes(dtype_bytes: int) -> int:
    """Moved by Adam per parameter: two moments and fp32 weights read and written, the gradient read, weights of another
    precision written. bf16: 28."""
    return 3 * 8 + dtype_bytes + (dtype_bytes if dtype_bytes < 4 else 0)


def _vision(model: ModelShape, work: StepWork) -> Cost:
    """Tower and connector, once per video."""
    flops = sum(model.visual(group.pixel_shape).forward for group in work.groups)
    return Cost.once(flops, model.num_visual * model.dtype_bytes)


def _prefill(model: ModelShape, work: StepWork) -> Cost:
    """Every prompt through the layers, its last position through the head."""
    flops = 0.0
    for group in work.groups:
        length = group.prompt_length
        flops += 2.0 * model.num_body * length + model.attention_flops(length**2 / 2) + 2.0 * model.num_head
    written = sum(group.prompt_length for group in work.groups) * model.kv_bytes
    return Cost.once(flops, model.weight_bytes + written)


def _decode(model: ModelShape, work: StepWork) -> Cost:
    """A launch per token step, over every sequence that goes on: in step t ≥ 1 the weights are read once, the prompt's
    keys and values once per group, and those of t tokens for each sequence. The first token comes from the prefill."""
    live = _alive([length for group in work.groups for length in group.completion_lengths])
    if not len(live):
        return Cost.once(0.0, 0.0)
    longest = [max(group.completion_lengths) for group in work.groups]
    prompts = [group.prompt_length for group in work.groups]
    seen = live * torch.arange(1, len(live) + 1, dtype=torch.float64)  # completion tokens, by all sequences
    read = seen + _alive(longest, prompts)
    of_each = [(length, group.prompt_length) for group in work.groups for length in group.completion_lengths]
    pairs = seen + _alive([length for length, _ in of_each], [prompt for _, prompt in of_each])
    flops = 2.0 * (model.num_body + model.num_head) * live + model.attention_flops(1) * pairs
    return Cost(flops, model.weight_bytes + model.kv_bytes * read)


def _alive(lengths: Sequence[int], weights: Sequence[float] | None = None) -> torch.Tensor:
    """For t = 1 … max − 1: how many of the lengths are more than t, or the sum of their weights."""
    values = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    ends = torch.bincount(torch.tensor(lengths, dtype=torch.int64), values).double()
    return ends.flip(0).cumsum(0).flip(0)[2:]


def _scoring(model: ModelShape, work: StepWork, is_there: bool) -> Cost:
    """A forward pass without gradient over what is trained on."""
    if not is_there or not work.trained:
        return Cost.once(0.0, 0.0)
    return Cost.once(sum(forward.total for forward in _forwards(model, work)), model.weight_bytes)


def _train(model: ModelShape, work: StepWork) -> Cost:
    """Forward and backward; with checkpointing the layers once more. Each reads the weights; gradients are written.

    Every iteration after the first makes the visual tokens again where a part they come from is trained.
    """
    if not work.trained:
        return Cost.once(0.0, 0.0)
    forwards, visual = _forwards(model, work), [model.visual(group.pixel_shape) for group in work.trained]
    times = work.num_iterations
    needed = times * sum(forward.total + model.backward_flops(forward) for forward in forwards)
    needed += sum(times * video.backward + (times - 1) * video.forward for video in visual if video.backward)
    moved = times * (2 * model.weight_bytes + model.num_trainable * model.dtype_bytes)
    if not work.is_checkpointed:
        return Cost.once(needed, moved)
    head = 2.0 * model.num_head * sum(sum(group.completion_lengths) for group in work.trained)
    again = times * (sum(forward.total for forward in forwards) - head)
    return Cost.once(needed + again, moved + times * model.num_body * model.dtype_bytes, again)


def _forwards(model: ModelShape, work: StepWork) -> list[ForwardFlops]:
    return [
        model.forward_flops(group.prompt_length, group.completion_lengths, shares_prefix=work.shares_prefix)
        for group in work.trained
    ]
