"""Held-out questions before and after: the same question side by side, and the rates of every evaluation by kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEFORE, AFTER = "before", "after"
MAX_KINDS = 40  # in the table
OUTCOMES = {"fixed": "fixed", "broken": "broken", "right": "both right", "wrong": "both wrong"}
_OUTCOME = {(False, True): "fixed", (True, False): "broken", (True, True): "right", (False, False): "wrong"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One question, answered by both."""

    before: Row
    after: Row

    @property
    def outcome(self) -> str:
        return _OUTCOME[bool(self.before["is_correct"]), bool(self.after["is_correct"])]

    @property
    def kind(self) -> str:
        return str(self.after.get("problem_type") or "")


def pair_answers(evaluations: Mapping[str, Row]) -> list[Pair]:
    """The questions that both evaluations answered, in the order of the later one; none where one is missing."""
    if BEFORE not in evaluations or AFTER not in evaluations:
        return []
    earlier = {(answer["sample_id"], answer["question"]): answer for answer in evaluations[BEFORE]["answers"]}
    pairs = []
    for answer in evaluations[AFTER]["answers"]:
        before = earlier.get((answer["sample_id"], answer["question"]))
        if before is not None:
            pairs.append(Pair(before, answer))
    return pairs


def sign_test(num_fixed: int, num_broken: int) -> float:
    """p = P(so uneven a split or more of fixed + broken fair coins), two-sided: how easily chance would do it."""
    total, fewer = num_fixed + num_broken, min(num_fixed, num_broken)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def rate(num_right: int, total: int) -> Row:
    """Share of `total` > 0, with the Wilson interval for 95 %."""
    z, share = 1.96, num_right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return {"share": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "total": total}


def rate_table(evaluations: Mapping[str, Row]) -> tuple[list[str], list[tuple[str, list[Row | None]]]]:
    """Names of the evaluations, before and after first, and per line a rate of each: lenient accuracy of all and by
    kind, then strict, then the share that is well formed."""
    names = sorted((n for n in evaluations if evaluations[n]["answers"]), key=lambda n: (n != BEFORE, n != AFTER, n))
    answers = {name: evaluations[name]["answers"] for name in names}
    kinds = sorted({str(a.get("problem_type") or "") for rows in answers.values() for a in rows} - {""})
    lines: list[tuple[str, list[Row | None]]] = []
    for title, is_strict in (("accuracy", False), ("strict accuracy", True)):
        for kind in (None, *(kinds[:MAX_KINDS] if len(kinds) > 1 else ())):
            label = title if kind is None else f"{title}, {kind}"
            lines.append((label, [_accuracy(answers[name], kind, is_strict=is_strict) for name in names]))
    formed = [rate(sum(bool(a["is_well_formed"]) for a in answers[name]), len(answers[name])) for name in names]
    return names, [*lines, ("well formed", [*formed])] if names else []


def _accuracy(answers: Sequence[Row], kind: str | None, *, is_strict: bool) -> Row | None:
    chosen = [a for a in answers if kind is None or a.get("problem_type") == kind]
    right = sum(bool(a["is_correct"]) and (not is_strict or bool(a["is_well_formed"])) for a in chosen)
    return rate(right, len(chosen)) if chosen else None
