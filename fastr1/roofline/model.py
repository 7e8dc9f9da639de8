"""What a model costs: FLOPs of its decoder by formula, those of tower and connector as torch counts them.

Symbols: D hidden, V vocabulary, P prompt length, T completion length, d = heads × head_dim. A FLOP is a multiplication
or an addition of a matrix product; what is not one (norms, activations, softmax, rotation) counts nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastr1.models import DecoderLayout, VideoLanguageModel, build_model


@dataclass(frozen=True)
class VisualFlops:
    """Tower and connector on one video; `backward` through what is trained of them."""

    forward: float
    backward: float


@dataclass(frozen=True)
class ForwardFlops:
    """One forward pass of the decoder, apart because their backward passes differ."""

    gemm: float  # with weights
    attention: float  # queries × keys and weights × values

    @property
    def total(self) -> float:
        return self.gemm + self.attention


@dataclass(frozen=True)
class ModelShape:
    """Everything that the arithmetic asks about a model."""

    layout: DecoderLayout
    dtype_bytes: int  # of a weight, a gradient and a cached number
    num_trainable: int  # parameters, wherever they are
    trains_decoder: bool  # else gradients only pass through it
    num_visual: int  # parameters of tower and connector
    visual: Callable[[Sequence[int]], VisualFlops]  # of the shape (F, 3, H, W) of the pixels of a video

    @property
    def num_body(self) -> int:
        """Weights of the layers' matrices: attention and a gated MLP."""
        layout = self.layout
        heads = 2 * layout.num_heads + 2 * layout.num_kv_heads  # query and output, key and value
        return layout.num_layers * layout.hidden_size * (heads * layout.head_dim + 3 * layout.intermediate_size)

    @property
    def num_head(self) -> int:
        """Weights of the head, V × D."""
        return self.layout.vocab_size * self.layout.hidden_size

    @property
    def weight_bytes(self) -> int:
        """What one pass over many tokens reads: layers and head. An embedding of its own is only looked up."""
        return (self.num_body + self.num_head) * self.dtype_bytes

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token."""
        return self.layout.kv_bytes(self.dtype_bytes)

    def attention_flops(self, num_pairs: float) -> float:
        """4·d per layer and pair of a query and a key that it sees."""
        layout = self.layout
        return 4.0 * layout.num_layers * layout.num_heads * layout.head_dim * num_pairs

    def forward_flops(self, prompt_length: int, lengths: Sequence[int], *, shares_prefix: bool = True) -> ForwardFlops:
        """A prompt and its completions: 2·body·tokens + 2·D·V·ΣT + attention, causal (P²/2 pairs within P tokens).

        The last token of a completion is predicted and predicts nothing, so it passes through the head's loss only: a
        completion is T − 1 tokens for the layers and T rows for the head. Without `shares_prefix` the prompt is
        forwarded with every completion.
        """
        inner = [length - 1 for length in lengths]
        num_prompts = 1 if shares_prefix else len(lengths)
        tokens = num_prompts * prompt_length + sum(inner)
        pairs = num_prompts * prompt_length**2 / 2 + sum(n * prompt_length + n**2 / 2 for n in inner)
        gemm = 2.0 * self.num_body * tokens + 2.0 * self.num_head * sum(lengths)
        return ForwardFlops(gemm, self.attention_flops(pairs))

    def backward_flops(self, forward: ForwardFlops) -> float:
        """Twice the forward pass; products with weights once where the weights get no gradient."""
        return forward.gemm * (2 if self.trains_decoder else 1) + 2 * forward.attention


def describe_model(model: VideoLanguageModel, config: dict[str, Any]) -> ModelShape:
    """The shape of a model whose frozen parts have no gradient; `config` is what its config.json holds.

    Tower and connector are counted on a copy without storage, so parameters may be partitioned or on any device.
    """
    parts = [model.vision_tower, model.connector, model.language_model]
    trained = tuple(any(p.requires_grad for p in part.parameters()) for part in parts)
    visual = [p for part in parts[:2] for p in part.parameters()]
    return ModelShape(
        layout=model.layout,
        dtype_bytes=model.dtype.itemsize,
        num_trainable=sum(_numel(p) for p in model.parameters() if p.requires_grad),
        trains_decoder=trained[2],
        num_visual=sum(map(_numel, visual)),
        visual=_VisualCounter(config, trains_tower=trained[0], trains_connector=trained[1]),
    )


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO-3 left only a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class _VisualCounter:
    """FLOPs of tower and connector by torch's counter, once for every shape of a video."""

    def __init__(self, config: dict[str, Any], *, trains_tower: bool, trains_connector: bool) -> None:
        with torch.device("meta"):
            self._model = build_model(config)
        self._model.requires_grad_(False)
        self._model.vision_tower.requires_grad_(trains_tower)
        self._model.connector.requires_grad_(trains_connector)
        self._is_trained = trains_tower or trains_connector
        self._count = functools.cache(self._measure)

    def __call__(self, shape: Sequence[int]) -> VisualFlops:
        return self._count(tuple(shape))

    def _measure(self, shape: tuple[int, ...]) -> VisualFlops:
        pixels = torch.empty(shape, device="meta")
        with FlopCounterMode(display=False) as forward:
            (tokens,) = self._model.visual_tokens([self._model.encode(pixels)])
        with FlopCounterMode(display=False) as backward:
            if self._is_trained:
                tokens.sum().backward()
        return VisualFlops(float(forward.get_total_flops()), float(backward.get_total_flops()))
