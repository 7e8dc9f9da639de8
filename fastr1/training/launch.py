"""One process per GPU on this machine: what `fastr1 train --num-processes N` does. Standard library only.

The processes are in sessions of their own, so a Ctrl-C reaches this one alone, which passes every request to stop on as
SIGTERM and waits as long as the update takes. They notice its death, and that of each other (`stop.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastr1.training.stop import DEAD_RANK_SECONDS, RESUME, SAME_CTRL_C_SECONDS, SIGNALS, ignore_signals_at_exit

logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
STORE_FD = "FASTR1_STORE_FD"  # the socket that rank 0 serves, opened here so that no other program takes its port
LOOK_EVERY_SECONDS = 0.1


def run_processes(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `fastr1/train.py ARGUMENTS` in `num_processes` processes of this machine; returns the exit code.

    0 where they all finished or a signal stopped them; else that of the first to fail, after which the others are given
    a few seconds before they are killed. One that was stopped alone while it was loading stops the others, which would
    wait for it. Two Ctrl-C kill all at once (130).
    """
    code = _Processes(num_processes, arguments).wait()
    ignore_signals_at_exit()
    return code


class _Processes:
    def __init__(self, num_processes: int, arguments: Sequence[str]) -> None:
        self._signals: list[tuple[int, float]] = []  # number, when
        self._is_passed_on = False
        self._failed_at = 0.0
        for s in SIGNALS:
            if signal.getsignal(s) is not signal.SIG_IGN:
                signal.signal(s, lambda number, frame: self._signals.append((number, time.monotonic())))
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, "-u", str(SCRIPT), *arguments],
                    env=_environment(rank, num_processes, server),
                    pass_fds=[server.fileno()] if rank == 0 else [],
                    start_new_session=True,
                )
                for rank in range(num_processes)
            ]

    def wait(self) -> int:
        """Until all have ended."""
        first_failed: tuple[int, int] | None = None
        ended_at = time.monotonic()  # the first of them
        while None in (codes := [rank.poll() for rank in self._ranks]):
            if codes.count(None) == len(codes):
                ended_at = time.monotonic()
            is_left_behind = time.monotonic() > ended_at + DEAD_RANK_SECONDS + 5
            if (self._signals or is_left_behind) and not self._is_passed_on:
                self._is_passed_on = True
                self._send(signal.SIGTERM)
            if self._is_asked_twice():
                self._send(signal.SIGKILL)
            failed = [(i, rank.returncode) for i, rank in enumerate(self._ranks) if rank.returncode]
            if failed and first_failed is None:
                # Of two at once, an error may be what the other's signal led to.
                first_failed, self._failed_at = min(failed, key=lambda pair: pair[1]), time.monotonic()
                if first_failed[1] > 0:
                    self._send(signal.SIGTERM)  # ends those that have not begun, and would tell the same
            if first_failed and time.monotonic() > self._failed_at + DEAD_RANK_SECONDS + 5:
                self._send(signal.SIGKILL)
            time.sleep(LOOK_EVERY_SECONDS)
        if self._is_asked_twice():
            logger.warning("stopped at once, in the middle of an update; if a checkpoint was written, %s", RESUME)
            return 130
        return self._code(first_failed or next(((i, code) for i, code in enumerate(codes) if code), None))

    def _code(self, failed: tuple[int, int] | None) -> int:
        if failed is None:
            return 0
        rank, code = failed
        unheard = [i for i, process in enumerate(self._ranks) if process.returncode == -signal.SIGTERM]
        if self._signals and rank in unheard:  # before it could listen
            if 0 in unheard:
                logger.warning("stopped before the first update; start again with the same command")
            return 0
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            logger.error("rank %d was ended by %s%s; if a checkpoint was written, %s", rank, name, hint, RESUME)
        return code if code > 0 else 1

    def _is_asked_twice(self) -> bool:
        """Ctrl-C, and again when the first has had time to be passed on by whatever wraps this command."""
        if not self._signals:
            return False
        first = self._signals[0][1]
        return any(n == signal.SIGINT and when > first + SAME_CTRL_C_SECONDS for n, when in self._signals[1:])

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)


def _environment(rank: int, num_processes: int, server: socket.socket) -> dict[str, str]:
    host, port = server.getsockname()[:2]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
        "LOCAL_SIZE": num_processes,  # DeepSpeed's word
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        STORE_FD: server.fileno(),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, cores // num_processes))}
    return {**threads, **os.environ, **{name: str(value) for name, value in ours.items()}}
