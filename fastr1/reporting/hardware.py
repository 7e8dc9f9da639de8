"""hardware.json of a run folder: what a run was trained on, without which its seconds say nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HARDWARE_FILE = "hardware.json"


def describe_hardware() -> dict[str, Any]:
    """What this process computes on: device, cores it may use, threads and version of torch."""
    import torch  # seconds and 200 MB, and the page that reads the file needs none

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write_hardware(run_dir: str | Path, num_processes: int) -> None:
    """Writes the file, for a run of so many processes with a device each."""
    content = {**describe_hardware(), "processes": num_processes}
    (Path(run_dir) / HARDWARE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
