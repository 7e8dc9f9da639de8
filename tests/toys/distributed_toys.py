"""A toy video language model, its plain-PyTorch training loop, and helpers to train it in one or two processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fastr1.config import OptimConfig
from fastr1.training.distributed import DistributedModel

VOCABULARY = 13
NUM_UPDATES = 6
OPTIM = OptimConfig(learning_rate=1e-2, warmup_ratio=0.3, weight_decay=0.1, max_grad_norm=0.5)


class ToyModel(nn.Module):
    """Frozen vision tower, connector (used only with frames), one block, head tied to the embedding."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embed_tokens = nn.Embedding(VOCABULARY, 8)
        self.vision_tower = nn.Linear(5, 8)
        self.connector = nn.Linear(8, 8)
        self.block = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("scale", torch.tensor(1.5))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        self.vision_tower.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """ids (B, T) int64, frames (B, 5) or None -> logits (B, T, V)."""
        hidden = self.embed_tokens(ids)
        if frames is not None:
            hidden = hidden + self.connector(self.vision_tower(frames.to(hidden.dtype)))[:, None]
        return self.lm_head(torch.tanh(self.block(hidden)) * self.scale.to(hidden.dtype))


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def make_batches(update: int, split: Sequence[int], *, last_without_frames: bool = False) -> list[Batch]:
    """The four sequences of one update cut into micro-batches of the given sizes."""
    generator = torch.Generator().manual_seed(100 + update)
    ids = torch.randint(0, VOCABULARY, (4, 6), generator=generator)
    labels = torch.randint(0, VOCABULARY, (4, 6), generator=generator)
    frames = torch.randn(4, 5, generator=generator)
    batches: list[Batch] = []
    start = 0
    for size in split:
        rows = slice(start, start + size)
        start += size
        batches.append((ids[rows], labels[rows], None if last_without_frames and start == 4 else frames[rows]))
    return batches


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Divided by a constant, so that micro-batches add up; the constant makes the norms exceed max_grad_norm."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / 2.4


def train(
    engine: DistributedModel, splits: Sequence[Sequence[int]], *, last_without_frames: bool = False
) -> list[float]:
    """One update per split; rank r of W takes micro-batches r, r + W, … Returns the gradient norms."""
    norms = []
    for update, split in enumerate(splits):
        batches = make_batches(update, split, last_without_frames=last_without_frames)
        for ids, labels, frames in batches[engine.rank :: engine.world_size]:
            engine.backward(token_loss(engine(ids, frames), labels))
        norms.append(engine.step())
    return norms


def cosine_factor(update: int, num_warmup_updates: int, num_updates: int) -> float:
    """Linear warm-up from 0, then half a cosine to 0."""
    if update < num_warmup_updates:
        return update / num_warmup_updates
    return 0.5 * (1 + math.cos(math.pi * (update - num_warmup_updates) / (num_updates - num_warmup_updates)))


def train_plain(
    optim: OptimConfig, splits: Sequence[Sequence[int]], *, last_without_frames: bool = False
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The oracle: torch.optim.AdamW, clip_grad_norm_ and a hand-written cosine, one process, no DeepSpeed."""
    model = ToyModel()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
    )
    norms = []
    for update, split in enumerate(splits):
        for ids, labels, frames in make_batches(update, split, last_without_frames=last_without_frames):
            token_loss(model(ids, frames), labels).backward()
        norms.append(float(nn.utils.clip_grad_norm_(trainable, optim.max_grad_norm or math.inf)))
        warmup = math.ceil(optim.warmup_ratio * NUM_UPDATES)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * cosine_factor(update, warmup, NUM_UPDATES)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms


def make_engine(stage: int, *, optim: OptimConfig = OPTIM, dtype: torch.dtype = torch.float32) -> DistributedModel:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # The default keeps small parameters whole, which would leave nothing to test in a toy.
        zero["stage3_param_persistence_threshold"] = 0
    return DistributedModel(ToyModel(dtype), optim, {"zero_optimization": zero}, dtype=dtype, num_steps=NUM_UPDATES)


def full_parameters(engine: DistributedModel) -> dict[str, torch.Tensor]:
    """Copies of all parameters, on every rank."""
    with engine.gathered_parameters() as module:
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def run_on_two_ranks(work: Callable[[int, Path], None], folder: Path) -> None:
    """Call `work(rank, folder)` in two gloo processes; an exception in either fails the caller.

    They are forked from a process that has the libraries imported and has done nothing else, one for all tests.
    """
    torch.multiprocessing.set_forkserver_preload(["fastr1.training.grpo", "deepspeed.runtime.zero.muon.muon_optimizer"])
    torch.multiprocessing.start_processes(_rank_main, args=(work, folder), nprocs=2, start_method="forkserver")


def _rank_main(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    work(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
