"""Read and write flat TinyLLaVA-Video checkpoint directories: config.json, safetensors, tokenizer files.

Everything comes from the directory itself (embedded configs, local tokenizer); no network, no remote code.
Key names on disk are those of the released checkpoints, with the tied `lm_head.weight` left out.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Qwen2Config, SiglipVisionConfig

from fastr1.models.tinyllava import TinyLlavaConfig, TinyLlavaVideo

logger = logging.getLogger(__name__)

TIED_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


class ModelFileError(ValueError):
    """A model directory cannot be read. The message names the file, the reason and the remedy."""


def parse_config(raw: dict[str, Any], *, where: str) -> TinyLlavaConfig:
    """Turn a checkpoint's config.json into the fields the architecture needs.

    Nested configs list non-default keys only, so library defaults fill the rest. Raises ModelFileError for another
    architecture or a missing key.
    """
    if raw.get("model_type") != "tinyllava":
        raise ModelFileError(f"{where}: model_type is {raw.get('model_type')!r}; expected 'tinyllava'")
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


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
) -> TinyLlavaVideo:
    """Build the model of a checkpoint directory and fill it with its weights.

    Returns the model in evaluation mode. Raises ModelFileError when a file is missing or unreadable, a tensor has
    another shape than config.json says, or a parameter is absent; unexpected tensors are named in a warning.
    """
    path = Path(path)
    config = parse_config(_read_json(path / "config.json"), where=str(path / "config.json"))
    with torch.device("meta"):
        model = TinyLlavaVideo(config, attn_implementation=attn_implementation)
    expected = model.state_dict()
    state = _read_weights(path, dtype=dtype, device=device)
    if config.text.tie_word_embeddings:
        state[TIED_HEAD] = state.get(EMBEDDING, state.get(TIED_HEAD))  # type: ignore[assignment]
    missing = [key for key in expected if state.get(key) is None]
    if missing:
        raise ModelFileError(f"{path}: {len(missing)} parameters are missing, first {missing[:4]}; is a shard absent?")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise ModelFileError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, config.json asks for {tuple(tensor.shape)}"
            )
    unexpected = sorted(set(state) - set(expected))
    if unexpected:
        logger.warning("%s: %d unexpected tensors ignored: %s", path, len(unexpected), ", ".join(unexpected[:8]))
    model.load_state_dict({key: state[key] for key in expected}, assign=True)
    _materialise(model, device)
    if config.text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    return model.eval()


def _materialise(model: TinyLlavaVideo, device: torch.device | str) -> None:
    """Recompute the non-persistent buffers that were created without storage (positions, rotary frequencies)."""
    embeddings: Any = model.vision_tower.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    rotary = type(model.language_model.model.rotary_emb)(model.config.text)
    model.language_model.model.rotary_emb = rotary.to(device)
    unused_of_tower = model.vision_tower
    for name, parameter in unused_of_tower.vision_model.named_parameters():
        parameter.requires_grad_(unused_of_tower._is_used(name))


def save_model(
    model: TinyLlavaVideo,
    path: str | Path,
    *,
    tokenizer: Any = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer files in the flat layout.

    `state_dict` replaces the model's own (a consolidated one under ZeRO-3); `dtype` converts floating tensors.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if model.config.text.tie_word_embeddings:
        state.pop(TIED_HEAD, None)
    state = {key: value.detach().to("cpu", dtype or value.dtype).contiguous() for key, value in state.items()}
    saved_dtype = next(iter(state.values())).dtype
    raw = copy.deepcopy(model.config.raw)
    raw["torch_dtype"] = str(saved_dtype).removeprefix("torch.")
    _write_json(path / "config.json", raw)
    eos = model.config.text.eos_token_id
    _write_json(
        path / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": eos, "eos_token_id": eos, "use_cache": True},
    )
    temporary = path / "model.safetensors.partial"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.rename(path / "model.safetensors")
    if tokenizer is not None:
        from fastr1.data.tokenizer import save_tokenizer

        save_tokenizer(tokenizer, path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelFileError(f"{path}: not found; point model.path at a checkpoint directory") from None
    except json.JSONDecodeError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error}); copy the file again") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _read_weights(path: Path, *, dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
    index = path / "model.safetensors.index.json"
    shards = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        file = path / shard
        if not file.exists():
            raise ModelFileError(f"{file}: not found; the checkpoint is incomplete, copy it again")
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for key in tensors.keys():  # noqa: SIM118  # not a mapping
                    state[key] = tensors.get_tensor(key).to(dtype)
        except SafetensorError as error:
            raise ModelFileError(f"{file}: unreadable ({error}); the file is truncated, copy it again") from error
    return state
