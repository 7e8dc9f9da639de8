"""How a model was asked in training, kept beside its weights, and how it is to be asked now.

`fastr1.json` in an exported folder holds the number of frames, the instruction, the decoder and the stop strings of the
training run.
Evaluation and chat use them unless told otherwise, and say so.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from fastr1 import __version__
from fastr1.config import Backend, ConfigError, DataConfig, TrainConfig
from fastr1.schema import DataError
from fastr1.video import BackendError, resolve_backend

RECORD_FILE = "fastr1.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """What a training run showed its model."""

    num_frames: int  # -1: one per second
    max_frames: int | None
    instruction: str | None  # None: the conversations of a cold start carry their own
    backend: Backend  # the decoder that was used: "torchcodec" or "pyav"
    stop_strings: tuple[str, ...] = ()  # text that ended a completion; a folder of before this was recorded has none


def record_settings(folder: Path, config: TrainConfig) -> None:
    """Write `fastr1.json` of a run with this configuration into a model folder, which is made where it is missing."""
    data, backend = config.data, resolve_backend(config.data.backend)
    recorded = {
        "num_frames": data.num_frames,
        "max_frames": data.max_frames,
        "instruction": data.instruction if config.task == "grpo" else None,
        "backend": backend,
        "stop_strings": list(config.grpo.stop_strings) if config.task == "grpo" else [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"fastr1": __version__, **recorded}, indent=2, ensure_ascii=False)
    (folder / RECORD_FILE).write_text(content + "\n", encoding="utf-8")


def read_recorded(model_path: str | Path) -> Recorded | None:
    """What a model folder says of its training; None where it says nothing. Raises: DataError for a damaged file."""
    file = Path(model_path) / RECORD_FILE
    if not file.exists():
        return None
    try:
        content = {"stop_strings": [], **json.loads(file.read_text(encoding="utf-8"))}
        if isinstance(content["stop_strings"], list):
            content["stop_strings"] = tuple(content["stop_strings"])
        recorded = Recorded(**{field.name: content[field.name] for field in fields(Recorded)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{file}: unreadable ({reason}); copy the file again, or delete it to use defaults") from error
    for name, value in asdict(recorded).items():
        if not _is_sound(name, value):
            raise DataError(f"{file}: {name} is {value!r}; copy the file again, or delete it to use defaults")
    return recorded


def _is_sound(name: str, value: Any) -> bool:
    if name == "backend":
        return value in get_args(Backend)
    if name == "stop_strings":
        return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)
    if name == "instruction":
        return value is None or isinstance(value, str)
    if type(value) is not int:
        return name == "max_frames" and value is None
    return value > 0 or (name == "num_frames" and value == -1)


def refuse_run_folder(folder: Path) -> None:
    """Name the model where a run or a checkpoint of it was given: neither holds one that can be loaded."""
    around = (folder, folder.parent, folder.parent.parent)
    run = next((place for place in around if (place / "checkpoints").is_dir() or (place / "final").is_dir()), None)
    is_checkpoint = run is not None and folder.is_relative_to(run / "checkpoints")
    if run is None or not (folder == run or is_checkpoint) or any(folder.glob("*.safetensors")):
        return
    what, model = "a checkpoint to go on from" if is_checkpoint else "the folder of a run", run / "final"
    remedy = f"its model is {model}" if model.is_dir() else f"its model will be {model} when the run has ended"
    raise DataError(f"{folder} is {what}, not a model: {remedy}")


def data_settings(
    model_path: str | Path,
    *,
    num_frames: int | None = None,
    max_frames: int | None = None,
    instruction: str | None = None,
    backend: str | None = None,
) -> DataConfig:
    """How to ask this model: what is given here, else what its training recorded, else defaults; logged in one line.

    A recorded decoder that cannot be loaded here is replaced by the one that can, which that line says; one that is
    given is not. Raises: DataError for a damaged record, BackendError for a given decoder that cannot be loaded,
    ConfigError for a limit of frames that has no effect.
    """
    refuse_run_folder(Path(model_path))
    recorded = read_recorded(model_path)
    trained: dict[str, Any] = {} if recorded is None else asdict(recorded)
    if num_frames not in (None, trained.get("num_frames")):
        trained["max_frames"] = None  # it belongs to the recorded number
    given = {"num_frames": num_frames, "max_frames": max_frames, "instruction": instruction}
    values, sources = {}, {}
    for name, value in given.items():
        values[name], sources[name] = _choose(value, trained.get(name), getattr(DataConfig, name))
    if max_frames is not None and values["num_frames"] != -1:
        raise ConfigError(
            f"max_frames is {max_frames} but num_frames is {values['num_frames']} ({sources['num_frames']}); it limits "
            "one frame per second: leave it out, or set num_frames to -1"
        )
    decoder, why = _choose_decoder(backend, trained.get("backend"))
    data = DataConfig(**values, backend=decoder)
    frames = "one frame per second" if data.num_frames == -1 else f"{data.num_frames} frames"
    how = f"{frames} ({sources['num_frames']}), "
    if data.max_frames is not None:
        how += f"at most {data.max_frames} ({sources['max_frames']}), "
    how += f"instruction {data.instruction!r} ({sources['instruction']})"
    logger.info("%s: %s, decoder %s (%s)", model_path, how, decoder, why)
    return data


def stop_strings(model_path: str | Path) -> tuple[str, ...]:
    """Text that ends a completion of this model, as its training recorded it; logged where there is any. Raises:
    DataError for a damaged record."""
    recorded = read_recorded(model_path)
    if recorded is None or not recorded.stop_strings:
        return ()
    logger.info("%s: a completion ends with %s (as trained)", model_path, ", ".join(map(repr, recorded.stop_strings)))
    return recorded.stop_strings


def _choose(given: Any, trained: Any, default: Any) -> tuple[Any, str]:
    """A value and where it is from."""
    if given is not None:
        return given, "given" if trained in (None, given) else f"given; trained with {trained!r}"
    return (default, "default") if trained is None else (trained, "as trained")


def _choose_decoder(given: str | None, trained: str | None) -> tuple[Backend, str]:
    chosen, source = _choose(given, trained, DataConfig.backend)
    try:
        return resolve_backend(chosen), source
    except BackendError:
        if given is not None:
            raise
        return resolve_backend(), f"trained with {trained}, which cannot be loaded here"
