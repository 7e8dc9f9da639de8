"""The ways to call a user's reward functions: in this process, in worker processes, and together if they are async.

Each function is called once for each completion, never again after a failure. In this process a call is for all
completions at once; in a worker for one, so that it can be told which of them a call hangs or crashes on.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import closing
from typing import Any

from fastr1.rewards.values import Columns, RewardError, describe, locate, plain, read_columns
from fastr1.schema import Sample
from fastr1.workers import Outcome, WorkerPool

_CLOSE_SECONDS = 1.0
TIMED_OUT = "timed_out"  # the part that says which completions got `timeout_reward`


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def call_here(
    name: str, function: Callable[..., Any], completions: Sequence[str], samples: Sequence[Sample]
) -> Columns:
    """One call for all completions in this process."""
    # copies: a function that sorts or edits its arguments must not disturb the others
    solutions = [sample.solution for sample in samples]
    try:
        result = function(list(completions), list(solutions), list(samples))
    except (Exception, SystemExit) as error:  # user code may raise anything; it is re-raised with the row it failed on
        where = locate(error, completions, solutions, samples)
        raise RewardError(f"reward function {name!r} raised {error!r} {where}") from error
    return read_columns(name, result, completions, samples)


class AsyncCalls:
    """An event loop in a thread of its own, the same one for the whole run, so that functions may keep connections."""

    def __init__(self, timeout_seconds: float | None, timeout_reward: float | None) -> None:
        self._timeout_seconds, self._timeout_reward = timeout_seconds, timeout_reward
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True)
        self._thread.start()

    def start(
        self, function: Callable[..., Awaitable[Any]], completions: Sequence[str], samples: Sequence[Sample]
    ) -> Future[Any]:
        """Begin one call for all completions; it goes on in the background."""
        solutions = [sample.solution for sample in samples]

        async def call() -> Any:
            try:
                return await function(list(completions), list(solutions), list(samples))
            except SystemExit as error:  # would end the loop and leave everyone waiting
                raise RuntimeError(repr(error)).with_traceback(error.__traceback__) from None

        return asyncio.run_coroutine_threadsafe(call(), self._loop)

    def finish(
        self, pending: dict[str, Future[Any]], started: float, completions: Sequence[str], samples: Sequence[Sample]
    ) -> dict[str, Columns]:
        """Wait for all of them together, each for at most `timeout_seconds` since `started` (of `time.monotonic`)."""
        limit = self._timeout_seconds
        patience = None if limit is None else max(started + limit - time.monotonic(), 0.0)
        wait(pending.values(), patience, FIRST_EXCEPTION)
        found = {}
        for name, future in sorted(pending.items(), key=lambda item: not item[1].done()):
            if not future.done():
                whole = (
                    f"in a call with {len(completions)} completions, the first {describe(completions[0], samples[0])}"
                )
                reward = _timeout_reward(name, limit, self._timeout_reward, whole)
                found[name] = Columns([reward] * len(completions), {TIMED_OUT: [1.0] * len(completions)})
                continue
            error = future.exception()
            if error is not None:
                solutions = [sample.solution for sample in samples]
                where = locate(error, completions, solutions, samples)
                raise RewardError(f"reward function {name!r} raised {error!r} {where}") from error
            found[name] = read_columns(name, future.result(), completions, samples)
            if self._timeout_reward is not None:
                found[name].parts[TIMED_OUT] = [0.0] * len(completions)
        return found

    def close(self) -> None:
        """End the loop. A function that blocks it, or refuses to be cancelled, is left behind after a second."""

        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_later(0.1, self._loop.stop)  # time for what they do when they are cancelled

        self._loop.call_soon_threadsafe(end)
        self._thread.join(timeout=_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


class WorkerCalls:
    """Worker processes for functions of these names ("module:function"), started at the first call; one that a call
    hangs in is killed and replaced."""

    def __init__(
        self, names: Sequence[str], num_workers: int, timeout_seconds: float | None, timeout_reward: float | None
    ) -> None:
        self._names = tuple(names)
        self._timeout_seconds, self._timeout_reward = timeout_seconds, timeout_reward
        modules = sorted({name.partition(":")[0] for name in names})
        self._pool = WorkerPool(f"{__name__}:call_one", num_workers, modules)

    def call(self, completions: Sequence[str], samples: Sequence[Sample]) -> dict[str, Columns]:
        """Every function, once for every completion."""
        tasks = [
            (name, text, sample) for name in self._names for text, sample in zip(completions, samples, strict=True)
        ]
        rows: list[Columns | None] = [None] * len(tasks)
        # closing: after an error, the calls still in progress are killed at once
        with closing(self._pool.run(tasks, timeout_seconds=self._timeout_seconds)) as outcomes:
            for outcome in outcomes:
                rows[outcome.index] = self._read(outcome, *tasks[outcome.index])
        size = len(completions)
        return {name: self._merge(name, rows[i * size : (i + 1) * size]) for i, name in enumerate(self._names)}

    def close(self) -> None:
        """End the processes and what they started."""
        self._pool.close()

    def _read(self, outcome: Outcome, name: str, completion: str, sample: Sample) -> Columns:
        where = describe(completion, sample)
        if outcome.kind == "raised":
            raise RewardError(f"reward function {name!r} raised {outcome.error} {where}") from _RemoteError(
                outcome.traceback
            )
        if outcome.kind == "died":
            raise RewardError(f"reward function {name!r} ended its process ({outcome.error}) {where}")
        if outcome.kind == "timed out":
            return Columns(
                [_timeout_reward(name, self._timeout_seconds, self._timeout_reward, where)], {TIMED_OUT: [1.0]}
            )
        return read_columns(name, outcome.value, [completion], [sample])

    def _merge(self, name: str, rows: Sequence[Columns | None]) -> Columns:
        """The columns of one function from those of its completions; a part is 0 where the call timed out."""
        columns = [row for row in rows if row is not None]
        assert len(columns) == len(rows)
        returned = {tuple(sorted(row.parts)) for row in columns if TIMED_OUT not in row.parts}
        if len(returned) > 1:
            first, second = sorted(returned)[:2]
            raise RewardError(
                f"reward function {name!r} returned the parts {list(first)} for one completion and {list(second)} for "
                "another; return the same for all"
            )
        names = [*(returned.pop() if returned else ()), *([TIMED_OUT] if self._timeout_reward is not None else [])]
        parts = {part: [row.parts.get(part, [0.0])[0] for row in columns] for part in names}
        return Columns([row.rewards[0] for row in columns], parts)


class _RemoteError(Exception):
    """The traceback of another process, as the cause of an error in this one."""

    def __init__(self, text: str) -> None:
        super().__init__(f"\n{text}")


def call_one(name: str, completion: str, sample: Sample) -> Any:
    """What a worker does: one function for one completion."""
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    return plain(function([completion], [sample.solution], [sample]))


def _timeout_reward(name: str, limit: float | None, reward: float | None, where: str) -> float:
    if reward is None:
        raise RewardError(
            f"reward function {name!r} took more than reward.timeout_seconds = {limit:g} {where}; raise the limit, or "
            "set reward.timeout_reward to give such completions a reward"
        )
    return reward
