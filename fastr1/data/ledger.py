"""The policy for bad data: a bad row stops the load ("error") or is dropped, counted and reported ("skip").

It is never replaced by another row. Videos that turn out to be undecodable later are counted by `BadSampleLedger`
against the same bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastr1.config import DataConfig, check_value
from fastr1.data.rows import RowError
from fastr1.schema import DataError

_NUM_LISTED = 3  # bad rows quoted in an error message

T = TypeVar("T")


@dataclass(frozen=True)
class BadRow:
    """A row that was dropped."""

    origin: str  # "nextqa.jsonl:12" (line) or "coldstart.json[3]" (entry, from 0)
    reason: str


@dataclass(frozen=True)
class LoadedSamples(Generic[T]):
    """What a file held: the usable samples in file order and the rows that were dropped."""

    samples: list[T]
    bad_rows: list[BadRow]

    @property
    def num_rows(self) -> int:
        """Rows in the file, good and bad, without blank lines."""
        return len(self.samples) + len(self.bad_rows)


class BadSampleLedger:
    """Counts samples that turn out to be unusable, against the same bound as bad rows. Thread-safe.

    A sample that fails again in a later epoch counts once towards the bound. Each process keeps its own ledger.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        policy: str = DataConfig.policy,
        max_bad_fraction: float = DataConfig.max_bad_fraction,
        num_bad_rows: int = 0,
    ) -> None:
        """`num_rows` and `num_bad_rows`: rows of the file and those already dropped while reading it."""
        _check(policy, max_bad_fraction)
        self._num_rows = num_rows
        self._policy = policy
        self._max_bad_fraction = max_bad_fraction
        self._num_bad_rows = num_bad_rows
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def record(self, sample_origin: str, reason: str) -> None:
        """Note one failure.

        Raises:
            DataError: always under policy "error"; under "skip" once the bound is exceeded.
        """
        with self._lock:
            self._reasons.setdefault(sample_origin, reason)
            listed = [BadRow(origin, why) for origin, why in self._reasons.items()]
        if self._policy == "error":
            named = reason if reason.startswith(sample_origin) else f"{sample_origin}: {reason}"
            raise DataError(f'{named}; repair or remove the sample, or set data.policy to "skip"')
        num_bad = self._num_bad_rows + len(listed)
        if num_bad > self._max_bad_fraction * self._num_rows:
            raise DataError(_too_many(num_bad, self._num_rows, self._max_bad_fraction, listed))

    def state_dict(self) -> dict[str, str]:
        """The reason of every failure so far by the origin of its sample."""
        with self._lock:
            return dict(self._reasons)

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on counting from a `state_dict`."""
        with self._lock:
            self._reasons = dict(state)

    @property
    def num_bad_samples(self) -> int:
        """Distinct samples that failed."""
        with self._lock:
            return len(self._reasons)


def collect(
    path: Path,
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[str, Any], T],
    policy: str,
    max_bad_fraction: float,
) -> LoadedSamples[T]:
    """Parse every (place, raw row) of `path` under the policy for bad rows.

    Raises: DataError naming file, line, reason and remedy; also for a file without rows.
    """
    _check(policy, max_bad_fraction)
    samples: list[T] = []
    bad_rows: list[BadRow] = []
    for place, raw in rows:
        origin = f"{path.name}{place}"
        try:
            samples.append(parse(origin, raw))
        except RowError as problem:
            if policy == "error":
                raise DataError(
                    f'{path}{place}: {problem.reason}; {problem.remedy}, or set data.policy to "skip"'
                ) from None
            bad_rows.append(BadRow(origin, problem.reason))
    num_rows = len(samples) + len(bad_rows)
    if num_rows == 0:
        raise DataError(f"{path}: the file holds no rows; check that the download finished")
    if not samples or len(bad_rows) > max_bad_fraction * num_rows:
        raise DataError(f"{path}: {_too_many(len(bad_rows), num_rows, max_bad_fraction, bad_rows)}")
    return LoadedSamples(samples, bad_rows)


def _check(policy: str, max_bad_fraction: float) -> None:
    check_value("data.policy", policy)
    check_value("data.max_bad_fraction", max_bad_fraction)


def _too_many(num_bad: int, num_rows: int, max_bad_fraction: float, bad_rows: list[BadRow]) -> str:
    listed = "; ".join(f"{row.origin}: {row.reason}" for row in bad_rows[:_NUM_LISTED])
    more = f"; and {len(bad_rows) - _NUM_LISTED} more" if len(bad_rows) > _NUM_LISTED else ""
    return (
        f"{num_bad} of {num_rows} rows cannot be used, data.max_bad_fraction allows {max_bad_fraction:g} "
        f"({listed}{more}); repair the rows or raise data.max_bad_fraction"
    )
