"""The configuration that DeepSpeed gets: the user's entries, those that follow from other settings, and none unknown.

DeepSpeed itself refuses unknown keys in some sections and passes over them in silence everywhere else. So it parses the
configuration once, from dicts that note what is asked of them: an entry that nobody asked for is unknown, and the names
that were asked for are what could have been meant. This follows the installed version; no list of names is kept here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, KeysView
from typing import Any

from fastr1.config import ConfigError, OptimConfig, check_deepspeed, without_auto


def complete_config(user: dict[str, Any], optim: OptimConfig, dtype: str) -> dict[str, Any]:
    """The user's entries plus those that follow from `optim` and `dtype`. Raises: ConfigError as `check_deepspeed`."""
    check_deepspeed(user, dtype)
    config = without_auto(user)
    zero = {"stage": 1, **config.get("zero_optimization", {})}
    return {
        # fp32 sums, so that splitting a batch differently does not change the update.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm if zero["stage"] > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def check_deepspeed_keys(config: dict[str, Any], parse: Callable[[dict[str, Any]], Any], model_class: type) -> None:
    """Refuses unknown entries and values of a wrong type.

    Args:
        config: the whole configuration as DeepSpeed gets it.
        parse: DeepSpeed's parser of such a dict.
        model_class: the class whose subclasses describe the sections that DeepSpeed checks itself.

    Raises: ConfigError naming the key, the value and what was probably meant.
    """
    watched = _Watched(config)
    try:
        parse(watched)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(_describe_refusal(error, config, model_class)) from error
    except Exception as error:
        if type(error).__name__ != "DeepSpeedConfigError":  # it is no ValueError
            raise
        raise ConfigError(f"deepspeed: {error}") from error
    for dotted, value, known in watched.unread():
        raise ConfigError(f"deepspeed.{dotted} is {value!r}; DeepSpeed knows no such key{_suggest(dotted, known)}")


class _Watched(dict[str, Any]):
    """A dict that notes which keys were looked up, dicts inside it too. Copies share the notes."""

    def __init__(self, content: dict[str, Any], noted: set[str] | None = None) -> None:
        wrapped = {
            key: _Watched(value) if isinstance(value, dict) and not isinstance(value, _Watched) else value
            for key, value in content.items()
        }
        super().__init__(wrapped)
        self.noted: set[str] = set() if noted is None else noted

    def unread(self, prefix: str = "") -> Iterator[tuple[str, Any, list[str]]]:
        """(dotted key, value, names known beside it) of every entry that was not looked up. A section in which nothing
        at all was looked up was handed on as a whole, to a parser that checks it."""
        if not self.noted:
            return
        for key, value in self.items():
            if key not in self.noted:
                yield prefix + key, value, sorted(self.noted)
            elif isinstance(value, _Watched):
                yield from value.unread(f"{prefix}{key}.")

    def get(self, key: str, default: Any = None) -> Any:
        self.noted.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.noted.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.noted.add(str(key))
        return super().__contains__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.noted.add(key)
        super().__setitem__(key, value)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)  # asks `__contains__`, which the view of a dict does not

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # with a method of its own here, `f(**section)` looks its keys up one by one

    def __copy__(self) -> _Watched:
        return _Watched(self, self.noted)


def _describe_refusal(error: Exception, config: dict[str, Any], model_class: type) -> str:
    """DeepSpeed's refusal in the words of the configuration file."""
    if not hasattr(error, "errors"):
        return f"deepspeed: {error}"
    problem, path = error.errors()[0], [str(part) for part in error.errors()[0]["loc"]]
    dotted = ".".join(["deepspeed", *(_place_of(path, config) or []), *path])
    if problem["type"] != "extra_forbidden":
        return f"{dotted} is {problem['input']!r}: {problem['msg']}"
    known = _field_names(model_class, str(getattr(error, "title", "")), path[:-1])
    return f"{dotted} is {problem['input']!r}; DeepSpeed knows no such key{_suggest(dotted, known)}"


def _place_of(path: list[str], tree: Any) -> list[str] | None:
    """The way down to the first section that has an entry at `path`; DeepSpeed names the path inside it only."""
    part = tree
    for name in path:
        part = part.get(name, _Watched) if isinstance(part, dict) else _Watched
    if part is not _Watched:
        return []
    for name, inner in tree.items():
        place = _place_of(path, inner) if isinstance(inner, dict) else None
        if place is not None:
            return [name, *place]
    return None


def _field_names(model_class: Any, title: str, path: list[str]) -> list[str]:
    """Names of the fields of the section model called `title`, or of the model at `path` inside it."""
    models = {model.__name__: model for model in model_class.__subclasses__()}
    fields = models[title].model_fields if title in models else {}
    for name in path:
        inner = fields[name].annotation if name in fields else None
        options = [option for option in (inner, *getattr(inner, "__args__", ())) if hasattr(option, "model_fields")]
        fields = options[0].model_fields if options else {}
    return sorted(fields)


def _suggest(dotted: str, known: list[str]) -> str:
    name = dotted.rpartition(".")[2]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; beside it are {', '.join(known)}" if known else ""
