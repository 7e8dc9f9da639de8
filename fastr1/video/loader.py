"""Load the next items in background threads while the current one is used."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ClipPrefetcher(Generic[T, R]):
    """Iterates over `load(item)` for every item, in order, with up to `depth` items loaded ahead.

    Results and their order do not depend on `num_threads`. What `load` raises is raised again when its item is due;
    iteration can go on with the item after it. `items` is read in the calling thread, at most `depth` ahead.
    Threads, not processes: decoding releases the GIL, and a CUDA decoder does not survive a fork.
    Use as a context manager: leaving it cancels what has not begun and waits for what has.

    Attributes: wait_seconds: time the caller has spent waiting for results so far.
    """

    def __init__(self, load: Callable[[T], R], items: Iterable[T], *, num_threads: int, depth: int) -> None:
        if num_threads < 1 or depth < 1:
            raise ValueError(f"num_threads and depth must be at least 1, got {num_threads} and {depth}")
        self.wait_seconds = 0.0
        self._load = load
        self._items = iter(items)
        self._depth = depth
        self._pending: deque[Future[R]] = deque()
        self._exhausted = False
        self._aborted = False  # closed before the last item was given out
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="clip-prefetch")

    def __enter__(self) -> ClipPrefetcher[T, R]:
        self._fill()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> ClipPrefetcher[T, R]:
        return self

    def __next__(self) -> R:
        if self._aborted:
            raise RuntimeError("the prefetcher is closed: read it inside its `with` block")
        self._fill()
        if not self._pending:
            self.close()
            raise StopIteration
        future = self._pending.popleft()
        self._fill()
        start = time.perf_counter()
        try:
            return future.result()
        except StopIteration as error:  # passed on, it would end the caller's loop as if all items were done
            raise RuntimeError("load() raised StopIteration") from error
        finally:
            self.wait_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Cancel what has not begun, wait for what has, end the threads. May be called twice."""
        self._aborted = self._aborted or bool(self._pending) or not self._exhausted
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _fill(self) -> None:
        while not self._exhausted and not self._aborted and len(self._pending) < self._depth:
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
            except Exception as error:  # not silenced: it is raised after the items that came before it
                self._exhausted = True
                failed: Future[R] = Future()
                failed.set_exception(error)
                self._pending.append(failed)
            else:
                self._pending.append(self._pool.submit(self._load, item))
