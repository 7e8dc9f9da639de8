"""The settings of a run beside the defaults, and of several runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastr1.config import TrainConfig, config_to_dict

SEED = "run.seed"
# what says where a run was, not what it was
_PLACES = {"run.output_dir", "run.resume_from_checkpoint", "run.allow_changed"}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"grpo.beta": 0.01, …}; nested objects of `deepspeed` too."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def beside_defaults(config: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """(name, value, default) of every setting that differs from its default, and (name, value) of the others."""
    if not config:
        return [], []
    defaults = flatten(json.loads(json.dumps(config_to_dict(TrainConfig()))))
    changed, same = [], []
    for name, value in flatten(config).items():
        if name in defaults and defaults[name] == value:
            same.append((name, show(value)))
        else:
            changed.append((name, show(value), show(defaults[name]) if name in defaults else "not a setting now"))
    return changed, same


def show(value: Any) -> str:
    """As in JSON, the first thousand characters; text without quotes."""
    return (value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))[:1000]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs share that differ only in their seed. Of a path beside the run folder, such as the data of the same
    demo, what counts is where it is from there."""
    flat = flatten(config)
    around = Path(str(flat.get("run.output_dir", ""))).parent
    return {name: _beside(value, around) for name, value in flat.items() if name not in {SEED, *_PLACES}}


def _beside(value: Any, around: Path) -> Any:
    if isinstance(value, str) and around.parts and Path(value).is_relative_to(around):
        return f"…/{Path(value).relative_to(around)}"
    return value


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(name, value in each) of every setting that is not the same in all, the seed included."""
    flats = [{**identity(config), SEED: flatten(config).get(SEED)} for config in configs]
    names = dict.fromkeys(name for flat in flats for name in flat)
    rows = [(name, [show(flat[name]) if name in flat else "–" for flat in flats]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
