"""The options of `fastr1 eval` and `fastr1 chat`. Nothing heavy is imported here, so that `--help` is quick."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from fastr1.config import (
    INSTRUCTION,
    Backend,
    ConfigError,
    Control,
    DataConfig,
    Dtype,
    GRPOConfig,
    ModelConfig,
    Policy,
    RunConfig,
    find_shipped,
)


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """What `evaluate_checkpoint` takes."""
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, such as final/ of a run")
    parser.add_argument("--data-file", required=True, metavar="FILE", help="annotation file (JSONL)")
    parser.add_argument("--video-root", required=True, metavar="DIR", help="folder the video paths are relative to")
    _add_how_to_ask(parser)
    batch_size = RunConfig.per_device_eval_batch_size
    parser.add_argument(
        "--batch-size", type=positive, default=batch_size, help="questions at a time (default: %(default)s)"
    )
    parser.add_argument("--limit", type=positive, help="only the first LIMIT questions")
    parser.add_argument(
        "--control",
        choices=get_args(Control),
        help="show something other than the clips: what the model knows without looking at them",
    )
    policy, bound = DataConfig.policy, DataConfig.max_bad_fraction
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        default=policy,
        help="a question that cannot be used: an error, or left out and counted (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-fraction", type=_fraction, default=bound, help="most that skip leaves out (default: %(default)s)"
    )
    parser.add_argument(
        "--num-processes", type=positive, default=1, help="one per GPU, or any number on a CPU (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="JSON", help="also write the result, with every completion, to this file")
    parser.add_argument(
        "--frames", metavar="RUN_DIR", help="also write the frames of the clips into this run folder, for its page"
    )


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """What `chat` takes."""
    parser.add_argument("model", metavar="MODEL", help="model folder, such as final/ of a run")
    parser.add_argument("video", metavar="VIDEO", help="video file")
    parser.add_argument("question", metavar="QUESTION", help='the question; "\\n" starts a new line')
    _add_how_to_ask(parser)


def _add_how_to_ask(parser: argparse.ArgumentParser) -> None:
    frames, length = DataConfig.num_frames, GRPOConfig.max_completion_length
    asked = parser.add_argument_group("what is shown", "by default as in training, which the model folder records")
    asked.add_argument("--num-frames", type=_frames, help=f"-1: one per second (nothing recorded: {frames})")
    asked.add_argument("--max-frames", type=positive, help="at most, with one per second (nothing recorded: no limit)")
    asked.add_argument(
        "--instruction", metavar="TEXT", help=f"follows the question (nothing recorded: {INSTRUCTION!r})"
    )
    asked.add_argument(
        "--backend", choices=get_args(Backend), help=f"video decoder (nothing recorded: {DataConfig.backend})"
    )
    parser.add_argument(
        "--max-completion-length", type=positive, default=length, help="in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=_share, default=1.0, help="sample from the likeliest tokens of this mass (default: %(default)s)"
    )
    parser.add_argument("--seed", type=whole, default=0, help="of the sampling (default: %(default)s)")
    dtype = ModelConfig.dtype
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default=dtype, help="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")


def what_to_ask(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `evaluate_checkpoint`, by their names there.

    Raises: ConfigError for options that have no effect beside others.
    """
    if args.policy == "error" and args.max_bad_fraction != DataConfig.max_bad_fraction:
        bound = args.max_bad_fraction
        raise ConfigError(f"--max-bad-fraction {bound} has no effect without --policy skip: give that too")
    names = ["data_file", "video_root", "batch_size", "limit", "control", "policy", "max_bad_fraction"]
    own = {name: getattr(args, name) for name in [*names, "num_processes", "output"]}
    return {"model_path": find_shipped(args.model), **own, **how_to_ask(args)}


def how_to_ask(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `evaluate_checkpoint` and `chat` share, by their names there.

    Raises: ConfigError for sampling options that greedy decoding would ignore.
    """
    if args.temperature == 0 and (args.top_p < 1 or args.seed):
        name, value = ("--top-p", args.top_p) if args.top_p < 1 else ("--seed", args.seed)
        raise ConfigError(f"{name} {value} has no effect with --temperature 0: give a temperature above 0 to sample")
    names = ["num_frames", "max_frames", "instruction", "backend"]
    names += ["max_completion_length", "temperature", "top_p", "seed", "dtype", "device"]
    return {name: getattr(args, name) for name in names}


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more, less than 2**63")
    return int(text)


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def _fraction(text: str) -> float:
    value = not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _share(text: str) -> float:
    value = not_negative(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more, less than 2**63")
    return int(text)


def _frames(text: str) -> int:
    return -1 if text == "-1" else positive(text)
