"""config.json of a TinyLLaVA-Video checkpoint → the fields the architecture needs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import Qwen2Config, SiglipVisionConfig

from fastr1.models.family import ModelFileError


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
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        side = self.vision.image_size
        assert isinstance(side, int)  # the towers of this family take squares
        return side

    @property
    def num_vision_layers(self) -> int:
        """Encoder layers that reach the selected hidden state; the rest is never computed."""
        layers = self.vision.num_hidden_layers
        return self.vision_feature_layer + layers + 1 if self.vision_feature_layer < 0 else self.vision_feature_layer


def parse_config(raw: dict[str, Any], *, where: str) -> TinyLlavaConfig:
    """Turn a checkpoint's config.json into the fields the architecture needs.

    Nested configs list non-default keys only, so library defaults fill the rest. Raises ModelFileError for another
    connector or a missing key.
    """
    if "groupresampler" not in str(raw.get("connector_type")):
        raise ModelFileError(
            f"{where}: connector_type is {raw.get('connector_type')!r}; only 'groupresampler' is supported"
        )
    required = ("text_config", "vision_config", "num_queries", "group", "num_resampler_layers")
    missing = [key for key in required if key not in raw]
    if missing:
        raise ModelFileError(f"{where}: missing {', '.join(missing)}; copy the config.json saved with the weights")
    if raw.get("vision_feature_select_strategy", "patch") != "patch":
        strategy = raw["vision_feature_select_strategy"]
        raise ModelFileError(f"{where}: vision_feature_select_strategy is {strategy!r}; only 'patch' is supported")
    if raw["text_config"].get("model_type") != "qwen2":
        model_type = raw["text_config"].get("model_type")
        raise ModelFileError(f"{where}: text_config.model_type is {model_type!r}; only 'qwen2' is supported")
    text, vision = (_without_saved_choices(raw[key]) for key in ("text_config", "vision_config"))
    return TinyLlavaConfig(
        text=Qwen2Config(**text),
        vision=SiglipVisionConfig(**vision),
        num_queries=raw["num_queries"],
        group=raw["group"],
        num_resampler_layers=raw["num_resampler_layers"],
        max_length=raw.get("tokenizer_model_max_length", 3072),
        vision_feature_layer=raw.get("vision_feature_layer", -2),
        raw=copy.deepcopy(raw),
    )


def _without_saved_choices(nested: dict[str, Any]) -> dict[str, Any]:
    """Drop run-time choices of the saving process: its attention implementation and dtype are not ours."""
    dropped = ("_attn_implementation_autoset", "torch_dtype", "dtype", "model_name_or_path", "model_name_or_path2")
    return {key: value for key, value in nested.items() if key not in dropped}
