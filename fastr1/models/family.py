"""What a family of video language models offers, and the one way to it.

A family is a folder beside this file with a row in `FAMILIES`. Its module offers the three functions of `Family`; what
they return is a `Processor` (text and frames, no weights) and a `VideoLanguageModel` (the network). Everything else of
fastr1 knows these two classes and nothing of the families.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast, get_args

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from fastr1.config import ModelConfig, ModelPart
from fastr1.models.devices import parse_device, resolve_dtype
from fastr1.models.packed_attention import choose_packed_backend
from fastr1.models.packed_forward import forward_packed
from fastr1.models.packed_layout import PackedLayout
from fastr1.models.positions import packed_positions, padded_positions
from fastr1.models.processor import Processor

# "model_type" of a model folder's config.json → the module of its family
FAMILIES = {"tinyllava": "fastr1.models.tinyllava"}

T = TypeVar("T")


class ModelFileError(ValueError):
    """A model folder cannot be read. The message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class DecoderLayout:
    """The shape of the text decoder: what rollout, attention and arithmetic about speed need to know of it."""

    num_layers: int
    hidden_size: int  # D
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # V
    is_head_tied: bool  # the head is the embedding

    def kv_bytes(self, itemsize: int) -> int:
        """Keys and values of one token in all layers, with so many bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


class VideoLanguageModel(nn.Module, ABC):
    """Vision tower → connector → decoder with a head. Symbols: B prompts, G completions each, see `schema`.

    A family provides three submodules and the abstract methods; left padding, caching and the packed forward are the
    same for all of them and live here.

    Attributes:
        packed_attn_implementation: what computes the attention of packed completions.
        media_token_ids: ids of the vocabulary that stand for a video in a prompt; sampling never draws them.
    """

    vision_tower: nn.Module
    connector: nn.Module
    language_model: nn.Module
    packed_attn_implementation: str = ModelConfig.packed_attn_implementation
    media_token_ids: tuple[int, ...] = ()

    @property
    @abstractmethod
    def layout(self) -> DecoderLayout:
        """The shape of the decoder."""

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The decoder without its head, called as a model of transformers.

        It offers `config` and `embed_tokens`, and hands keywords that it does not know to its attention.
        """

    @property
    @abstractmethod
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (V, D) and bias (V,) of the head: logits are hidden @ weightᵀ + bias."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision tower: the frames of one video (F, 3, H, W) → its features, of a shape of the family's own."""

    @abstractmethod
    def visual_tokens(self, videos: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """(Q, D) per video, each given as pixels (F, 3, H, W) or as features from `encode`."""

    @abstractmethod
    def embed_prompt(
        self,
        prompt_ids: torch.Tensor,  # (L,)
        visual_tokens: torch.Tensor,  # (Q, D)
    ) -> torch.Tensor:
        """Embeddings of one prompt with the visual tokens in their place: (P, D)."""

    @abstractmethod
    def save(self, path: Path, *, state_dict: dict[str, torch.Tensor] | None = None, dtype: Any = None) -> None:
        """Write configuration and weights into an existing folder.

        `state_dict` replaces the model's own (one consolidated over ranks); `dtype` converts floating tensors.
        """

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        return cast(torch.device, self.decoder.embed_tokens.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return cast(torch.dtype, self.decoder.embed_tokens.weight.dtype)

    def freeze(self, parts: Sequence[str]) -> None:
        """Stop the gradients of whole parts, any of `config.ModelPart`."""
        for name in parts:
            if name not in get_args(ModelPart):
                raise ValueError(f"freeze: unknown part {name!r}; choose from {', '.join(get_args(ModelPart))}")
            getattr(self, name).requires_grad_(False)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute decoder layers in the backward pass."""
        self.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def positions(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Positions that count real tokens only, from 0: (B, L) int64."""
        return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)

    def prompt_positions(self, prompt_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, int]:
        """Where a prompt of `num_tokens` tokens lies, those of its video included, in rollout and training alike.

        Returns: the positions of its tokens, (L,) int64, or (3, L) where the decoder has them in time, height and
            width; and the position of the first token of a completion, from which the others count on.
        """
        return torch.arange(num_tokens, device=self.device), num_tokens

    def embed_prompts(
        self,
        prompt_ids: Sequence[torch.Tensor],  # B × (L_i,)
        visual_tokens: Sequence[torch.Tensor],  # B × (Q, D)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompt embeddings (B, P, D) and their attention mask (B, P) int64."""
        rows = [self.embed_prompt(ids, tokens) for ids, tokens in zip(prompt_ids, visual_tokens, strict=True)]
        longest = max(row.shape[0] for row in rows)
        embeds = torch.stack([F.pad(row, (0, 0, longest - row.shape[0], 0)) for row in rows])
        lengths = torch.tensor([row.shape[0] for row in rows], device=embeds.device)
        mask = torch.arange(longest, device=embeds.device)[None] >= (longest - lengths)[:, None]
        return embeds, mask.long()

    @torch.no_grad()
    def prompt_lengths(self, prompt_ids: Sequence[torch.Tensor], visual_tokens: Sequence[torch.Tensor]) -> list[int]:
        """Tokens of every prompt, those of its video included."""
        pairs = zip(prompt_ids, visual_tokens, strict=True)
        return [len(self.embed_prompt(ids, tokens)) for ids, tokens in pairs]

    def prefill(
        self,
        embeds: torch.Tensor,  # (B, P, D), left-padded
        attention_mask: torch.Tensor,  # (B, P)
        num_generations: int = 1,
        position_ids: torch.Tensor | None = None,  # (B, P) or (3, B, P); counted from the mask if None
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Forward each prompt once; returns its keys and values repeated for G completions and the last hidden state
        (B·G, 1, D)."""
        cache = DynamicCache(config=self.decoder.config)
        out = self.decoder(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=self.positions(attention_mask) if position_ids is None else position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(num_generations)
        return cache, out.last_hidden_state[:, -1:].repeat_interleave(num_generations, dim=0)

    def extend(
        self,
        token_ids: torch.Tensor,  # (R, t) int64, the next tokens of every row
        attention_mask: torch.Tensor,  # (R, L) of everything up to and including them
        cache: DynamicCache,  # of L − t tokens; grows by t
        position_ids: torch.Tensor | None = None,  # (R, t) or (3, R, t); counted from the mask if None
    ) -> torch.Tensor:
        """Hidden states (R, t, D) of tokens behind a cache."""
        if position_ids is None:
            position_ids = self.positions(attention_mask)[:, -token_ids.shape[1] :]
        hidden: torch.Tensor = self.decoder(
            inputs_embeds=self.decoder.embed_tokens(token_ids),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
        ).last_hidden_state
        return hidden

    def forward(self, compute: Callable[[Self], T]) -> T:
        """`compute(self)`: the one door through which DeepSpeed sees what is differentiated, whatever that is."""
        return compute(self)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits from hidden states: (..., D) → (..., V)."""
        return F.linear(hidden, *self.head)

    def completion_states(
        self,
        prompt_ids: Sequence[torch.Tensor],  # B × (L_i,) int64
        visual_tokens: Sequence[torch.Tensor],  # B × (Q, D)
        input_ids: torch.Tensor,  # int64, every token of the completions but the last of each, one after another
        layout: PackedLayout,
    ) -> torch.Tensor:
        """Hidden states (N, D) that predict the N completion tokens, one completion after another.

        Each prompt, video included, is forwarded and back-propagated once for its completions, and nothing is padded.
        """
        prompts = [self.embed_prompt(ids, tokens) for ids, tokens in zip(prompt_ids, visual_tokens, strict=True)]
        embeds = torch.cat([*prompts, self.decoder.embed_tokens(input_ids)])[None]
        backend = choose_packed_backend(self.packed_attn_implementation, embeds.device, embeds.dtype)
        positions = packed_positions(self.prompt_positions, prompt_ids, layout, embeds.device)
        hidden = forward_packed(self.decoder, embeds, layout, position_ids=positions, backend=backend)
        return hidden[0, layout.predicting_states(embeds.device)]

    def padded_logits(
        self,
        prompt_ids: Sequence[torch.Tensor],  # B × (L_i,) int64
        visual_tokens: Sequence[torch.Tensor],  # B × (Q, D)
        completion_ids: torch.Tensor,  # (B·G, T) int64, right-padded
        completion_mask: torch.Tensor,  # (B·G, T) bool
    ) -> torch.Tensor:
        """Logits (B·G, T, V) that predict each completion token: the slow twin of `completion_states`, each completion
        a padded row of its own behind its prompt."""
        embeds, mask = self.embed_prompts(prompt_ids, visual_tokens)
        repeats = completion_ids.shape[0] // len(prompt_ids)
        positions = padded_positions(self.prompt_positions, prompt_ids, mask, completion_ids.shape[1] - 1)
        rows = [embeds.repeat_interleave(repeats, dim=0), self.decoder.embed_tokens(completion_ids)[:, :-1]]
        mask = torch.cat([mask.repeat_interleave(repeats, dim=0), completion_mask[:, :-1].long()], dim=1)
        out = self.decoder(
            inputs_embeds=torch.cat(rows, dim=1),
            attention_mask=mask,
            position_ids=positions.repeat_interleave(repeats, dim=-2),
            use_cache=False,
        )
        return self.project(out.last_hidden_state[:, embeds.shape[1] - 1 :])


class Family(Protocol):
    """The module of a family."""

    def load_processor(self, path: Path) -> Processor:
        """The processor of a model folder."""

    def load_model(
        self, path: Path, *, dtype: torch.dtype, device: torch.device, attn_implementation: str
    ) -> VideoLanguageModel:
        """The model of a model folder in evaluation mode. Raises ModelFileError where a file is not as it must."""

    def build_model(self, config: dict[str, Any]) -> VideoLanguageModel:
        """A model with random weights from what a model folder's config.json holds."""


def load_processor(path: str | Path) -> Processor:
    """The processor of a model folder, whatever its family. Raises ModelFileError, DataError."""
    return _family_of(read_config(path), Path(path) / "config.json").load_processor(Path(path))


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = ModelConfig.dtype,
    device: torch.device | str | None = None,
    attn_implementation: str = ModelConfig.attn_implementation,
) -> VideoLanguageModel:
    """The model of a model folder, whatever its family, in evaluation mode.

    Args:
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        device: None is this process's GPU where there is one, else the CPU.

    Raises: ModelFileError when a file is missing or unreadable, or does not hold what config.json says; ConfigError for
        a device that is not here.
    """
    where = device if isinstance(device, torch.device) else parse_device(device)
    number = resolve_dtype(dtype, where) if isinstance(dtype, str) else dtype
    family = _family_of(read_config(path), Path(path) / "config.json")
    return family.load_model(Path(path), dtype=number, device=where, attn_implementation=attn_implementation)


def build_model(config: dict[str, Any]) -> VideoLanguageModel:
    """A model with random weights from what a model folder's config.json holds."""
    return _family_of(config, Path("the given configuration")).build_model(config)


def save_model(
    path: str | Path,
    model: VideoLanguageModel,
    processor: Processor,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that `load_model` and `load_processor` read; arguments as in `VideoLanguageModel.save`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder, state_dict=state_dict, dtype=dtype)
    processor.save(folder)


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelFileError."""
    return read_json(Path(path) / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises ModelFileError."""
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise ModelFileError(f"{file}: {reason}; point model.path at a model folder") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ModelFileError(f"{file}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{file}: holds a {type(content).__name__}, expected a JSON object; copy the file again")
    return content


def _family_of(config: dict[str, Any], where: Path) -> Family:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise ModelFileError(
            f"{where}: model_type is {name!r}; known are {known}: point model.path at a model of one of these families"
        )
    return cast(Family, importlib.import_module(FAMILIES[name]))
