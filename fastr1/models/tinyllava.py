"""TinyLLaVA-Video: SigLIP tower → group resampler → Qwen2 decoder, the visual tokens spliced into the prompt.

Refuses nothing about the input video (frames come preprocessed). Parameter names are those of the released
checkpoints, so `load_state_dict` needs no renaming. Source: arXiv 2504.09641 and its base, arXiv 2501.15513.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.cache_utils import DynamicCache

from fastr1.models.connector import GroupResampler
from fastr1.schema import IMAGE_TOKEN_INDEX

MODULES = ("vision_tower", "connector", "language_model")


@dataclass(frozen=True)
class TinyLlavaConfig:
    """What the architecture needs from a checkpoint's config.json; `raw` keeps the whole file for saving."""

    text: Qwen2Config
    vision: SiglipVisionConfig
    num_queries: int
    group: int
    num_resampler_layers: int
    max_length: int  # spliced sequences are cut here (`tokenizer_model_max_length`)
    vision_feature_layer: int
    raw: dict[str, Any]

    @property
    def max_prompt_tokens(self) -> int:
        """Token ids of a prompt, the placeholder among them, that fit beside the visual tokens."""
        return self.max_length - self.num_queries + 1

    @property
    def num_vision_layers(self) -> int:
        """Encoder layers that reach the selected hidden state; the rest is never computed."""
        layers = self.vision.num_hidden_layers
        return self.vision_feature_layer + layers + 1 if self.vision_feature_layer < 0 else self.vision_feature_layer


class VisionTower(nn.Module):
    """SigLIP up to the selected hidden state, without the first patch token (a quirk the weights were trained with)."""

    def __init__(self, config: SiglipVisionConfig, num_layers: int) -> None:
        super().__init__()
        self._vision_tower = nn.Module()
        self._vision_tower.vision_model = SiglipVisionModel(config)
        self.num_layers = num_layers
        for name, parameter in self.vision_model.named_parameters():
            if not self._is_used(name):
                parameter.requires_grad_(False)

    def _is_used(self, name: str) -> bool:
        parts = name.split(".")
        return parts[0] == "embeddings" or (parts[0] == "encoder" and int(parts[2]) < self.num_layers)

    @property
    def vision_model(self) -> SiglipVisionModel:
        return self._vision_tower.vision_model  # type: ignore[return-value]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # (F, 3, S, S) → (F, patches − 1, vision_dim)
        hidden = self.vision_model.embeddings(pixel_values)
        for layer in self.vision_model.encoder.layers[: self.num_layers]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]


