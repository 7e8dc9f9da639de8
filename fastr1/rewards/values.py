"""What a reward function returned, checked and sorted into columns; and where an error arose."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastr1.schema import Sample

REWARD = "reward"  # the column of a dict that is the reward itself


class RewardError(ValueError):
    """A reward is configured wrongly, or a reward function failed or returned something else than finite numbers."""


@dataclass
class Columns:
    """Rewards of N completions and the parts that a function returned beside them."""

    rewards: list[float]  # (N,)
    parts: dict[str, list[float]] = field(default_factory=dict)  # name → (N,)


def read_columns(name: str, result: Any, completions: Sequence[str], samples: Sequence[Sample]) -> Columns:
    """The value of the reward function `name`: one number per completion, or a dict of such lists.

    In a dict the list called "reward" is the reward and the others are its parts; without one, the reward is the sum of
    the parts. Raises: RewardError for anything else than finite numbers.
    """
    if not isinstance(result, dict):
        return Columns(_read_list(f"reward function {name!r}", result, completions, samples))
    if not result:
        raise RewardError(f"reward function {name!r} returned an empty dict, {describe(completions[0], samples[0])}")
    parts = {
        str(key): _read_list(f"reward function {name!r} (part {key!r})", values, completions, samples)
        for key, values in result.items()
    }
    rewards = parts.pop(REWARD, None)
    if rewards is None:
        rewards = [sum(values) for values in zip(*parts.values(), strict=True)]
    return Columns(rewards, parts)


def plain(result: Any) -> Any:
    """Arrays and tensors as lists, also inside a dict."""
    if isinstance(result, dict):
        return {key: plain(value) for key, value in result.items()}
    return result.tolist() if hasattr(result, "tolist") else result


def _read_list(who: str, result: Any, completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    values = plain(result)
    where = describe(completions[0], samples[0])
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"{who} returned {type(result).__name__}, expected a list of floats, {where}")
    if len(values) != len(completions):
        raise RewardError(f"{who} returned {len(values)} values for {len(completions)} completions, {where}")
    for value, text, sample in zip(values, completions, samples, strict=True):
        if not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise RewardError(f"{who} returned {value!r}, expected a finite number, {describe(text, sample)}")
    return [float(value) for value in values]


def locate(
    error: BaseException, completions: Sequence[str], solutions: Sequence[str], samples: Sequence[Sample]
) -> str:
    """Which completion the function was at when it raised, as words; the function is not called again to find out.

    Read from the local variables of the frames it went through, the innermost first: they hold the very objects that it
    was given. Where they do not tell, the words say how many completions the call was about.
    """
    candidates = list(range(len(completions)))
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        # Python keeps one object for all equal strings of a single character, so these tell nothing.
        held = {id(value) for value in frame.f_locals.values() if not isinstance(value, str) or len(value) > 1}
        given = [[id(item) in held for item in items] for items in (completions, solutions, samples)]
        matches = [sum(row) for row in zip(*given, strict=True)]
        if any(matches):
            candidates = [i for i, count in enumerate(matches) if count == max(matches)]
            break
    where = describe(completions[candidates[0]], samples[candidates[0]])
    return where if len(candidates) == 1 else f"in a call with {len(candidates)} completions, the first {where}"


def describe(completion: str, sample: Sample) -> str:
    """ "for rows.jsonl:3 on completion 'The …'"."""
    start = completion if len(completion) <= 80 else completion[:80] + "…"
    return f"for {sample.origin} on completion {start!r}"
