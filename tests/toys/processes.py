"""Watching the processes that a test starts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path


def listen() -> None:
    """In a child before it begins: tests may be run in the background, where the shell has Ctrl-C ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_of(named: Path) -> dict[int, str]:
    """Number and command line of all that runs with this path in it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(named) in command and is_running(int(path.name)):
            found[int(path.name)] = command
    return found
