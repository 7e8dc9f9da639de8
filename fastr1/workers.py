"""Calls in processes of their own, for what may hang or crash: a call past its time is killed, its process replaced.

A worker is a fresh interpreter (never a fork, so threads, CUDA and the script that started the run do not matter) in a
session of its own. It is not reached by a Ctrl-C in the terminal, and it ends with everything it started when it is
killed or when the process that made it is gone, however that ended. POSIX only.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

_POLL_SECONDS = 1.0  # a worker whose children keep its pipe open is seen to be dead after this time

Kind = Literal["returned", "raised", "timed out", "died"]


class WorkerError(ValueError):
    """A worker cannot start. The message holds what it said."""


@dataclass(frozen=True)
class Outcome:
    """What became of one call."""

    index: int  # of its task
    kind: Kind
    value: Any = None  # returned: the value
    error: str = ""  # raised: repr of the exception; died: how the process ended
    traceback: str = ""  # raised: as text


class WorkerPool:
    """Processes that call one function. They start at the first `run`; `close` ends them.

    Args:
        function: "module:name", imported by the workers; tasks and values must be picklable.
        num_workers: processes, at least 1.
        imports: modules that the calls will need, imported before the time of a first call begins.
    """

    def __init__(self, function: str, num_workers: int, imports: Sequence[str] = ()) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; at least 1 is needed")
        self._function = function
        self._num_workers = num_workers
        self._imports = tuple(imports)
        self._workers: list[_Worker] = []

    def run(
        self, tasks: Iterable[tuple[Any, ...]], *, timeout_seconds: float | None = None
    ) -> Generator[Outcome, None, None]:
        """Call `function(*task)` once for every task and yield the outcomes as they come.

        `timeout_seconds` is for one call, from the moment a started worker has it. Closing the generator early kills
        the calls in progress. Raises: WorkerError where the function cannot be imported.
        """
        tasks_left = enumerate(tasks)
        next_task = next(tasks_left, None)
        limit = math.inf if timeout_seconds is None else timeout_seconds
        try:
            while next_task is not None or any(worker.is_busy for worker in self._workers):
                if next_task is not None:
                    self._start_missing()
                for worker in [worker for worker in self._workers if worker.is_idle]:
                    if next_task is not None and worker.start(*next_task, limit):
                        next_task = next(tasks_left, None)
                yield from self._outcomes()
        except WorkerError:
            self.close()
            raise
        finally:
            for worker in [worker for worker in self._workers if worker.is_busy]:
                self._discard(worker)

    def close(self) -> None:
        """Kill every worker and what it started. The pool can be used again."""
        while self._workers:
            self._discard(self._workers[-1])

    def _start_missing(self) -> None:
        while len(self._workers) < self._num_workers:
            self._workers.append(_Worker(self._function, self._imports))

    def _outcomes(self) -> Iterator[Outcome]:
        """Wait until something has happened to a worker, or for a moment."""
        now = time.monotonic()
        patience = min([_POLL_SECONDS, *(max(worker.deadline - now, 0.0) for worker in self._workers)])
        speaking = wait([worker.connection for worker in self._workers], patience)
        for worker in list(self._workers):
            outcome = worker.hear() if worker.connection in speaking else worker.examine()
            if worker.is_gone:
                self._discard(worker)
            if outcome is not None:
                yield outcome

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


class _Worker:
    """One process, from this side."""

    def __init__(self, function: str, imports: tuple[str, ...]) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        lifeline, self._lifeline = os.pipe()  # closed, by us or by our end, it ends the worker
        serve = f"serve({function!r}, {theirs.fileno()}, {lifeline}, {imports!r})"
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:] = {sys.path!r}; from fastr1.workers import serve; {serve}",
            ],
            pass_fds=(theirs.fileno(), lifeline),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # many small processes: without this each would start a thread per core
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        theirs.close()
        os.close(lifeline)
        self._function = function
        self._is_started = False
        self._index: int | None = None
        self.deadline = math.inf
        self.is_gone = False

    @property
    def is_busy(self) -> bool:
        return self._index is not None

    @property
    def is_idle(self) -> bool:
        return self._is_started and not self.is_busy

    def start(self, index: int, task: tuple[Any, ...], limit: float) -> bool:
        """Hand over a task; False where the process died while it had none."""
        try:
            self.connection.send(task)
        except OSError:
            return False
        self._index, self.deadline = index, time.monotonic() + limit
        return True

    def hear(self) -> Outcome | None:
        """Read a message, or notice that none can come any more."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            return self._bury()
        if not self._is_started:
            if kind == "raised":
                raise WorkerError(f"a process for {self._function} cannot start: {content[0]}\n{content[1]}")
            self._is_started = True
            return None
        return Outcome(self._take(), kind, *((None, *content) if kind == "raised" else content))

    def examine(self) -> Outcome | None:
        """Notice a call that is past its time, and a process that died while its children keep the pipe open."""
        if self._process.poll() is not None:
            return self._bury()
        if time.monotonic() < self.deadline:
            return None
        self.is_gone = True
        return Outcome(self._take(), "timed out")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()
        os.close(self._lifeline)

    def _bury(self) -> Outcome | None:
        self.is_gone = True
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not self._is_started:
            raise WorkerError(f"a process for {self._function} ended with {how} before it could start")
        return Outcome(self._take(), "died", error=how) if self.is_busy else None

    def _take(self) -> int:
        index, self._index, self.deadline = self._index, None, math.inf
        assert index is not None
        return index


def serve(function: str, fd: int, lifeline: int, imports: tuple[str, ...]) -> None:
    """The whole life of a worker: import the function and what it needs, then answer one task after another."""
    # Handlers, not SIG_IGN, which the function's own child processes would inherit: the run decides when a call ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # nobody is listening any more
        _answer(function, imports, Connection(fd))


def _answer(function: str, imports: tuple[str, ...], connection: Connection) -> None:
    module, _, name = function.partition(":")
    try:
        call = getattr(importlib.import_module(module), name)
        for needed in imports:
            importlib.import_module(needed)
    except BaseException as error:
        connection.send(("raised", repr(error), traceback.format_exc()))
        return
    connection.send(("started",))
    while True:
        task = connection.recv()
        try:
            connection.send(("returned", call(*task)))
        except BaseException as error:  # whatever it is, SystemExit included, is the answer
            connection.send(("raised", repr(error), traceback.format_exc()))


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: returns when the other end is closed
    os.killpg(os.getpid(), signal.SIGKILL)
