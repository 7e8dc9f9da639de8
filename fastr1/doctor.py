"""Says whether this machine can run fastr1, by trying: imports, devices and their speed, every kernel, attention and a
real video round trip as a configuration would have them. Changes nothing.

Anything a library throws while it is imported or tried is a finding here, not a crash.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from fastr1.config import PACKAGE, TrainConfig

_LEVEL_STEP = 15  # grey levels between the frames of the test clip: half of it tells a frame from its neighbours
_KERNEL_SECONDS = 600  # for compiling every kernel of the check on a GPU, with room to spare
PIP_TRAIN = "pip install 'fastr1[train]', or in a checkout pip install -e '.[train]'"


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
        "libraries, or run scripts/link_ffmpeg.py of a checkout; without torchcodec, PyAV decodes on the CPU",
    ),
    _Library(
        "liger-kernel",
        "liger_kernel",
        False,
        "pip install liger-kernel (norms and MLPs of the decoder on a GPU, see model.use_liger_kernel)",
    ),
    _Library(
        "flash-attn",
        "flash_attn",
        False,
        "pip install flash-attn --no-build-isolation (GPU only; for model.attn_implementation flash_attention_2)",
    ),
)


def run_checks(config: TrainConfig | None = None) -> list[Check]:
    """Every finding, in the order of the report; attention and decoder as training with `config` would have them."""
    config = config or TrainConfig()
    importlib.import_module("fastr1.training")  # keeps DeepSpeed's warning about a missing GPU back
    checks = [_check_python(), *(_check_library(library) for library in _LIBRARIES)]
    checks.append(_try("fastr1_kernels", _check_kernels, True, "pip install fastr1, or in a checkout pip install -e ."))
    checks += _run_kernels()
    checks.append(_try("device", _describe_devices, True, "install torch"))
    checks.append(_try("speed", lambda: _measure_speed(config), False, "is there memory for a few large matrices?"))
    checks.append(_try("deepspeed accelerator", _describe_accelerator, True, PIP_TRAIN))
    remedy = 'set model.attn_implementation to "sdpa", or install what the line of the library above says'
    checks.append(_try("attention", lambda: check_attention(config), True, remedy))
    remedy = f"{PIP_TRAIN}; see the line of the decoder above, and data.backend"
    checks.append(_try("video decoding", lambda: check_video(config.data.backend), True, remedy))
    return checks


def doctor(as_json: bool = False, config: TrainConfig | None = None) -> int:
    """Prints the report and returns the exit code: 0 when everything essential works, else 1.

    `config`: of the training whose attention and decoder are to be tried; None: the defaults.
    """
    # DeepSpeed and its like print while they are imported; the report alone belongs on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        checks = run_checks(config)
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


def check_attention(config: TrainConfig) -> str:
    """What training and its rollouts compute attention with: the demo's base model, loaded, sampled from and trained on
    as the configuration says.

    Returns: for each of them the setting, and the kernels that ran, by the names that torch or their library has.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastr1.models import load_processor
    from fastr1.models.packed_attention import choose_packed_backend
    from fastr1.models.packed_layout import PackedLayout
    from fastr1.rollout import SamplingParams, build_sampler
    from fastr1.training.policy import load_policy
    from fastr1_kernels.dispatch import uses_triton

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, None] = {}

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = str(op).split(".")[1] if str(op).startswith("aten.") else str(op)
            if any(word in name for word in ("attention", "attn", "fmha")) and "backward" not in name:
                self.seen[name.lstrip("_")] = None
            return op(*args, **(kwargs or {}))

        def __str__(self) -> str:
            return ", ".join(self.seen) or "products and softmax"

    path = PACKAGE / "demo" / "base_model"
    processor = load_processor(path)
    model = load_policy(replace(config, model=replace(config.model, path=str(path)))).eval()
    sample = build_sampler(model, processor, SamplingParams(2), config.rollout)
    prompts = [processor.prompt_ids(text, instruction="").to(model.device) for text in ("Which?", "Which way is it?")]
    completions = torch.ones(2, 3, dtype=torch.long, device=model.device)
    with Watch() as vision:
        tokens = model.visual_tokens([model.encode(processor.blank_pixels(8).to(model.device)) for _ in prompts])
    with Watch() as rollout:
        sample(prompts, [x.detach() for x in tokens], num_generations=2)
    model.train()
    with Watch() as training:
        layout = PackedLayout(model.prompt_lengths(prompts, tokens), [[3]] * 2)
        model.completion_states(prompts, tokens, completions.flatten(), layout).sum().backward()
    backend = choose_packed_backend(config.model.packed_attn_implementation, model.device, model.dtype)
    drawn = str(rollout)
    if config.rollout.backend == "engine":
        drawn += f"; its tokens by {'a Triton kernel' if uses_triton(model.head[0]) else 'plain torch'}"
    parts = (
        f"training {backend} ({training})",
        f"rollout {config.rollout.backend} ({drawn})",
        f"vision {config.model.attn_implementation} ({vision})",
    )
    return f"{str(model.dtype).removeprefix('torch.')} on {model.device}: {', '.join(parts)}"


