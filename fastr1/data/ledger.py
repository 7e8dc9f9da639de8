"""The policy for bad data: a bad row stops the load ("error") or is dropped, counted and reported ("skip").

It is never replaced by another row. Texts that turn out not to fit into the model are bad rows too. Videos that turn
out to be undecodable later are counted by `BadSampleLedger` against the same bound.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastr1.config import DataConfig, check_value
from fastr1.data.rows import RowError
from fastr1.schema import BadSample, DataError, S

_NUM_LISTED = 3  # bad rows quoted in an error message

T = TypeVar("T")
E = TypeVar("E")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    origin: str  # "nextqa.jsonl:12" (line) or "coldstart.json[3]" (entry, from 0)
    reason: str

    @property
    def line(self) -> int:
        """The line or entry."""
        match = re.search(r"(\d+)\]?$", self.origin)
        assert match is not None, self.origin
        return int(match[1])


@dataclass(frozen=True)
class LoadedSamples(Generic[T]):
    """What a file held: the usable samples and the rows that were dropped, both in file order."""

    file: Path
    samples: list[T]
    bad_rows: list[BadRow]

    @property
    def num_rows(self) -> int:
        """Rows in the file, good and bad, without blank lines."""
        return len(self.samples) + len(self.bad_rows)


class BadSampleLedger:
    """The samples of one file that cannot be used, each once, against one bound: those dropped while the file was read,
    and those whose video fails when it is due.

    Every process of a run keeps the same ledger, because every one is told of the failures of all of them; so all stop
    at the same update.

    Attributes: rows, in the order in which they were due; num_rows of the whole file.
    """

    def __init__(
        self,
        loaded: LoadedSamples[Any],
        *,
        policy: str = DataConfig.policy,
        max_bad_fraction: float = DataConfig.max_bad_fraction,
    ) -> None:
        _check(policy, max_bad_fraction)
        self._file = loaded.file
        self._place = "{}[{}]" if loaded.samples[0].origin.endswith("]") else "{}:{}"
        self.num_rows = loaded.num_rows
        self._policy = policy
        self._max_bad_fraction = max_bad_fraction
        self.rows = [self._row(bad, 0, "reading") for bad in loaded.bad_rows]

    @property
    def num_bad(self) -> int:
        """Distinct samples that cannot be used."""
        return len(self.rows)

    def record(self, failures: Iterable[BadRow], *, step: int, when: str) -> list[BadSample]:
        """Note what failed at `step` in any process, and return what had not failed before.

        Raises: DataError under the policy "error", for the first failure.
        """
        known = {row.line for row in self.rows}
        new = []
        for bad in failures:
            if self._policy == "error":
                raise DataError(
                    f"{self._file.parent / bad.origin}: {bad.reason}; repair or remove the sample, "
                    'or set data.policy to "skip"'
                )
            if bad.line not in known:
                known.add(bad.line)
                new.append(self._row(bad, step, when))
        self.rows += new
        return new

    def check_bound(self) -> None:
        """Refuse to go on with too many of them. Raises: DataError naming the first."""
        if self.num_bad > self._max_bad_fraction * self.num_rows:
            rows = [BadRow(self._place.format(self._file.name, row.line), row.reason) for row in self.rows]
            raise DataError(f"{self._file}: {_too_many(self.num_rows, self._max_bad_fraction, rows)}")

    def state_dict(self, step: int) -> list[dict[str, Any]]:
        """What failed up to update `step`, without what was dropped while reading: a resumed run reads the file too."""
        return [dataclasses.asdict(row) for row in self.rows if row.when != "reading" and row.step <= step]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from a `state_dict`."""
        self.rows = [row for row in self.rows if row.when == "reading"] + [BadSample(**row) for row in state]

    def _row(self, bad: BadRow, step: int, when: str) -> BadSample:
        return BadSample(step, when, str(self._file), bad.line, bad.reason)


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
    if not samples and not bad_rows:
        raise DataError(f"{path}: the file holds no rows; check that the download finished")
    loaded = LoadedSamples(path, samples, bad_rows)
    _check_bound(loaded, max_bad_fraction)
    return loaded


def tokenize_samples(
    loaded: LoadedSamples[S],
    tokenize: Callable[[S], E],
    *,
    policy: str,
    max_bad_fraction: float,
) -> tuple[LoadedSamples[S], list[E]]:
    """`tokenize(sample)` of every sample, once. One for which it raises DataError, because its text does not fit into
    the model, is a bad row like those that could not be read.

    Returns: the samples that are left, and their tokens in the same order.
    Raises: DataError as `collect`.
    """
    samples: list[S] = []
    tokens: list[E] = []
    bad_rows = list(loaded.bad_rows)
    for sample in loaded.samples:
        try:
            tokens.append(tokenize(sample))
        except DataError as problem:
            reason = str(problem).removeprefix(f"{sample.origin}: ")
            if policy == "error":
                raise DataError(
                    f'{loaded.file.parent / sample.origin}: {reason}, or set data.policy to "skip"'
                ) from problem
            bad_rows.append(BadRow(sample.origin, reason))
        else:
            samples.append(sample)
    fitting = LoadedSamples(loaded.file, samples, sorted(bad_rows, key=lambda row: row.line))
    _check_bound(fitting, max_bad_fraction)
    return fitting, tokens


def _check(policy: str, max_bad_fraction: float) -> None:
    check_value("data.policy", policy)
    check_value("data.max_bad_fraction", max_bad_fraction)


def _check_bound(loaded: LoadedSamples[Any], max_bad_fraction: float) -> None:
    if not loaded.samples or len(loaded.bad_rows) > max_bad_fraction * loaded.num_rows:
        raise DataError(f"{loaded.file}: {_too_many(loaded.num_rows, max_bad_fraction, loaded.bad_rows)}")


def _too_many(num_rows: int, max_bad_fraction: float, bad_rows: list[BadRow]) -> str:
    listed = "; ".join(f"{row.origin}: {row.reason}" for row in bad_rows[:_NUM_LISTED])
    more = f"; and {len(bad_rows) - _NUM_LISTED} more" if len(bad_rows) > _NUM_LISTED else ""
    found = f"{len(bad_rows)} of {num_rows} rows cannot be used"
    if len(bad_rows) == num_rows:
        return f"{found} ({listed}{more}); repair the rows"
    return (
        f"{found}, data.max_bad_fraction allows {max_bad_fraction:g} ({listed}{more}); repair the rows or raise "
        "data.max_bad_fraction"
    )
