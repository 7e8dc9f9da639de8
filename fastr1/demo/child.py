"""A command that ends before the demo does, whatever signal the demo gets. It needs the standard library alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run_to_its_end(command: Sequence[str], environment: dict[str, str]) -> None:
    """Like `subprocess.run`, but a signal to this process is passed on to all that the child started, and their end is
    waited for: the launcher itself does not wait for a checkpoint."""

    child: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def leave(number: int, frame: object) -> None:
        received.append(number)
        if child is not None:  # one that comes while the child is being started is acted on as soon as it has a number
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell
        numbers.pop()
    earlier = {number: signal.signal(number, leave) for number in numbers}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        if received:
            leave(received[0], None)
        code = child.wait()
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(ProcessLookupError):  # nothing of its session is left
            os.killpg(child.pid, signal.SIGTERM)
            while _is_any_running(child.pid):
                time.sleep(0.1)
        print("the demo was stopped; the same command begins it anew, without what its training saved", file=sys.stderr)
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if code:
        raise subprocess.CalledProcessError(code, command)


def _is_any_running(group: int) -> bool:
    """Those that ended do not count: what runs as process 1 of a container may never wait for them."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False
