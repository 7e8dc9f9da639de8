"""TinyLLaVA-Video: SigLIP tower → group resampler → Qwen2 decoder, the visual tokens spliced into the prompt.

Refuses nothing about the input video (frames come preprocessed). Parameter names are those of the released
checkpoints, so `load_state_dict` needs no renaming. Source: arXiv 2504.09641 and its base, arXiv 2501.15513.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from fastr1.models.family import DecoderLayout, VideoLanguageModel
from fastr1.models.tinyllava.checkpoint import write_checkpoint
from fastr1.models.tinyllava.config import TinyLlavaConfig
from fastr1.models.tinyllava.connector import GroupResampler
from fastr1.models.tinyllava.prompts import IMAGE_TOKEN_INDEX


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


class TinyLlavaVideo(VideoLanguageModel):
    """The video language model. Features of a video are (F, patches − 1, vision_dim); frames are S × S pixels."""

    vision_tower: VisionTower
    language_model: Qwen2ForCausalLM

    def __init__(self, config: TinyLlavaConfig, *, attn_implementation: str) -> None:
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
    def layout(self) -> DecoderLayout:
        text = self.config.text
        return DecoderLayout(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            is_head_tied=bool(text.tie_word_embeddings),
        )

    @property
    def decoder(self) -> Any:
        return self.language_model.model

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.language_model.lm_head.weight, None

    def enable_gradient_checkpointing(self) -> None:
        """Also the layers of the tower, whose graph is kept for all videos of an update where it is trained."""
        super().enable_gradient_checkpointing()
        tower = self.vision_tower.vision_model
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tower only: (F, 3, S, S) → patch features (F, patches − 1, vision_dim)."""
        features: torch.Tensor = self.vision_tower(pixels.to(self.dtype))
        return features

    def connect(self, features: torch.Tensor) -> torch.Tensor:
        """Connector only: a batch of V videos (V, F, patches − 1, vision_dim) → (V, Q, D)."""
        tokens: torch.Tensor = self.connector._connector(features.flatten(1, 2))  # type: ignore[operator]
        return tokens

    def visual_tokens(self, videos: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        features = [self.encode(video) if video.dim() == 4 else video for video in videos]
        if len({f.shape for f in features}) == 1:
            return list(self.connect(torch.stack(features)))
        return [self.connect(f[None])[0] for f in features]

    def embed_prompt(
        self,
        prompt_ids: torch.Tensor,  # (L,) int64 with at most one −200
        visual_tokens: torch.Tensor,  # (Q, D)
    ) -> torch.Tensor:
        """Text embeddings with the visual tokens in place of −200: (L − 1 + Q, D), cut at the maximum length."""
        at = (prompt_ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        if len(at) > 1:
            raise ValueError(
                f"prompt_ids holds {len(at)} video placeholders ({IMAGE_TOKEN_INDEX}); exactly one is allowed"
            )
        text = self.decoder.embed_tokens(prompt_ids.clamp_min(0))
        if at:
            text = torch.cat([text[: at[0]], visual_tokens.to(text.dtype), text[at[0] + 1 :]])
        embeds: torch.Tensor = text[: self.config.max_length]
        return embeds

    def save(self, path: Path, *, state_dict: dict[str, torch.Tensor] | None = None, dtype: Any = None) -> None:
        write_checkpoint(self.config, dict(self.state_dict()) if state_dict is None else state_dict, path, dtype=dtype)
