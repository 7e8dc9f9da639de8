"""The samples of one update after another, their clips loaded ahead in background threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic

import torch

from fastr1.config import DataConfig
from fastr1.data.ledger import BadRow
from fastr1.data.order import SampleOrder
from fastr1.models import Processor
from fastr1.reporting.timing import PhaseTimer
from fastr1.schema import Clip, S, Update
from fastr1.training.agreement import agreement
from fastr1.training.bad_data import BadData
from fastr1.training.distributed import DistributedModel
from fastr1.training.oversampling import draw_places
from fastr1.video import ClipPrefetcher, VideoError, load_pixels

Place = tuple[int, int]  # index of a sample, key of its draws


class Updates(Generic[S]):
    """Iterates over this rank's share of every update that remains by the order, which it moves on."""

    def __init__(
        self,
        data: DataConfig,
        samples: Sequence[S],
        order: SampleOrder,
        processor: Processor,
        distributed: DistributedModel,
        bad_data: BadData,
        timer: PhaseTimer,
        note_clip: Callable[[S, Clip], None],
        *,
        samples_per_rank: int,
        seed: int,
    ) -> None:
        self._samples: Sequence[S] = samples
        self._data, self._order, self._processor = data, order, processor
        self._distributed, self._bad_data, self._timer = distributed, bad_data, timer
        self._note_clip: Callable[[S, Clip], None] = note_clip
        self._samples_per_rank, self._seed = samples_per_rank, seed

    def __iter__(self) -> Iterator[Update[S]]:
        order, number = self._order, self._samples_per_rank
        with self._loading(self._places(), depth=2 * number) as clips:
            for done in range(order.next_update, len(order)):
                with self._timer.phase("decode_wait"):
                    update = self._take(clips, done + 1, number)
                order.next_update = done + 1
                yield update

    def further(self, step: int, attempt: int, number: int) -> Update[S]:
        """`number` further samples for this rank's share of an update, drawn at random, not by the order. All ranks
        call it."""
        first, total = self._distributed.rank * number, number * self._distributed.world_size
        draw = {"seed": self._seed, "step": step, "attempt": attempt}
        places = draw_places(len(self._samples), total, prompts_per_update=self._order.prompts_per_update, **draw)
        mine = places[first : first + number]
        with self._loading(iter(mine), depth=number) as clips, self._timer.phase("decode_wait"):
            return self._take(clips, step, number)

    def _places(self) -> Iterator[Place]:
        """This rank's share of every remaining update: contiguous blocks, so that rank order is sample order. Keys are
        places in the endless stream of samples."""
        first = self._distributed.rank * self._samples_per_rank
        for update in range(self._order.next_update, len(self._order)):
            indices = self._order.indices(update)
            keys = range(update * len(indices), (update + 1) * len(indices))
            yield from list(zip(indices, keys, strict=True))[first : first + self._samples_per_rank]

    def _loading(self, places: Iterator[Place], depth: int) -> ClipPrefetcher[Place, torch.Tensor | BadRow]:
        return ClipPrefetcher(self._load, places, num_threads=self._data.num_decode_threads, depth=depth)

    def _load(self, place: Place) -> torch.Tensor | BadRow:
        """The pixels of a sample, or why its video cannot be decoded. It is never another video."""
        sample = self._samples[place[0]]
        preprocess, device = self._processor.preprocess_frames, self._distributed.device
        try:
            return load_pixels(sample.video_path, self._data, preprocess, device, partial(self._note_clip, sample))
        except VideoError as error:
            return BadRow(sample.origin, error.problem)

    def _take(self, clips: ClipPrefetcher[Place, torch.Tensor | BadRow], step: int, number: int) -> Update[S]:
        """The next `number` samples of this rank for update `step`. What failed counts now, when it is due."""
        with agreement(self._distributed):
            loaded = list(itertools.islice(clips, number))
        assert len(loaded) == number
        mine = [result for _, result in loaded if isinstance(result, BadRow)]
        failures = [bad for share in self._distributed.gather_objects(mine) for bad in share]
        self._bad_data.note("training", step, failures)
        return Update(
            step,
            [self._samples[index] for (index, _), _ in loaded],
            [index for (index, _), _ in loaded],
            [key for (_, key), _ in loaded],
            [None if isinstance(result, BadRow) else result for _, result in loaded],
            is_lost=len(failures) == number * self._distributed.world_size,
        )