def check_video(backend: str = "auto") -> str:
    """Writes a one-second H.264 clip that brightens and reads it back through `fastr1.video.load_clip`.

    Raises: ValueError when the frames read are not the frames written.
    """
    import torch

    from fastr1.video import describe_backend, load_clip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        levels = _write_brightening_clip(path)
        clip = load_clip(path, num_frames=4, device=device, backend=backend)
    wanted = [levels[index] for index in clip.indices]
    found = clip.frames.float().mean(dim=(1, 2, 3)).tolist()
    # A wrong frame is off by a whole step; encoding and colour conversion by a few levels.
    if any(abs(level - mean) > _LEVEL_STEP / 2 for level, mean in zip(wanted, found, strict=True)):
        raise ValueError(f"{clip.backend} read frames of brightness {found} where {wanted} was written")
    return f"{clip.backend} read a test clip correctly; {describe_backend(backend)}"


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


def _run_kernels() -> list[Check]:
    """Every kernel once, in a process of its own: what a kernel breaks ends there, and Triton's interpreter is chosen
    when triton is imported."""
    remedy = "python -m fastr1_kernels.selfcheck tells more; is this the triton that this torch asks for?"
    try:
        done = _run_selfcheck()
        findings = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [Check("kernels", False, _one_line(error), False, remedy)]
    if not findings:
        reason = done.stderr.strip().splitlines() or [f"no output, exit code {done.returncode}"]
        return [Check("kernels", False, f"did not run: {reason[-1][:200]}", False, remedy)]
    # On a CPU plain torch does their work.
    is_needed = any(found["detail"].startswith("launched") for found in findings)
    return [
        Check(f"kernel {found['name']}", found["ok"], found["detail"], is_needed, "" if found["ok"] else remedy)
        for found in findings
    ]


def _run_selfcheck() -> subprocess.CompletedProcess[str]:
    spec = importlib.util.find_spec("fastr1_kernels")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    path = [str(Path(place).parent) for place in places] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-m", "fastr1_kernels.selfcheck", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=_KERNEL_SECONDS, env=environment)


def _describe_devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU only, {torch.get_num_threads()} threads"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return f"CUDA {torch.version.cuda}: {', '.join(names)}"


def _measure_speed(config: TrainConfig) -> str:
    """What the roofline of a step is computed from, in the dtype of training."""
    from fastr1.models.devices import resolve_device, resolve_dtype
    from fastr1.roofline import probe_machine

    device = resolve_device()
    return str(probe_machine(device, resolve_dtype(config.model.dtype, device)))


def _describe_accelerator() -> str:
    return str(importlib.import_module("deepspeed.accelerator").get_accelerator().device_name())
