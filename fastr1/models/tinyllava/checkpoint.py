"""The files of a flat TinyLLaVA-Video checkpoint folder: config.json, generation_config.json, safetensors.

Everything comes from the folder itself; no network, no remote code. Key names on disk are those of the released
checkpoints, with the tied `lm_head.weight` left out.
"""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastr1.models.family import ModelFileError, read_json
from fastr1.models.tinyllava.config import TinyLlavaConfig

TIED_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


def write_checkpoint(
    config: TinyLlavaConfig,
    state: dict[str, torch.Tensor],
    path: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors into an existing folder."""
    state = {
        key: value.detach().to("cpu", dtype or value.dtype).contiguous()
        for key, value in state.items()
        if key != TIED_HEAD or not config.text.tie_word_embeddings
    }
    saved_dtype = next(iter(state.values())).dtype
    raw = copy.deepcopy(config.raw)
    raw["torch_dtype"] = str(saved_dtype).removeprefix("torch.")
    _write_json(path / "config.json", raw)
    eos = config.text.eos_token_id
    _write_json(
        path / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": eos, "eos_token_id": eos, "use_cache": True},
    )
    temporary = path / "model.safetensors.partial"
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask leaves; save_file would have the owner alone read it
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)
    temporary.rename(path / "model.safetensors")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_weights(path: Path, *, dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, in one file or in shards, by its name. Raises ModelFileError."""
    index = path / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        shards = sorted(set(read_json(index)["weight_map"].values()))
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
