"""Says whether this machine can run fastr1, by trying: imports, devices, a real video round trip. Changes nothing.

Anything a library throws while it is imported or tried is a finding here, not a crash.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

_LEVEL_STEP = 15  # grey levels between the frames of the test clip: half of it tells a frame from its neighbours
PIP_TRAIN = 'pip install -e ".[train]" in the fastr1 checkout'


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    detail: str  # version, device or error
    essential: bool = True  # whether training needs it
    remedy: str = ""  # what to do when it is not ok


@dataclass(frozen=True)
class _Library:
    name: str  # of the distribution
    module: str
    essential: bool
    remedy: str


_LIBRARIES = (
    _Library("torch", "torch", True, "install torch >= 2.11 as described on pytorch.org"),
    _Library("triton", "triton", False, "pip install triton (Linux; the package of the losses asks for it)"),
    _Library("transformers", "transformers", True, PIP_TRAIN),
    _Library("deepspeed", "deepspeed", True, f"{PIP_TRAIN}, with torch already installed"),
    _Library("av", "av", True, PIP_TRAIN),
    _Library(
        "torchcodec",
        "torchcodec",
        False,
        "pip install torchcodec (0.13 with a CPU-only torch, 0.14 or later with CUDA 13) and FFmpeg 4 to 8 shared "
        "libraries, or run scripts/link_ffmpeg.py; without torchcodec, PyAV decodes on the CPU",
    ),
    _Library(
        "liger-kernel",
        "liger_kernel",
        False,
        "pip install liger-kernel (a peer in the benches; training does not use it)",
    ),
    _Library(
        "flash-attn",
        "flash_attn",
        False,
        "pip install flash-attn --no-build-isolation (GPU only; for model.attn_implementation flash_attention_2)",
    ),
)


def run_checks() -> list[Check]:
    """Every finding, in the order of the report."""
    checks = [_check_python(), *(_check_library(library) for library in _LIBRARIES)]
    checks.append(_try("fastr1_kernels", _check_kernels, True, "pip install -e . in the fastr1 checkout"))
    checks.append(_try("device", _describe_devices, True, "install torch"))
    checks.append(_try("deepspeed accelerator", _describe_accelerator, True, PIP_TRAIN))
    checks.append(_try("video decoding", check_video, True, f"{PIP_TRAIN}; see the line of the decoder above"))
    return checks


def doctor(as_json: bool = False) -> int:
    """Prints the report and returns the exit code: 0 when everything essential works, else 1."""
    # DeepSpeed and its like print while they are imported; the report alone belongs on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        checks = run_checks()
    is_ok = all(check.ok for check in checks if check.essential)
    if as_json:
        print(json.dumps({"ok": is_ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(format_report(checks))
    return 0 if is_ok else 1


def format_report(checks: list[Check]) -> str:
    """The findings as aligned lines, remedies below what is missing, and a verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "ok" if check.ok else ("MISSING" if check.essential else "-")
        lines.append(f"{mark:8}{check.name:{width}}  {check.detail}")
        if not check.ok and check.remedy:
            lines.append(f"{'':8}{'':{width}}  -> {check.remedy}")
    missing = [check.name for check in checks if check.essential and not check.ok]
    verdict = f"Training needs: {', '.join(missing)}." if missing else "Everything that training needs works."
    return "\n".join([*lines, "", verdict])


def check_video() -> str:
    """Writes a one-second H.264 clip that brightens and reads it back through `fastr1.video.load_clip`.

    Raises: ValueError when the frames read are not the frames written.
    """
    import torch

    from fastr1.video import describe_backend, load_clip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        levels = _write_brightening_clip(path)
        clip = load_clip(path, num_frames=4, device=device, backend="auto")
    wanted = [levels[index] for index in clip.indices]
    found = clip.frames.float().mean(dim=(1, 2, 3)).tolist()
    # A wrong frame is off by a whole step; encoding and colour conversion by a few levels.
    if any(abs(level - mean) > _LEVEL_STEP / 2 for level, mean in zip(wanted, found, strict=True)):
        raise ValueError(f"{clip.backend} read frames of brightness {found} where {wanted} was written")
    return f"{clip.backend} read a test clip correctly; {describe_backend()}"


def _write_brightening_clip(path: Path, num_frames: int = 12) -> list[int]:
    """A clip of plain grey frames; returns the grey level of each."""
    import av
    import numpy as np

    levels = [40 + _LEVEL_STEP * i for i in range(num_frames)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=num_frames)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for level in levels:
            picture = np.full((96, 128, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return levels


def _try(name: str, probe: Callable[[], str], essential: bool, remedy: str) -> Check:
    try:
        return Check(name, True, probe(), essential)
    except Exception as error:  # whatever a library throws is the finding
        return Check(name, False, _one_line(error), essential, remedy)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _check_python() -> Check:
    is_ok = sys.version_info >= (3, 10)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", is_ok, detail, True, "" if is_ok else "use Python 3.10 or later")


def _check_library(library: _Library) -> Check:
    def probe() -> str:
        version = metadata.version(library.name)
        if library.module == "torchcodec":
            # Loaded as the decoder loads it: with the FFmpeg that scripts/link_ffmpeg.py may have provided.
            importlib.import_module("fastr1.video.torchcodec_backend").load_torchcodec()
        else:
            importlib.import_module(library.module)
        return version

    try:
        return Check(library.name, True, probe(), library.essential)
    except metadata.PackageNotFoundError:
        return Check(library.name, False, "not installed", library.essential, library.remedy)
    except Exception as error:  # installed but broken, e.g. a shared library is missing
        detail = f"{metadata.version(library.name)} does not import: {_one_line(error)}"
        return Check(library.name, False, detail, library.essential, library.remedy)


def _check_kernels() -> str:
    module = importlib.import_module("fastr1_kernels.losses")  # the package alone would not load torch
    return f"imports from {Path(str(module.__file__)).parent}"


def _describe_devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU only, {torch.get_num_threads()} threads"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return f"CUDA {torch.version.cuda}: {', '.join(names)}"


def _describe_accelerator() -> str:
    return str(importlib.import_module("deepspeed.accelerator").get_accelerator().device_name())
