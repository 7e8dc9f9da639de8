"""Whether the weights of a model folder are all there, from sizes and headers: what a broken download leaves is found
before a model is built. What is in them is for the family to read."""

from __future__ import annotations

import json
from pathlib import Path

from fastr1.models.family import ModelFileError, read_config, read_json


def check_weights(folder: str | Path) -> None:
    """Refuses a folder without config.json or weights, one that lacks a shard of its index, and safetensors files of
    another size than their header says.

    Raises: ModelFileError naming the file and the remedy.
    """
    path = Path(folder)
    read_config(path)
    shards = {
        index.parent / str(name)
        for index in sorted(path.rglob("*.safetensors.index.json"))
        for name in dict(read_json(index).get("weight_map", {})).values()
    }
    files = sorted({*path.rglob("*.safetensors"), *shards})
    if not files and not any(path.rglob("*.bin")):
        raise ModelFileError(f"{path}: no weights (*.safetensors); download the model again or correct model.path")
    for file in files:
        if not file.is_file():
            raise ModelFileError(f"{file}: not found; the checkpoint is incomplete, copy it again")
        expected, size = _expected_bytes(file), file.stat().st_size
        if size != expected:
            raise ModelFileError(f"{file}: {size} bytes instead of {expected}; it is cut short, copy it again")


def _expected_bytes(file: Path) -> int:
    """Eight bytes with the length of the header, the header, and the tensors whose places it lists."""
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        try:
            header = json.loads(content.read(min(length, 100_000_000)))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelFileError(f"{file}: no header of a safetensors file; copy it again") from None
    return 8 + length + max(ends, default=0)
