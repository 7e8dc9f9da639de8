"""The weighted sum of reward functions, with every part kept and every returned value checked.

A reward function takes three equally long lists and returns one float per completion, or a dict of such lists: the one
called "reward" (without it, their sum) is the reward, and the others are logged beside it.

    def my_reward(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]: ...

A run names such functions as "module:function" beside the built-in names. `async def` functions of one step are awaited
together. With `reward.num_workers` the others run in processes of their own, called once for each completion.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from fastr1.config import RewardConfig, check_reward
from fastr1.rewards.calls import AsyncCalls, WorkerCalls, call_here, is_async
from fastr1.rewards.multiple_choice_accuracy import multiple_choice_accuracy
from fastr1.rewards.think_format import think_format
from fastr1.rewards.tinyllava_video_r1 import accuracy_reward, format_reward, tinyllava_video_r1
from fastr1.rewards.values import Columns, RewardError
from fastr1.schema import Sample, Scored

RewardFunction = Callable[[list[str], list[str], list[Sample]], Any]
Place = Literal["here", "async", "worker"]  # where a function is called


@dataclass(frozen=True)
class _Term:
    name: str
    function: RewardFunction
    weight: float  # 0: reported, not summed
    place: Place = "here"


class Scorer:
    """Scores completions with a fixed list of terms; see `build_scorer`."""

    def __init__(self, terms: Sequence[_Term], config: RewardConfig) -> None:
        self._terms = tuple(terms)
        timeout = config.timeout_seconds, config.timeout_reward
        self._async = AsyncCalls(*timeout) if any(term.place == "async" for term in terms) else None
        in_workers = [term.name for term in terms if term.place == "worker"]
        self._workers = WorkerCalls(in_workers, config.num_workers, *timeout) if in_workers else None

    def score(self, completions: list[str], samples: list[Sample]) -> Scored:
        """Reward of each completion of `samples` (one sample per completion; repeat it for a group).

        Raises:
            RewardError: naming the function, the sample and the start of the completion.
        """
        if len(completions) != len(samples):
            raise RewardError(f"{len(completions)} completions came with {len(samples)} samples; give one sample each")
        if not completions:
            return Scored([], {term.name: [] for term in self._terms})
        columns = self._call_all(completions, samples)
        parts: dict[str, list[float]] = {}
        for term in self._terms:
            parts[term.name] = columns[term.name].rewards
            parts |= {f"{term.name}/{part}": values for part, values in columns[term.name].parts.items()}
        rewards = [
            sum(term.weight * parts[term.name][row] for term in self._terms if term.weight != 0.0)
            for row in range(len(completions))
        ]
        return Scored(rewards, parts)

    def close(self) -> None:
        """End the worker processes and the event loop."""
        if self._workers is not None:
            self._workers.close()
        if self._async is not None:
            self._async.close()

    def _call_all(self, completions: list[str], samples: list[Sample]) -> dict[str, Columns]:
        """The async functions run while the others do."""
        started = time.monotonic()
        pending: dict[str, Future[Any]] = {}
        try:
            for term in self._terms:
                if term.place == "async" and self._async is not None:
                    pending[term.name] = self._async.start(term.function, completions, samples)
            columns = {
                term.name: call_here(term.name, term.function, completions, samples)
                for term in self._terms
                if term.place == "here"
            }
            if self._workers is not None:
                columns |= self._workers.call(completions, samples)
            if self._async is not None:
                columns |= self._async.finish(pending, started, completions, samples)
            return columns
        finally:
            for future in pending.values():
                future.cancel()


def build_scorer(config: RewardConfig) -> Scorer:
    """Resolve, import and check the configured functions and weights.

    The built-in "tinyllava_video_r1" also reports its parts as the columns accuracy_reward and format_reward.

    Raises:
        RewardError: unknown name (with the closest known one), failed import, wrong signature, or a time limit for a
            function that nothing could stop.
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
        function = _resolve(name, built_in)
        terms.append(_Term(name, function, weight, _place(name, function, config)))
    if config.num_workers and all(term.place != "worker" for term in terms):
        raise RewardError(
            f"reward.num_workers is {config.num_workers}, but your reward.functions are all async, and these "
            "run together in the training process: leave it out"
        )
    return Scorer(terms, config)


def _place(name: str, function: RewardFunction, config: RewardConfig) -> Place:
    if ":" not in name:
        return "here"
    if is_async(function):
        return "async"
    if config.timeout_seconds is not None and not config.num_workers:
        raise RewardError(
            f"reward.timeout_seconds is {config.timeout_seconds:g}, but reward function {name!r} runs in the training "
            "process, where nothing can stop it: set reward.num_workers to 1 or more, or make it an async function"
        )
    return "worker" if config.num_workers else "here"


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
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or module_name.startswith("."):
        raise RewardError(
            f"unknown reward function {name!r}{_suggest(name, list(built_in))}; built in are {', '.join(built_in)}, "
            "your own is named 'module:function'"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        remedy = f"start in the folder of {module_name!r} or put that on PYTHONPATH"
        imported = f"{module_name!r} imports it: install it, or correct the import"
        raise RewardError(f"reward function {name!r}: {error}; {remedy if is_itself else imported}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(f"module {module_name!r} has no function {attribute!r}{_suggest(attribute, known)}")
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        raise RewardError(f"reward function {name!r} must accept (completions, solutions, samples): {error}") from error
    return function


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
