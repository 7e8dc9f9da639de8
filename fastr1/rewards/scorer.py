"""The weighted sum of reward functions, with every part kept and every returned value checked.

A reward function takes three equally long lists and returns one float per completion:

    def my_reward(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]: ...

A run names such functions as "module:function" beside the built-in names.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastr1.config import RewardConfig, check_reward
from fastr1.rewards.multiple_choice_accuracy import multiple_choice_accuracy
from fastr1.rewards.think_format import think_format
from fastr1.rewards.tinyllava_video_r1 import accuracy_reward, format_reward, tinyllava_video_r1
from fastr1.schema import Sample, Scored

RewardFunction = Callable[[list[str], list[str], list[Sample]], Sequence[float]]


class RewardError(ValueError):
    """A reward is configured wrongly, or a reward function failed or returned something else than finite numbers."""


@dataclass(frozen=True)
class _Term:
    name: str
    function: RewardFunction
    weight: float  # 0: reported, not summed


class Scorer:
    """Scores completions with a fixed list of terms; see `build_scorer`."""

    def __init__(self, terms: Sequence[_Term]) -> None:
        self._terms = tuple(terms)

    def score(self, completions: list[str], samples: list[Sample]) -> Scored:
        """Reward of each completion of `samples` (one sample per completion; repeat it for a group).

        Raises:
            RewardError: naming the function, the sample and the start of the completion.
        """
        if len(completions) != len(samples):
            raise RewardError(f"{len(completions)} completions came with {len(samples)} samples; give one sample each")
        if not completions:
            return Scored([], {term.name: [] for term in self._terms})
        parts = {term.name: _call(term, completions, samples) for term in self._terms}
        rewards = [
            sum(term.weight * parts[term.name][row] for term in self._terms if term.weight != 0.0)
            for row in range(len(completions))
        ]
        return Scored(rewards, parts)


def build_scorer(config: RewardConfig) -> Scorer:
    """Resolve, import and check the configured functions and weights.

    The built-in "tinyllava_video_r1" also reports its parts as the columns accuracy_reward and format_reward.

    Raises:
        RewardError: unknown name (with the closest known one), failed import, wrong signature.
        ConfigError: weights or constants out of range.
    """
    check_reward(config)
    weights = config.weights if config.weights is not None else (1.0,) * len(config.functions)
    built_in = _built_in_functions(config)
    terms = []
    for name, weight in zip(config.functions, weights, strict=True):
        if name == "tinyllava_video_r1":
            terms.append(_Term("accuracy_reward", _each(lambda text, s: accuracy_reward(text, s.solution)), 0.0))
            terms.append(_Term("format_reward", _each(lambda text, _: format_reward(text, config)), 0.0))
        terms.append(_Term(name, _resolve(name, built_in), weight))
    return Scorer(terms)


def _built_in_functions(config: RewardConfig) -> dict[str, RewardFunction]:
    return {
        "tinyllava_video_r1": _each(lambda text, s: tinyllava_video_r1(text, s.solution, config)),
        "multiple_choice_accuracy": _each(lambda text, s: multiple_choice_accuracy(text, s.letter, s.options)),
        "think_format": _each(lambda text, _: think_format(text)),
    }


def _each(function: Callable[[str, Sample], float]) -> RewardFunction:
    """A reward function from a rule for one completion and its sample."""

    def score(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]:
        return [function(text, sample) for text, sample in zip(completions, samples, strict=True)]

    return score


def _resolve(name: str, built_in: dict[str, RewardFunction]) -> RewardFunction:
    if name in built_in:
        return built_in[name]
    if ":" not in name:
        raise RewardError(
            f"unknown reward function {name!r}{_suggest(name, list(built_in))}; built in are {', '.join(built_in)}, "
            "your own is named 'module:function'"
        )
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(
            f"reward function {name!r}: {error}; put the folder of {module_name!r} on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(f"module {module_name!r} has no function {attribute!r}{_suggest(attribute, known)}")
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        raise RewardError(f"reward function {name!r} must accept (completions, solutions, samples): {error}") from error
    return function


def _call(term: _Term, completions: list[str], samples: list[Sample]) -> list[float]:
    solutions = [sample.solution for sample in samples]
    try:
        # copies: a function that sorts or edits its arguments must not disturb the others
        result = term.function(list(completions), solutions, list(samples))
    except Exception as error:  # user code may raise anything; it is re-raised with the row it failed on
        where = _describe(*_find_failing_row(term, completions, samples))
        raise RewardError(f"reward function {term.name!r} raised {error!r} {where}") from error
    values: Any = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
    where = _describe(completions[0], samples[0])
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward function {term.name!r} returned {type(result).__name__}, expected a list of floats, {where}"
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {term.name!r} returned {len(values)} values for {len(completions)} completions, {where}"
        )
    for value, text, sample in zip(values, completions, samples, strict=True):
        if not _is_finite_number(value):
            raise RewardError(
                f"reward function {term.name!r} returned {value!r}, expected a finite number, {_describe(text, sample)}"
            )
    return [float(value) for value in values]


def _find_failing_row(term: _Term, completions: list[str], samples: list[Sample]) -> tuple[str, Sample]:
    """The first row on which the function fails alone; the first row of all if it fails only on the whole batch."""
    for text, sample in zip(completions, samples, strict=True):
        try:
            term.function([text], [sample.solution], [sample])
        except Exception:  # the caller raises the original error with its traceback
            return text, sample
    return completions[0], samples[0]


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _describe(completion: str, sample: Sample) -> str:
    start = completion if len(completion) <= 80 else completion[:80] + "…"
    return f"for {sample.origin} on completion {start!r}"


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
