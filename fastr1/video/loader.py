"""A video as the vision tower takes it, and the next ones loaded in background threads meanwhile."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Generic, TypeVar

import torch

from fastr1.config import DataConfig
from fastr1.schema import Clip
from fastr1.video.decoders import load_clip

T = TypeVar("T")
R = TypeVar("R")
_THREADS_LOCK = Lock()  # held while torch's number of threads is read, changed and put back


def load_pixels(
    path: Path,
    data: DataConfig,
    preprocess_frames: Callable[[torch.Tensor], torch.Tensor],  # of the model's family
    device: torch.device,
    note: Callable[[Clip], None] | None = None,
) -> torch.Tensor:
    """The frames of a video as the vision tower takes them, on `device`. Thread-safe.

    `note` is given the clip before its frames are resized. On a GPU all of this runs in a stream of its own and has
    finished when this returns: in the stream of the training, decoder and copies would wait for the step queued there.
    Raises: VideoError where it cannot be decoded.
    """
    if device.type == "cuda":
        reader, own = torch.cuda.current_stream(device), _loading_stream(device)
        with torch.cuda.stream(own):
            pixels = _load(path, data, preprocess_frames, device, note)
        own.synchronize()
        pixels.record_stream(reader)  # its memory is not used again before the reader is through with it
        return pixels
    return _load(path, data, preprocess_frames, device, note)


@functools.cache  # one for all threads: memory that was freed in one stream is not reused in another
def _loading_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _load(
    path: Path,
    data: DataConfig,
    preprocess_frames: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    note: Callable[[Clip], None] | None,
) -> torch.Tensor:
    clip = load_clip(path, num_frames=data.num_frames, max_frames=data.max_frames, device=device, backend=data.backend)
    if note is not None:
        note(clip)
    return preprocess_frames(clip.frames)


class ClipPrefetcher(Generic[T, R]):
    """Iterates over (item, `load(item)`) for every item, in order, with up to `depth` items loaded ahead.

    Results and their order do not depend on `num_threads`. What `load` raises is raised again when its item is due;
    iteration can go on with the item after it. `items` is read in the calling thread, at most `depth` ahead.
    Threads, not processes: decoding releases the GIL, and a CUDA decoder does not survive a fork. In each of them torch
    computes without a thread pool.
    Use as a context manager: leaving it cancels what has not begun and waits for what has.
    """

    def __init__(self, load: Callable[[T], R], items: Iterable[T], *, num_threads: int, depth: int) -> None:
        if num_threads < 1 or depth < 1:
            raise ValueError(f"num_threads and depth must be at least 1, got {num_threads} and {depth}")
        self._load = load
        self._items = iter(items)
        self._depth = depth
        self._pending: deque[tuple[T, Future[R]]] = deque()
        self._exhausted = False
        self._items_error: Exception | None = None  # raised by `items`, due after the items before it
        self._aborted = False  # closed before the last item was given out
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="clip-prefetch", initializer=_use_one_thread)

    def __enter__(self) -> ClipPrefetcher[T, R]:
        self._fill()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> ClipPrefetcher[T, R]:
        return self

    def __next__(self) -> tuple[T, R]:
        if self._aborted:
            raise RuntimeError("the prefetcher is closed: read it inside its `with` block")
        self._fill()
        if not self._pending and self._items_error is not None:
            error, self._items_error = self._items_error, None
            raise error
        if not self._pending:
            self.close()
            raise StopIteration
        item, future = self._pending.popleft()
        self._fill()
        try:
            return item, future.result()
        except StopIteration as error:  # passed on, it would end the caller's loop as if all items were done
            raise RuntimeError("load() raised StopIteration") from error

    def close(self) -> None:
        """Cancel what has not begun, wait for what has, end the threads. May be called twice."""
        self._aborted = self._aborted or bool(self._pending or self._items_error) or not self._exhausted
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _fill(self) -> None:
        while not self._exhausted and not self._aborted and len(self._pending) < self._depth:
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
            except Exception as error:
                self._exhausted, self._items_error = True, error
            else:
                self._pending.append((item, self._pool.submit(self._load, item)))


def _use_one_thread() -> None:
    """Torch computes without a thread pool in the calling thread; other threads, also new ones, keep theirs.

    If every loading thread had a pool, there would be more threads than cores, and each of the many short products of a
    resize would wait for the slowest of its pool.
    """
    with _THREADS_LOCK:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of every thread that has not used torch yet
        undo = Thread(target=torch.set_num_threads, args=(num_threads,))  # for those; this one keeps its 1
        undo.start()
        undo.join()
