"""A checkpoint folder → the network with its weights, or a clear error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from fastr1.config import ModelConfig
from fastr1.models.family import ModelFileError, read_config
from fastr1.models.tinyllava.checkpoint import EMBEDDING, TIED_HEAD, read_weights
from fastr1.models.tinyllava.config import parse_config
from fastr1.models.tinyllava.network import TinyLlavaVideo
from fastr1.models.tinyllava.prompts import IMAGE_TOKEN_INDEX

IGNORE_INDEX = -100  # label of a position without loss, by the name that config.json has for it

logger = logging.getLogger(__name__)


def build_model(config: dict[str, Any]) -> TinyLlavaVideo:
    """Random weights; `config` is what config.json would hold, and its two fixed ids are filled in."""
    fixed = {"image_token_index": IMAGE_TOKEN_INDEX, "ignore_index": IGNORE_INDEX}
    parsed = parse_config({**fixed, **config}, where="the given configuration")
    return TinyLlavaVideo(parsed, attn_implementation=ModelConfig.attn_implementation)


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> TinyLlavaVideo:
    """Build the model of a checkpoint folder and fill it with its weights.

    Returns the model in evaluation mode. Raises ModelFileError when a file is missing or unreadable, a tensor has
    another shape than config.json says, or a parameter is absent; unexpected tensors are named in a warning.
    """
    config = parse_config(read_config(path), where=str(path / "config.json"))
    with torch.device("meta"):
        model = TinyLlavaVideo(config, attn_implementation=attn_implementation)
    expected = model.state_dict()
    state = read_weights(path, dtype=dtype, device=device)
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


def _materialise(model: TinyLlavaVideo, device: torch.device) -> None:
    """Recompute the non-persistent buffers that were created without storage (positions, rotary frequencies)."""
    embeddings: Any = model.vision_tower.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    rotary = type(model.language_model.model.rotary_emb)(model.config.text)
    model.language_model.model.rotary_emb = rotary.to(device)
    unused_of_tower = model.vision_tower
    for name, parameter in unused_of_tower.vision_model.named_parameters():
        parameter.requires_grad_(unused_of_tower._is_used(name))
