"""Whether a completion is well formed."""

from __future__ import annotations

from fastr1.rewards.answers import extract_think


def think_format(completion: str) -> float:
    """1.0 if the completion is well formed (see `answers.extract_think`), else 0.0."""
    return float(extract_think(completion) is not None)
