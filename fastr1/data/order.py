"""Which samples each update trains on: a resumable, rank-independent stream of shuffled epochs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any


class SampleOrder:
    """Iterates over the updates of a run; each item is the list of sample indices of one whole update (all ranks).

    The samples form one endless stream of epochs, each a permutation that depends on (seed, epoch) only, and update u
    takes the positions [u·k, (u+1)·k), k = `prompts_per_update`. So nothing is ever dropped: an update that reaches the
    end of an epoch goes on in the next one, and with fewer samples than k an update holds some samples more than once.
    The draw knows no rank and no number of processes; each rank takes its share of the list.

    The run has ceil(num_epochs · num_samples / k) updates, unless `max_steps` > 0 sets the number. (The original rounds
    every single epoch up, which is the same for one epoch.) The last update is filled up from the following epoch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        prompts_per_update: int,
        seed: int,
        num_epochs: float = 1.0,
        max_steps: int = -1,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("prompts_per_update", prompts_per_update)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        if max_steps <= 0 and not (math.isfinite(num_epochs) and num_epochs > 0):
            raise ValueError(f"optim.num_train_epochs is {num_epochs}; use a positive number or set optim.max_steps")
        self.num_samples = num_samples
        self.prompts_per_update = prompts_per_update
        self.seed = seed
        self.num_updates = max_steps
        if max_steps <= 0:
            # exact arithmetic: 1.1 epochs of 110 samples are 121 prompts, not 121.00000000000001
            self.num_updates = math.ceil(Fraction(str(num_epochs)) * num_samples / prompts_per_update)
        self.next_update = 0
        self._cached: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Updates in the whole run, done ones included."""
        return self.num_updates

    def __iter__(self) -> Iterator[list[int]]:
        """The remaining updates. `next_update` moves on when a list is handed out: save the state after using it."""
        while self.next_update < self.num_updates:
            indices = self.indices(self.next_update)
            self.next_update += 1
            yield indices

    def indices(self, update: int) -> list[int]:
        """Sample indices of update `update` (from 0), without moving on: for prefetching the updates ahead."""
        if update < 0:
            raise ValueError(f"update is {update}; updates are counted from 0")
        start = update * self.prompts_per_update
        positions = (divmod(start + offset, self.num_samples) for offset in range(self.prompts_per_update))
        return [self._permutation(epoch)[place] for epoch, place in positions]

    def epoch(self, update: int) -> float:
        """Epochs seen once `update` updates are done."""
        return update * self.prompts_per_update / self.num_samples

    def state_dict(self) -> dict[str, int]:
        """Everything a resumed run needs that its configuration does not say."""
        return {"next_update": self.next_update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the updates that `state` counts as done."""
        self.next_update = int(state["next_update"])

    def _permutation(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            order = list(range(self.num_samples))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._cached = (epoch, order)
        return self._cached[1]