class TinyLlavaVideo(nn.Module):
    """The video language model. Symbols: V videos, B prompts, G completions each, Q visual tokens, see `schema`."""

    def __init__(self, config: TinyLlavaConfig, *, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        config.text._attn_implementation = attn_implementation
        config.vision._attn_implementation = attn_implementation
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.num_vision_layers)
        self.connector = nn.Module()
        self.connector._connector = GroupResampler(
            config.vision.hidden_size,
            config.text.hidden_size,
            num_queries=config.num_queries,
            group=config.group,
            num_layers=config.num_resampler_layers,
        )
        self.language_model = Qwen2ForCausalLM(config.text)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def freeze(self, modules: Sequence[str]) -> None:
        """Stop gradients of whole modules (any of `MODULES`)."""
        for name in modules:
            if name not in MODULES:
                raise ValueError(f"freeze: unknown module {name!r}; choose from {', '.join(MODULES)}")
            getattr(self, name).requires_grad_(False)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute decoder layers in the backward pass; the prompt is then forwarded once per completion."""
        self.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def encode_frames(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tower only: (F, 3, S, S) → patch features (F, patches − 1, vision_dim)."""
        return self.vision_tower(pixel_values.to(self.dtype))

    def connect(self, features: torch.Tensor) -> torch.Tensor:
        """Connector only: (F, patches − 1, vision_dim) → (Q, D), or a batch of V of them → (V, Q, D)."""
        batched = features if features.dim() == 4 else features[None]
        tokens = self.connector._connector(batched.flatten(1, 2))  # type: ignore[operator]
        return tokens if features.dim() == 4 else tokens[0]

    def visual_tokens(self, videos: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """(Q, D) per video, given as pixel values (F, 3, S, S) or as features (F, patches − 1, vision_dim)."""
        features = [self.encode_frames(video) if video.dim() == 4 else video for video in videos]
        if len({f.shape for f in features}) == 1:
            return list(self.connect(torch.stack(features)))
        return [self.connect(f) for f in features]

    def encode_video(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual tokens of one video: (F, 3, S, S) → (Q, D)."""
        return self.connect(self.encode_frames(pixel_values))

    def build_inputs_embeds(
        self,
        input_ids: torch.Tensor,  # (L,) int64 with at most one −200
        video_features: torch.Tensor,  # (Q, D)
    ) -> torch.Tensor:
        """Text embeddings with the visual tokens in place of −200: (L − 1 + Q, D), cut at the maximum length."""
        at = (input_ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        if len(at) > 1:
            raise ValueError(
                f"input_ids holds {len(at)} video placeholders ({IMAGE_TOKEN_INDEX}); exactly one is allowed"
            )
        text = self.language_model.model.embed_tokens(input_ids.clamp_min(0))
        if at:
            text = torch.cat([text[: at[0]], video_features.to(text.dtype), text[at[0] + 1 :]])
        return text[: self.config.max_length]

    def embed_prompts(
        self,
        prompt_ids: Sequence[torch.Tensor],  # B × (L_i,)
        video_features: Sequence[torch.Tensor] | torch.Tensor,  # B × (Q, D)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompt embeddings (B, P, D) and their attention mask (B, P) int64."""
        rows = [self.build_inputs_embeds(i, f) for i, f in zip(prompt_ids, video_features, strict=True)]
        longest = max(row.shape[0] for row in rows)
        embeds = torch.stack([nn.functional.pad(row, (0, 0, longest - row.shape[0], 0)) for row in rows])
        lengths = torch.tensor([row.shape[0] for row in rows], device=embeds.device)
        mask = torch.arange(longest, device=embeds.device)[None] >= (longest - lengths)[:, None]
        return embeds, mask.long()

    def prefill(
        self,
        embeds: torch.Tensor,  # (B, P, D), left-padded
        attention_mask: torch.Tensor,  # (B, P)
        num_generations: int = 1,
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Forward each prompt once; returns its keys and values repeated for G completions and the last hidden state
        (B·G, 1, D). Gradients flow back through both."""
        cache = DynamicCache(config=self.config.text)
        out = self.language_model.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids_of(attention_mask),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(num_generations)
        return cache, out.last_hidden_state[:, -1:].repeat_interleave(num_generations, dim=0)

    def forward(
        self,
        prompt_ids: Sequence[torch.Tensor],  # B × (L_i,) int64 with −200
        videos: Sequence[torch.Tensor],  # B × features of `encode_frames`, or pixel values where the tower is trained
        completion_ids: torch.Tensor,  # (B·G, T) int64, right-padded
        completion_mask: torch.Tensor,  # (B·G, T) bool
        share_prefix: bool = True,
    ) -> torch.Tensor:
        """Logits that predict each completion token: (B·G, T, V).

        With `share_prefix` each prompt, video included, is forwarded and back-propagated once for its G completions;
        without, once per completion. Both give the same values and gradients.
        """
        num_generations = completion_ids.shape[0] // len(prompt_ids)
        embeds, mask = self.embed_prompts(prompt_ids, self.visual_tokens(videos))
        full_mask = torch.cat([mask.repeat_interleave(num_generations, dim=0), completion_mask.long()], dim=1)
        tail = self.language_model.model.embed_tokens(completion_ids)[:, :-1]
        decoder = self.language_model.model
        if share_prefix:
            cache, last = self.prefill(embeds, mask, num_generations)
            hidden = last
            if tail.shape[1]:
                positions = position_ids_of(full_mask)[:, embeds.shape[1] : -1]
                out = decoder(
                    inputs_embeds=tail, attention_mask=full_mask[:, :-1], position_ids=positions, past_key_values=cache
                )
                hidden = torch.cat([last, out.last_hidden_state], dim=1)
        else:
            rows = torch.cat([embeds.repeat_interleave(num_generations, dim=0), tail], dim=1)
            positions = position_ids_of(full_mask)[:, :-1]
            out = decoder(inputs_embeds=rows, attention_mask=full_mask[:, :-1], position_ids=positions, use_cache=False)
            hidden = out.last_hidden_state[:, embeds.shape[1] - 1 :]
        return self.language_model.lm_head(hidden)


def position_ids_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only, from 0: (B, L) int64."""
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
