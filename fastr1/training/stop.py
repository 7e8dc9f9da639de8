"""Ending a run early without losing it.

Ctrl-C, SIGTERM, a closed terminal and the death of the launcher become a request, which all ranks agree on between two
updates. A thread reads the signals: it hears them while the main thread waits for another rank or a GPU. It imports
nothing but the standard library, so that it watches while torch is being imported.

What the thread ends by itself, because no other code could:
- a process that has nothing to lose yet, or whose user pressed Ctrl-C twice;
- a process that waits for a rank of this machine that died;
- DeepSpeed's launcher, which would kill a step that takes longer than 30 s.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_EVERY_SECONDS = 0.5
DEAD_RANK_SECONDS = 10.0  # what the others have to fail on their own, with a message that says more
LAUNCHER_SECONDS = 20.0  # DeepSpeed's launcher waits for 30
SAME_CTRL_C_SECONDS = 1.0  # some wrappers pass on the Ctrl-C that the terminal has sent to all already
SAVING = "finishing this update, then saving"
DEAD = "0:never"  # the `process_id` of no process
SAME_COMMAND = "go on with the same command"
RESUME = f"{SAME_COMMAND} and --set run.resume_from_checkpoint=last"


class StopRequest:
    """Whether, and why, this process was asked to stop; true once it was.

    Attributes:
        reason: "SIGTERM received" and the like; None: nobody asked.
        answer: what will come of a request, for the message that confirms it.
        exits_at_once: nothing has been done that could be kept, so a request ends the process, with exit code 0.
        kept: where the run can be taken up, for the message of a process that is ended at once.
    """

    def __init__(self, *, exits_at_once: bool = False) -> None:
        self.reason: str | None = None
        self.answer = SAVING
        self.exits_at_once = exits_at_once
        self.kept = "no checkpoint was written"
        self._rank = int(os.environ.get("RANK") or 0)
        self._requested_at = self._missed_since = 0.0
        self._is_watching = False
        self._launchers = _launchers()
        self._peers: list[tuple[int, str]] = []  # (rank, process)

    def __bool__(self) -> bool:
        return self.reason is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listen for signals and look after launcher and peers. Inside itself, and outside the main thread, it does
        nothing."""
        if self._is_watching or threading.current_thread() is not threading.main_thread():
            yield
            return
        heard, told = os.pipe()
        os.set_blocking(told, False)
        # A signal that is ignored (SIGHUP under nohup) stays ignored.
        listened = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        earlier_fd = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        earlier = {s: signal.signal(s, lambda number, frame: None) for s in listened}
        thread = threading.Thread(target=self._watch, args=(heard,), name="stop-request", daemon=True)
        self._is_watching = True
        _LISTENING.append(self)
        thread.start()
        try:
            yield
        finally:
            _LISTENING.remove(self)
            signal.set_wakeup_fd(earlier_fd)
            for s, handler in earlier.items():
                signal.signal(s, handler)
            self._is_watching = False
            os.write(told, b"\0")  # wakes the thread
            thread.join()
            os.close(told)
            os.close(heard)

    def watch_peers(self, processes: Iterable[tuple[int, str]]) -> None:
        """(rank, `process_id()`) of the ranks on this machine: one that dies ends this process too, which would wait
        for it for hours."""
        self._peers = list(processes)

    def leave(self, message: str, code: int) -> NoReturn:
        """End this process now, whatever its other threads wait for. The first rank tells why or, of those that a dead
        one leaves behind, the lowest."""
        left = [rank for rank, process in self._peers if code and _is_running(process)]
        if self._rank == min(left, default=0):
            logger.warning("%s", message)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(code)

    def request(self, reason: str) -> None:
        """Ask for a stop; a second request changes nothing."""
        if self:
            return
        self.reason, self._requested_at = reason, time.monotonic()
        if self.exits_at_once:
            self.leave(f"{reason}: stopped before the first update; start again with the same command", 0)
        if self._rank == 0:
            end_of_bar = "\n" if sys.stderr.isatty() else ""  # of the progress bar
            logger.warning("%s%s: %s", end_of_bar, reason, self.answer)

    def _watch(self, heard: int) -> None:
        while self._is_watching:
            if select.select([heard], [], [], LOOK_EVERY_SECONDS)[0]:
                for number in os.read(heard, 64):
                    self._hear(number)
            self._look_after_launcher()
            self._look_after_peers()

    def _hear(self, number: int) -> None:
        if number not in SIGNALS:
            return
        is_again = self and time.monotonic() > self._requested_at + SAME_CTRL_C_SECONDS
        if number == signal.SIGINT and is_again:
            self.leave(f"stopped at once, in the middle of an update; {self.kept}", 130)
        self.request(f"{signal.Signals(number).name} received")

    def _look_after_launcher(self) -> None:
        if not self and not all(_is_running(process) for process in self._launchers):
            self.request("the launcher has died")
        is_late = self and time.monotonic() > self._requested_at + LAUNCHER_SECONDS
        if is_late and len(self._launchers) == 2 and _is_running(self._launchers[0]):
            os.kill(int(self._launchers[0].partition(":")[0]), signal.SIGKILL)

    def _look_after_peers(self) -> None:
        dead = [rank for rank, process in self._peers if not _is_running(process)]
        if not dead:
            return
        self._missed_since = self._missed_since or time.monotonic()
        if time.monotonic() > self._missed_since + DEAD_RANK_SECONDS:
            self.leave(f"rank {dead[0]} has died and this one cannot go on; {self.kept}", 1)


def ignore_signals_at_exit() -> None:
    """To be called when the work of this process is done: from then on a signal that comes while the interpreter cleans
    up changes nothing, not even the exit code."""
    atexit.register(lambda: [signal.signal(s, signal.SIG_IGN) for s in SIGNALS])


_LISTENING: list[StopRequest] = []


def _stop_listening() -> None:
    """In a forked child, whose signals would reach its parent's thread. It leaves Ctrl-C to the parent."""
    if _LISTENING:
        _LISTENING.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_stop_listening)


def process_id(pid: int | None = None) -> str:
    """The process, this one by default, told apart from a later one of the same number: "1234:56789"."""
    return ":".join(_process_fields(os.getpid() if pid is None else pid)[:2])


def machine_id() -> str:
    """The same for processes that see each other under their numbers: the boot of the machine, and the container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"


def _process_fields(pid: int) -> tuple[str, str, str, str]:
    """(number, time of start, number of the parent, state); empty texts where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", "", "", ""
    return str(pid), fields[19], fields[1], fields[0]


def _is_running(process: str) -> bool:
    """Whether it is there; one that ended and was not waited for is not."""
    pid, _, start = process.partition(":")
    fields = _process_fields(int(pid))
    return bool(start) and fields[1] == start and fields[3] not in ("Z", "X")


def _launchers() -> list[str]:
    """The processes whose death means that the run was given up: the parent of a launched rank, and the `deepspeed`
    command above its launcher. That pair is complete only where the whole run is on this machine."""
    if not os.environ.get("RANK") or not os.environ.get("WORLD_SIZE"):
        return []
    parent = os.getppid()
    found = [process_id(parent)]
    if "deepspeed.launcher.launch" in _command(parent) and os.environ.get("LOCAL_SIZE") == os.environ["WORLD_SIZE"]:
        command = int(_process_fields(parent)[2] or 0)
        # The command died before this process began: its place was taken by the first process of the machine.
        found.append(process_id(command) if command != 1 or "deepspeed" in _command(1) else DEAD)
    return [process for process in found if process != ":"]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
