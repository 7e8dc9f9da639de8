"""Tiny text decoders of transformers behind a VideoLanguageModel: prompts are plain text ids, videos are empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from fastr1.models import DecoderLayout, VideoLanguageModel
from fastr1.rollout.params import SamplingParams
from fastr1.schema import Rollout

SIZE, HEAD_DIM, VOCABULARY = 32, 8, 259
M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e2, "mrope_section": [2, 1, 1]}}
# Class, configuration, and settings that its tiny version needs.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": HEAD_DIM}),
    "qwen2.5-vl": (Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig, M_ROPE),
    "qwen3-vl": (Qwen3VLTextModel, Qwen3VLTextConfig, {"head_dim": HEAD_DIM, **M_ROPE}),
}


class WithHead(nn.Module):
    """A bare decoder and a head."""

    def __init__(self, decoder: nn.Module, lm_head: nn.Linear) -> None:
        super().__init__()
        self.model, self.lm_head = decoder, lm_head


class TextModel(VideoLanguageModel):
    """A decoder without a video; `language_model` has a `model` and an `lm_head`."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.vision_tower = self.connector = nn.Identity()
        self.language_model = language_model

    @property
    def layout(self) -> DecoderLayout:
        config = self.decoder.config
        heads = (config.num_attention_heads, config.num_key_value_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        is_tied = self.head[0] is self.decoder.embed_tokens.weight
        return DecoderLayout(*sizes, *heads, head_dim, config.vocab_size, is_tied)

    @property
    def decoder(self) -> Any:
        return self.language_model.model

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.language_model.lm_head.weight, None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("there is no video")

    def visual_tokens(self, videos: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return videos

    def embed_prompt(self, prompt_ids: torch.Tensor, visual_tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.decoder.embed_tokens(prompt_ids), visual_tokens.to(self.dtype)])

    def save(self, path: Any, *, state_dict: dict[str, torch.Tensor] | None = None, dtype: Any = None) -> None:
        raise NotImplementedError("a toy is not saved")


def build_text_model(
    family: str, *, kind: type[TextModel] = TextModel, is_tied: bool = False, end_scale: float = 1.6, **options: Any
) -> TextModel:
    """Two layers of random weights under which attention is far from uniform; `options` replace settings."""
    made, config, more = FAMILIES[family]
    torch.manual_seed(0)
    settings = {
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "tie_word_embeddings": is_tied,
        "max_position_embeddings": 512,
    }
    model = made(config(**{**settings, **more, **options}))
    if not hasattr(model, "lm_head"):
        model = WithHead(model, nn.Linear(SIZE, VOCABULARY, bias=False))
        if is_tied:
            model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which transformers makes ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed_tokens" in name or "lm_head" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.lm_head.weight[:2] *= end_scale  # some completions end early, some never
    return kind(model).eval()


VIDEO = 258  # stands for every token of a video; `prompts_of` may draw it too, where there is none
VISION: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Qwen2_5_VLTextModel": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {"fullatt_block_indexes": [0], "window_size": 16, "tokens_per_second": 2},
    ),
    "Qwen3VLTextModel": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {"deepstack_visual_indexes": [], "num_position_embeddings": 16},
    ),
}


def for_generation(model: TextModel, video_id: int = VOCABULARY) -> Any:
    """What has `generate` around decoder and head of a model: around a text stack, a whole model with a tiny tower."""
    if hasattr(model.language_model, "generate"):
        return model.language_model
    made, config, more = VISION[type(model.decoder).__name__]
    tower = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}
    ids = {"image_token_id": VOCABULARY + 1, "video_token_id": video_id, "vision_start_token_id": VOCABULARY + 2}
    text = model.decoder.config.to_dict()
    whole = made(config(text_config=text, vision_config={**tower, **more, "out_hidden_size": SIZE}, **ids)).eval()
    whole.model.language_model, whole.lm_head = model.decoder, model.language_model.lm_head
    return whole


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    """Random text."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def no_videos(number: int) -> list[torch.Tensor]:
    return [torch.zeros(0, SIZE)] * number


def greedy_by_full_forwards(model: TextModel, prompt: torch.Tensor, length: int, ends: Sequence[int]) -> list[int]:
    """The oracle: the whole sequence forwarded again for every token, at positions in time, height and width."""
    positions, first = model.prompt_positions(prompt, len(prompt))
    positions = positions.expand(3, -1)
    ids: list[int] = []
    while len(ids) < length and not (ids and ids[-1] in ends):
        more = torch.arange(first, first + len(ids)).expand(3, -1)
        with torch.no_grad():
            hidden = model.decoder(
                input_ids=torch.cat([prompt, torch.tensor(ids, dtype=torch.int64)])[None],
                position_ids=torch.cat([positions, more], dim=1)[:, None],
                use_cache=False,
            ).last_hidden_state
        ids.append(int(model.project(hidden[0, -1]).argmax()))
    return ids


def kept(rollout: Rollout, row: int) -> list[int]:
    """Tokens of a completion."""
    return rollout.completion_ids[row][rollout.completion_mask[row]].tolist()


def all_kept(rollout: Rollout) -> list[list[int]]:
    return [kept(rollout, row) for row in range(len(rollout.texts))]


def params_of(length: int = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(max_completion_length=length, **changes)
