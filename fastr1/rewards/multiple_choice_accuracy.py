"""Whether a completion answers with the right letter."""

from __future__ import annotations

from fastr1.rewards.answers import extract_answer_letter


def multiple_choice_accuracy(completion: str, letter: str, options: str) -> float:
    """1.0 if `answers.extract_answer_letter` reads `letter`, else 0.0 (also where none can be read)."""
    return float(extract_answer_letter(completion, options) == letter)
