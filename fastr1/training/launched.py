"""What a process knows from its launcher: whether there is one, how many processes there are, and where they meet."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastr1.training.launch import STORE_FD


def is_launched() -> bool:
    """Whether a launcher set both variables; one alone is a leftover of something else."""
    return bool(os.environ.get("RANK")) and bool(os.environ.get("WORLD_SIZE"))


def launched_world_size() -> int:
    """Number of processes of this run, known before any `DistributedModel` exists."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def place_of_launcher(timeout: timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group` for the store of `launch.py`, which has opened its port; under other launchers
    none, since torch reads their variables itself."""
    if not os.environ.get(STORE_FD):
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fd = int(os.environ[STORE_FD]) if rank == 0 else None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world_size, rank == 0, timeout, master_listen_fd=fd)
    return {"store": store, "rank": rank, "world_size": world_size}
