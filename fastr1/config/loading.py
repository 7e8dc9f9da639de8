"""Reads and writes configurations: a JSON file, dotted overrides, and errors that name the key and the remedy.

    config = load_config("configs/grpo.json", ["optim.learning_rate=1e-6", "model.freeze=[]"])

Every key is optional and means what `fields.py` says. A key that does not exist, a key written twice, a value of the
wrong type and a value out of range are refused; nothing is ignored.

Paths: `model.path`, `data.*` and `run.output_dir` are used as written, so relative ones start at the current directory;
a `model.path` of `fastr1:…` is inside the package (see `shipped.py`).
`deepspeed` is an object or the path of a JSON file: relative to the configuration file that names it or, in an
override, to the current directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from fastr1.config.checks import ConfigError, check_config
from fastr1.config.fields import TrainConfig, choices_of
from fastr1.config.shipped import find_config, find_shipped

_WORDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number", dict: "an object"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The validated configuration of a JSON file with `section.key=value` overrides applied in order.

    `path` may also be the name of a shipped configuration, such as "grpo", where no such file is here.
    The value of an override is read as JSON, or taken as a string where it is not JSON.

    Raises: ConfigError naming the file or override, the full key, the value received and, where one is close, the key
        that was probably meant.
    """
    source = find_config(path)
    tree = _read_object(source)
    if isinstance(tree.get("deepspeed"), str):
        tree["deepspeed"] = _read_object(source.parent / tree["deepspeed"], f"{source}: deepspeed")
    config = _build(TrainConfig, tree, "", str(source))
    for override in overrides:
        config = _apply_override(config, override)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=find_shipped(config.model.path)))
    try:
        check_config(config)
    except ConfigError as error:
        changes = "".join(f" --set {override}" for override in overrides)
        raise ConfigError(f"{source}{changes}: {error}") from None
    return config


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values; `load_config` of it gives an equal configuration."""
    result = _to_json_value(dataclasses.asdict(config))
    assert isinstance(result, dict)
    return result


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Writes the effective configuration, every default spelled out."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(config_to_dict(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _to_json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(item) for item in value]
    return value


def _read_object(path: Path, context: str = "") -> dict[str, Any]:
    """The JSON object in a file, with repeated keys refused."""
    prefix = f"{context}: " if context else ""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_refuse_repeated_keys)
    except OSError as error:
        raise ConfigError(f"{prefix}cannot read {path}: {error.strerror}; give the path of a JSON file") from error
    except json.JSONDecodeError as error:
        advice = "JSON has no comments, and no comma behind the last entry"
        raise ConfigError(f"{prefix}{path} is not valid JSON: {error}; {advice}") from error
    except ValueError as error:  # not UTF-8, or a repeated key
        raise ConfigError(f"{prefix}{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{prefix}{path} holds {_describe(value)}; it must hold one JSON object")
    return value


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice in one object")
        result[key] = value
    return result


def _build(cls: type, tree: dict[str, Any], prefix: str, origin: str) -> Any:
    """An instance of a configuration dataclass from a JSON object, section by section."""
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        dotted = prefix + key
        if key not in hints:
            raise ConfigError(f"{origin}: unknown key {dotted!r}{_suggest_key(dotted)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: {dotted} must be an object, got {_describe(value)}")
            values[key] = _build(hints[key], value, dotted + ".", origin)
        else:
            values[key] = _convert(value, hints[key], dotted, origin)
    return cls(**values)


def _apply_override(config: TrainConfig, override: str) -> TrainConfig:
    origin = f"--set {override}"
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{origin}: write section.key=value, for example optim.learning_rate=1e-6")
    try:
        value = json.loads(text, object_pairs_hook=_refuse_repeated_keys)
    except json.JSONDecodeError:
        value = text
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error
    keys = dotted.split(".")
    if keys[0] == "deepspeed":
        if len(keys) == 1 and isinstance(value, str):
            value = _read_object(Path(value), origin)
        return dataclasses.replace(config, deepspeed=_replace_in_tree(config.deepspeed, keys[1:], value, origin))
    return _replace_field(config, keys, value, text, "", origin)


def _replace_field(section: Any, keys: list[str], value: Any, text: str, prefix: str, origin: str) -> Any:
    """A copy of a configuration dataclass with the field at `keys` replaced."""
    hints = get_type_hints(type(section))
    dotted = prefix + keys[0]
    if keys[0] not in hints or (len(keys) > 1 and not dataclasses.is_dataclass(hints[keys[0]])):
        name = prefix + ".".join(keys)
        raise ConfigError(f"{origin}: unknown key {name!r}{_suggest_key(name)}")
    if len(keys) > 1:
        new = _replace_field(getattr(section, keys[0]), keys[1:], value, text, dotted + ".", origin)
    elif dataclasses.is_dataclass(hints[keys[0]]):
        raise ConfigError(f"{origin}: {dotted} is a section; set one of its keys, for example {_keys_under(dotted)[0]}")
    else:
        if str in (hints[keys[0]], *get_args(hints[keys[0]])) and type(value) in (int, float):
            value = text  # a name made of digits, such as run.output_dir=2024
        new = _convert(value, hints[keys[0]], dotted, origin)
    return dataclasses.replace(section, **{keys[0]: new})


def _replace_in_tree(tree: Any, keys: list[str], value: Any, origin: str) -> Any:
    """A copy of the free-form DeepSpeed object with one entry replaced; objects on the way are created."""
    if not keys:
        if not isinstance(value, dict):
            raise ConfigError(
                f"{origin}: deepspeed must be an object or the path of a JSON file, got {_describe(value)}"
            )
        return _convert(value, dict[str, Any], "deepspeed", origin)
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: the entry above {keys[0]!r} is {_describe(tree)}, not an object")
    is_last = len(keys) == 1
    new = value if is_last else _replace_in_tree(tree.get(keys[0], {}), keys[1:], value, origin)
    return {**tree, keys[0]: new}


def _convert(value: Any, hint: Any, dotted: str, origin: str) -> Any:
    """`value` as the type of its field: exact JSON types, an integer also where a number is asked for."""
    if get_origin(hint) in (types.UnionType, Union):
        options = [option for option in get_args(hint) if option is not type(None)]
        assert len(options) == 1, f"{dotted}: only `T | None` unions are used"
        return None if value is None else _convert(value, options[0], dotted, origin)
    if get_origin(hint) is tuple:
        item_hint = get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            example = "[1, 2]" if item_hint is float else json.dumps([value] if isinstance(value, str) else ["a", "b"])
            raise ConfigError(f"{origin}: {dotted} must be a list such as {example}, got {_describe(value)}")
        return tuple(_convert(item, item_hint, f"{dotted}[{i}]", origin) for i, item in enumerate(value))
    wanted: Any = str if choices_of(hint) else get_origin(hint) or hint
    if wanted is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not wanted:
        raise ConfigError(f"{origin}: {dotted} must be {_WORDS[wanted]}, got {_describe(value)}")
    if wanted is float and not math.isfinite(value):
        raise ConfigError(f"{origin}: {dotted} must be a finite number, got {value}")
    return value


def _describe(value: Any) -> str:
    """The value as its JSON text, with its JSON type where that is not plain to see."""
    text = json.dumps(value, ensure_ascii=False)
    return f"the string {text}" if isinstance(value, str) else text


def _keys_under(section: str = "") -> list[str]:
    """Every dotted key, or those of one section."""
    found: list[str] = []
    for name, hint in get_type_hints(TrainConfig).items():
        fields = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
        found += [f"{name}.{field.name}" for field in fields] or [name]
    return [key for key in found if not section or key.startswith(section + ".")]


def _suggest_key(dotted: str) -> str:
    """What was probably meant by an unknown key: a close full name, a close name elsewhere, or the keys there are."""
    known = _keys_under()
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.75)
    name = dotted.rpartition(".")[2]
    by_name = {key.rpartition(".")[2]: key for key in known}
    close_name = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.75)
    if name in by_name:
        return f"; did you mean {by_name[name]!r}?"
    if close or close_name:
        return f"; did you mean {close[0] if close else by_name[close_name[0]]!r}?"
    section = dotted.partition(".")[0]
    sections = list(get_type_hints(TrainConfig))
    close_section = difflib.get_close_matches(section, sections, n=1, cutoff=0.6)
    if section in sections and "." in dotted:
        names = [key.partition(".")[2] for key in _keys_under(section)]
        return f"; the keys of {section} are {', '.join(names)}"
    if close_section:
        return f"; did you mean the section {close_section[0]!r}?"
    return f"; the sections are {', '.join(sections)}"
