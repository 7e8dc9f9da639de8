"""What a run leaves out: one policy and one count over all processes, its file, and the state a resume needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastr1.data.bad_samples import BadSampleFile
from fastr1.data.ledger import BadRow, BadSampleLedger
from fastr1.schema import BadSample, DataError
from fastr1.training.agreement import agreement
from fastr1.training.distributed import DistributedModel

logger = logging.getLogger(__name__)


class BadData:
    """The ledgers of the training and the evaluation file. All processes call every method alike."""

    def __init__(
        self,
        distributed: DistributedModel,
        output_dir: Path,
        training: BadSampleLedger,
        evaluation: BadSampleLedger | None,
    ) -> None:
        self._ledgers = {"training": training} | ({"evaluation": evaluation} if evaluation is not None else {})
        self._file = BadSampleFile(output_dir, is_main=distributed.rank == 0)
        self._distributed = distributed
        self._is_main = distributed.rank == 0

    @property
    def num_bad(self) -> int:
        """Distinct samples of the training file left out so far, those dropped while reading it included."""
        return self._ledgers["training"].num_bad

    def begin(self) -> None:
        """Start the file with what is known: rows dropped while reading and, in a resumed run, what failed before.

        Raises: DataError where the processes do not agree on it: they would train on different samples.
        """
        known = self._distributed.gather_objects({when: ledger.rows for when, ledger in self._ledgers.items()})
        with agreement(self._distributed):
            self._compare(known)
            rows = [row for ledger in self._ledgers.values() for row in ledger.rows]
            self._file.rewrite(sorted(rows, key=lambda row: row.step))
        if rows and self._is_main:
            first = f"the first is {rows[0].file}, line {rows[0].line}: {rows[0].reason}"
            logger.warning("left out so far: %d (see %s); %s", len(rows), self._file.path, first)

    def _compare(self, known: list[dict[str, list[BadSample]]]) -> None:
        for rank, theirs in enumerate(known):
            for when, rows in theirs.items():
                if differing := set(rows) ^ set(known[0][when]):
                    row = min(differing, key=lambda row: row.line)
                    raise DataError(
                        f"process {rank} does not read the same {when} file or videos as process 0: they part at line "
                        f"{row.line} of {row.file} ({row.reason}); give every machine the same files"
                    )

    def note(self, when: str, step: int, failures: Sequence[BadRow]) -> None:
        """Leave out what failed at update `step` on any process.

        Raises: DataError on every process, under the policy "error" or beyond data.max_bad_fraction.
        """
        ledger = self._ledgers[when]
        with agreement(self._distributed):
            new = ledger.record(failures, step=step, when=when)
            self._file.append(new)
            if self._is_main:
                for row in new:
                    count = f"{ledger.num_bad} of {ledger.num_rows} so far"
                    logger.warning(
                        "update %d: %s, line %d is left out (%s): %s", step, row.file, row.line, count, row.reason
                    )
            ledger.check_bound()

    def state_dict(self, step: int) -> list[dict[str, Any]]:
        """What failed up to update `step`."""
        return [row for ledger in self._ledgers.values() for row in ledger.state_dict(step)]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from a `state_dict`."""
        for when, ledger in self._ledgers.items():
            ledger.load_state_dict([row for row in state if row["when"] == when])
