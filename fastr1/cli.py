"""The `fastr1` command: train, sft, eval, chat, demo-data, demo, report, doctor.

Heavy modules are imported inside the commands, so `--help` is quick and a wrong configuration is reported before torch
loads. Our own errors print as one line and exit with code 2; FASTR1_DEBUG=1 shows their traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from fastr1 import __version__
from fastr1.config import (
    INSTRUCTION,
    ConfigError,
    Control,
    DataConfig,
    GRPOConfig,
    RunConfig,
    TrainConfig,
    config_to_dict,
    load_config,
)

# An error before the ranks know of each other is mostly that of all: the first tells it, and is given time to.
DUPLICATE_SECONDS = 5.0

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    command: Command = args.command
    return report_errors(lambda: command(args))


def report_errors(action: Callable[[], int]) -> int:
    """Runs `action`; an error that fastr1 itself raised becomes one line on standard error and exit code 2. Of several
    ranks that fail together one tells it; a launcher ends the others when the first has failed."""
    try:
        return action()
    except ValueError as error:
        is_ours = type(error).__module__.split(".")[0] in ("fastr1", "fastr1_kernels")
        if not is_ours or os.environ.get("FASTR1_DEBUG") == "1":
            raise
        if type(error).__name__ == "PeerError":
            return 2
        if os.environ.get("RANK", "0") != "0" and not getattr(error, "is_on_every_rank", False):
            time.sleep(DUPLICATE_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose a configuration."""
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration, e.g. configs/grpo.json")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, e.g. optim.learning_rate=1e-6; may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked without a model, print the effective configuration and stop",
    )


def run_config(config: TrainConfig, *, dry_run: bool = False) -> None:
    """Runs the task of a configuration in this process, with progress messages of the first rank."""
    from fastr1.training.stop import StopRequest

    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s")
    if dry_run:
        _check_only(config, is_main)
        return
    stop = StopRequest(exits_at_once=True)
    with stop.watching():  # also while the modules below are being loaded, which takes seconds
        if config.task == "sft":
            from fastr1.training.sft import run_sft

            run_sft(config, stop)
        else:
            from fastr1.training.grpo import run_grpo

            run_grpo(config, stop)


