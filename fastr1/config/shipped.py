"""What comes with the package: configurations by their names, and files inside it as `fastr1:…`.

In a checkout the configurations are the folder `configs/`; a wheel carries that folder as `fastr1/configs/`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from fastr1.config.checks import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
PREFIX = "fastr1:"  # begins a path inside the package: "fastr1:demo/base_model"

logger = logging.getLogger(__name__)


def shipped_configs() -> dict[str, Path]:
    """The file of every shipped configuration by its name ("grpo")."""
    packaged = PACKAGE / "configs"
    folder = packaged if packaged.is_dir() else PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_config(path: str | Path) -> Path:
    """`path` where that exists, else the shipped configuration of that bare name ("grpo", "grpo.json"), which is said.

    Raises: ConfigError where there is neither.
    """
    file, shipped = Path(path), shipped_configs()
    if file.exists() and not file.is_dir():
        return file
    name = file.name.removesuffix(".json")
    if str(file) == file.name and name in shipped:
        if os.environ.get("RANK", "0") == "0":  # once, not by every process of a run
            logger.warning("no file %s here: taking the shipped %s", file, shipped[name])
        return shipped[name]
    reason = "it is a folder" if file.is_dir() else "No such file or directory"
    hint = f" (--config {name} is the shipped one)" if name in shipped else ""
    raise ConfigError(
        f"cannot read {file}: {reason}{hint}; give the path of a JSON file or the name of a shipped "
        f"configuration: {', '.join(shipped)}"
    )


def find_shipped(path: str) -> str:
    """`path`, or the place in the file system of a path that begins with `fastr1:`. Raises: ConfigError."""
    if not path.startswith(PREFIX):
        return path
    found = PACKAGE / path.removeprefix(PREFIX)
    if not found.exists():
        raise ConfigError(f"model.path is {path!r}, but the package has no {found}; shipped is {PREFIX}demo/base_model")
    return str(found)
