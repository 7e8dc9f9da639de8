"""What two starts of one run must share, so that a resume is exact or refused.

Every setting of a configuration is compared with the checkpoint's but those of `MAY_CHANGE`, so a setting that is added
is compared from its first day. Names of files are replaced by what is in them: a folder may move, its content must not
change in between. Compared by content:

    data.train_file, data.eval_file   SHA-256 of the file
    data.video_root                   relative name and size in bytes of every clip that is used
    model.path                        the resolved path; of every file in it the name, the size and 17 blocks of 64 KiB,
                                      which differ when weights were trained again
    reward.functions                  SHA-256 of the module of every function that is not built in
    model.use_liger_kernel            whether null stands for true on this machine
    data.backend                      also the decoder that "auto" stands for on this machine
    model.packed_attn_implementation  also the attention that "auto" stands for
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastr1.config import TrainConfig, config_to_dict, without_auto
from fastr1.models.devices import resolve_device, resolve_dtype
from fastr1.models.liger import resolve_liger
from fastr1.models.packed_attention import choose_packed_backend
from fastr1.schema import Sample, SftSample
from fastr1.training.checkpoint import engine_settings
from fastr1.video import describe_backend

# None of these changes an update: where a run lives and is reported, how often it is saved and evaluated, how fast
# clips are read and rewards computed, what memory a rollout keeps, and when bad data stops it. Files are compared by
# content instead.
MAY_CHANGE = (
    "run.output_dir",
    "run.resume_from_checkpoint",
    "run.allow_changed",
    "run.logging_steps",
    "run.report_to",
    "run.report_frames",
    "run.roofline",
    "run.save_steps",
    "run.save_minutes",
    "run.save_total_limit",
    "run.eval_steps",
    "run.per_device_eval_batch_size",
    "data.eval_video_root",
    "data.policy",
    "data.max_bad_fraction",
    "data.num_decode_threads",
    "reward.num_workers",
    "rollout.keep_arenas",
)
# Only the length of the run: nothing before its end depends on it unless the learning rate does.
_LENGTH = ("optim.max_steps", "optim.num_train_epochs")
_NUM_BLOCKS, _BLOCK_BYTES = 17, 1 << 16


def run_settings(
    config: TrainConfig, samples: Sequence[Sample | SftSample], num_processes: int, prompts_per_update: int
) -> dict[str, Any]:
    """Every setting that a resume must share, as a JSON value under the name that a user would change."""
    tree = {**config_to_dict(config), "deepspeed": without_auto(config.deepspeed)}
    settings = {name: value for name, value in _flatten(tree) if name not in MAY_CHANGE}
    optim = config.optim
    if optim.lr_scheduler_type == "constant" and optim.warmup_ratio == 0:
        settings = {name: value for name, value in settings.items() if name not in _LENGTH}
    data, device = config.data, resolve_device()
    dtype, packed = resolve_dtype(config.model.dtype, device), config.model.packed_attn_implementation
    stage = tree["deepspeed"].get("zero_optimization", {}).get("stage", 1)
    return {
        **settings,
        "data.train_file": f"{len(samples)} samples, {_digest_file(Path(data.train_file))}",
        "data.video_root": _digest_clips(samples, Path(data.video_root)),
        "data.eval_file": None if data.eval_file is None else _digest_file(Path(data.eval_file)),
        "data.backend": f"{data.backend}: {describe_backend(data.backend).split()[0]}",
        "model.packed_attn_implementation": f"{packed}: {choose_packed_backend(packed, device, dtype)}",
        "model.use_liger_kernel": resolve_liger(config.model.use_liger_kernel, device),
        "model.path": f"{Path(config.model.path).resolve()}, {_digest_folder(Path(config.model.path))}",
        **({} if config.task == "sft" else {"reward.functions": [_with_source(f) for f in config.reward.functions]}),
        "prompts per update": prompts_per_update,
        **engine_settings(num_processes, stage, dtype, device),
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(digest: Any) -> str:
    return f"sha256 {digest.hexdigest()[:16]}"


def _digest_file(path: Path) -> str:
    if not path.is_file():
        return "missing"  # a file of held-out questions that this run does not read
    return _short(hashlib.sha256(path.read_bytes()))


def _digest_clips(samples: Sequence[Sample | SftSample], root: Path) -> str:
    paths = sorted({sample.video_path for sample in samples})
    sizes = [(path.relative_to(root).as_posix(), path.stat().st_size if path.is_file() else 0) for path in paths]
    return f"{len(paths)} clips, {_short(hashlib.sha256(json.dumps(sizes).encode()))} of names and sizes"


def _digest_folder(folder: Path) -> str:
    """Of every file but hidden ones and notes; large files by blocks spread over them."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or path.suffix == ".md" or any(part.startswith(".") for part in name.parts):
            continue
        size = path.stat().st_size
        digest.update(f"{name.as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            last = max(size - _BLOCK_BYTES, 0)
            for offset in sorted({last * block // (_NUM_BLOCKS - 1) for block in range(_NUM_BLOCKS)}):
                file.seek(offset)
                digest.update(file.read(_BLOCK_BYTES))
    return f"{_short(digest)} of its files"


def _with_source(name: str) -> str:
    """A function of the user's own with the digest of its module: the same name may score otherwise tomorrow."""
    module, colon, _ = name.partition(":")
    spec = importlib.util.find_spec(module) if colon else None
    return name if spec is None or spec.origin is None else f"{name} ({_digest_file(Path(spec.origin))})"