def _check_only(config: TrainConfig, is_main: bool) -> None:
    # What DeepSpeed and its like print while they are imported goes elsewhere: the output is the configuration alone.
    with contextlib.redirect_stdout(sys.stderr):
        from fastr1.training.grpo import prepare_grpo
        from fastr1.training.sft import prepare_sft

        run = prepare_sft(config) if config.task == "sft" else prepare_grpo(config)
    if is_main:
        print(json.dumps(config_to_dict(config), indent=2, ensure_ascii=False))
        logging.getLogger(__name__).info("nothing is wrong: %s", run.describe())


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(prog="fastr1", description="GRPO training for small video language models.")
    parser.add_argument("--version", action="version", version=f"fastr1 {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = _add(commands, "train", _train, "train with GRPO", "--config configs/grpo.json --num-processes 2")
    sft = _add(commands, "sft", _sft, "supervised fine-tuning (cold start)", "--config configs/demo_coldstart.json")
    for parser_ in (train, sft):
        add_config_arguments(parser_)
        parser_.add_argument(
            "--num-processes",
            type=_positive,
            default=1,
            metavar="N",
            help="processes on this machine, one per GPU (default: %(default)s); batch sizes are per process",
        )
    _add_eval(commands)
    _add_chat(commands)
    _add_demo(commands)

    report = _add(commands, "report", _report, "draw a run as PNG", "runs/demo/grpo")
    report.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run (holds metrics.jsonl)")
    report.add_argument("--output", metavar="PNG", help="where to write it (default: RUN_DIR/report.png)")
    doctor = _add(commands, "doctor", _doctor, "check what works on this machine", "--json")
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: Command, help_: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_,
        description=help_[0].upper() + help_[1:] + ".",
        epilog=f"example:\n  fastr1 {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    example = (
        "--model runs/demo/grpo/final --data-file runs/demo/data/test.jsonl --video-root runs/demo/data --num-frames 8"
    )
    parser = _add(commands, "eval", _eval, "measure the accuracy of a checkpoint on held-out questions", example)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--data-file", required=True, metavar="FILE", help="annotation file (JSONL)")
    parser.add_argument("--video-root", required=True, metavar="DIR", help="folder the video paths are relative to")
    _add_sampling(parser)
    batch_size = RunConfig.per_device_eval_batch_size
    parser.add_argument(
        "--batch-size", type=_positive, default=batch_size, help="questions at a time (default: %(default)s)"
    )
    parser.add_argument("--limit", type=_positive, help="only the first LIMIT questions")
    parser.add_argument(
        "--control",
        choices=get_args(Control),
        help="show something else than the clips: what the model knows without looking at them",
    )
    parser.add_argument("--output", metavar="JSON", help="also write the result, with every completion, to this file")


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    example = 'runs/demo/grpo/final clip.mp4 "Which way does the square go?\\nOptions:\\nA. left.\\nB. right."'
    parser = _add(commands, "chat", _chat, "ask a checkpoint one question about one video", example)
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    parser.add_argument("video", metavar="VIDEO", help="video file")
    parser.add_argument("question", metavar="QUESTION", help='the question; "\\n" starts a new line')
    _add_sampling(parser)
    parser.add_argument(
        "--temperature", type=_not_negative, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    frames, length = DataConfig.num_frames, GRPOConfig.max_completion_length
    parser.add_argument("--num-frames", type=_frames, default=frames, help="-1: one per second (default: %(default)s)")
    parser.add_argument(
        "--max-completion-length", type=_positive, default=length, help="in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--instruction", default=INSTRUCTION, metavar="TEXT", help="follows the question (default: %(default)r)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = _add(
        commands, "demo-data", _demo_data, "write the demo's clips and questions", "--output-dir runs/demo/data"
    )
    data.add_argument("--output-dir", default="runs/demo/data", metavar="DIR", help="default: %(default)s")
    data.add_argument("--num-train", type=_positive, default=480, help="training questions (default: %(default)s)")
    data.add_argument("--num-test", type=_positive, default=150, help="held-out questions (default: %(default)s)")
    data.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo = _add(
        commands, "demo", _demo, "the whole pipeline on generated clips, on a CPU or a GPU", "--output-dir runs/demo"
    )
    demo.add_argument("--output-dir", default="runs/demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def _frames(text: str) -> int:
    return -1 if text == "-1" else _positive(text)


def _train(args: argparse.Namespace) -> int:
    return _run_task(args, "grpo", "sft")


def _sft(args: argparse.Namespace) -> int:
    return _run_task(args, "sft", "train")


def _run_task(args: argparse.Namespace, task: str, other_command: str) -> int:
    config = load_config(args.config, args.overrides)
    if config.task != task:
        raise ConfigError(f"{args.config}: task is {config.task!r}; run `fastr1 {other_command}`")
    if args.num_processes > 1:
        from fastr1.training.launch import run_processes

        overrides = [word for override in args.overrides for word in ("--set", override)]
        dry_run = ["--dry-run"] if args.dry_run else []
        return run_processes(args.num_processes, ["--config", args.config, *overrides, *dry_run])
    run_config(config, dry_run=args.dry_run)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from fastr1.evaluation.multiple_choice import evaluate_checkpoint

    result = evaluate_checkpoint(
        model_path=args.model,
        data_file=args.data_file,
        video_root=args.video_root,
        num_frames=args.num_frames,
        batch_size=args.batch_size,
        max_completion_length=args.max_completion_length,
        limit=args.limit,
        instruction=args.instruction,
        control=args.control,
        device=args.device,
        output=args.output,
    )
    print(json.dumps(result, indent=2))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from fastr1.evaluation.chat import chat

    answer = chat(
        args.model,
        args.video,
        args.question.replace("\\n", "\n"),
        num_frames=args.num_frames,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        instruction=args.instruction,
        device=args.device,
    )
    print(answer.text)
    return 0


def _demo_data(args: argparse.Namespace) -> int:
    from fastr1.demo.dataset import write_demo_dataset

    write_demo_dataset(Path(args.output_dir), num_train=args.num_train, num_test=args.num_test, seed=args.seed)
    print(f"written to {args.output_dir}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from fastr1.demo.pipeline import run_demo

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_demo(Path(args.output_dir), seed=args.seed)
    return 0


def _report(args: argparse.Namespace) -> int:
    from fastr1.reporting.curves import write_report

    print(write_report(args.run_dir, args.output))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastr1.doctor import doctor

    return doctor(as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
