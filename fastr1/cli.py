"""The `fastr1` command: train, sft, check-data, frames, eval, chat, demo-data, demo, report, compare, doctor.

Heavy modules are imported inside the commands, so `--help` is quick and a wrong configuration is reported before torch
loads. Our own errors print as one line and exit with code 2; FASTR1_DEBUG=1 shows their traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastr1 import __version__
from fastr1.config import (
    ConfigError,
    DataConfig,
    RunConfig,
    TrainConfig,
    config_to_dict,
    find_config,
    find_shipped,
    load_config,
)
from fastr1.evaluation.arguments import (
    add_chat_arguments,
    add_eval_arguments,
    how_to_ask,
    not_negative,
    positive,
    what_to_ask,
    whole,
)
from fastr1.reporting.arguments import add_compare_arguments, add_report_arguments, compare, report

# An error before the ranks know of each other is mostly that of all: the first tells it, and is given time to.
DUPLICATE_SECONDS = 5.0

Command = Callable[[argparse.Namespace], int]
# modules of the extra `train`, torch included, by which its absence shows
_OF_THE_EXTRA = {
    *("av", "deepspeed", "jinja2", "matplotlib", "numpy"),
    *("safetensors", "tokenizers", "torch", "tqdm", "transformers"),
}


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
    except KeyboardInterrupt:  # training listens for itself
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        module = str(error.name).split(".")[0]
        if module not in _OF_THE_EXTRA or os.environ.get("FASTR1_DEBUG") == "1":
            raise
        remedy = "this command needs the extra: pip install 'fastr1[train]', or in a checkout pip install -e '.[train]'"
        print(f"error: the package {module!r} is not installed; {remedy}", file=sys.stderr)
        return 2


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The options that choose a configuration."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="JSON configuration, or the name of a shipped one, e.g. grpo",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, e.g. optim.learning_rate=1e-6; may be repeated",
    )


def add_dry_run_argument(parser: argparse.ArgumentParser) -> None:
    """The option of what trains."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked without a model, print the effective configuration and stop",
    )


def run_config(config: TrainConfig, *, dry_run: bool = False) -> None:
    """Runs the task of a configuration in this process, with progress messages of the first rank."""
    from fastr1.training.stop import StopRequest, ignore_signals_at_exit

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # reward functions of the user's own; the launchers differ in whether it is there
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
    ignore_signals_at_exit()


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
        add_dry_run_argument(parser_)
        parser_.add_argument(
            "--num-processes",
            type=positive,
            default=1,
            metavar="N",
            help="processes on this machine, one per GPU (default: %(default)s); batch sizes are per process",
        )
    _add_check_data(commands)
    _add_frames(commands)
    _add_eval(commands)
    _add_chat(commands)
    _add_demo(commands)

    add_report_arguments(_add(commands, "report", report, "show a run as one page", "runs/demo/grpo"))
    example = "runs/seed0/grpo runs/seed1/grpo --output compare.html"
    add_compare_arguments(_add(commands, "compare", compare, "show several runs beside each other", example))
    doctor = _add(commands, "doctor", _doctor, "check what works on this machine", "--json")
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    add_config_arguments(doctor, required=False)
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


def _add_check_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    help_ = "decode every video of a configuration and write its files without the bad rows"
    parser = _add(commands, "check-data", _check_data, help_, "--config configs/grpo.json")
    add_config_arguments(parser)
    parser.add_argument("--output-dir", metavar="DIR", help="where to write (default: beside data.train_file)")
    parser.add_argument("--num-workers", type=positive, help="processes that decode (default: one per core)")
    parser.add_argument(
        "--timeout-seconds", type=not_negative, default=300.0, help="of one video, 0: no limit (default: %(default)g)"
    )


def _add_frames(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    help_ = "draw the frames of a video that a model would see as one picture"
    parser = _add(commands, "frames", _frames, help_, "clip.mp4 --num-frames 16 --output sheet.png")
    parser.add_argument("video", metavar="VIDEO", help="video file")
    number = DataConfig.num_frames
    parser.add_argument("--num-frames", type=positive, default=number, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write: .png, .jpg, .webp, …")


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    example = "--model runs/demo/grpo/final --data-file runs/demo/data/test.jsonl --video-root runs/demo/data"
    parser = _add(commands, "eval", _eval, "measure the accuracy of a model on held-out questions", example)
    add_eval_arguments(parser)


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    example = 'runs/demo/grpo/final clip.mp4 "Which way does the square go?\\nOptions:\\nA. left.\\nB. right."'
    parser = _add(commands, "chat", _chat, "ask a model one question about one video", example)
    add_chat_arguments(parser)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = _add(
        commands, "demo-data", _demo_data, "write the demo's clips and questions", "--output-dir runs/demo/data"
    )
    data.add_argument("--output-dir", default="runs/demo/data", metavar="DIR", help="default: %(default)s")
    data.add_argument("--num-train", type=positive, default=1200, help="training questions (default: %(default)s)")
    data.add_argument("--num-test", type=positive, default=150, help="held-out questions (default: %(default)s)")
    data.add_argument("--seed", type=whole, default=0, help="default: %(default)s")
    demo = _add(
        commands, "demo", _demo, "the whole pipeline on generated clips, on a CPU or a GPU", "--output-dir runs/demo"
    )
    demo.add_argument("--output-dir", default="runs/demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument("--seed", type=whole, default=0, help="default: %(default)s")
    demo.add_argument("--quick", action="store_true", help="few clips and updates: does every phase work here?")


def _train(args: argparse.Namespace) -> int:
    return _run_task(args, "grpo", "sft")


def _sft(args: argparse.Namespace) -> int:
    return _run_task(args, "sft", "train")


def _run_task(args: argparse.Namespace, task: str, other_command: str) -> int:
    file = find_config(args.config)
    config = load_config(file, args.overrides)
    if config.task != task:
        raise ConfigError(f"{args.config}: task is {config.task!r}; run `fastr1 {other_command}`")
    if args.num_processes > 1:
        from fastr1.training.launch import run_processes

        overrides = [word for override in args.overrides for word in ("--set", override)]
        dry_run = ["--dry-run"] if args.dry_run else []
        return run_processes(args.num_processes, ["--config", str(file), *overrides, *dry_run])
    run_config(config, dry_run=args.dry_run)
    return 0


def _check_data(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from fastr1.check_data import check_data

    workers, timeout = args.num_workers, args.timeout_seconds
    return check_data(config, output_dir=args.output_dir, num_workers=workers, timeout_seconds=timeout)


def _frames(args: argparse.Namespace) -> int:
    from fastr1.video.sheets import write_contact_sheet

    print(write_contact_sheet(args.video, args.output, args.num_frames))
    return 0


def _eval(args: argparse.Namespace) -> int:
    from fastr1.evaluation.checkpoint import evaluate_checkpoint

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = what_to_ask(args)
    if args.frames is not None:
        if not (Path(args.frames) / "config.json").is_file():
            raise ConfigError(f"--frames is {args.frames}, which holds no config.json: give the folder of a run")
        from fastr1.reporting.frames import recording

        options["recording"] = partial(recording, args.frames, RunConfig.report_frames, args.video_root)
    result = evaluate_checkpoint(**options)
    print(json.dumps(result, indent=2))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from fastr1.evaluation.chat import chat

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    answer = chat(find_shipped(args.model), args.video, args.question.replace("\\n", "\n"), **how_to_ask(args))
    print(answer.format())
    if answer.is_truncated:
        print(f"cut off at --max-completion-length {args.max_completion_length}", file=sys.stderr)
    return 0


def _demo_data(args: argparse.Namespace) -> int:
    from fastr1.demo.dataset import write_demo_dataset

    try:
        write_demo_dataset(Path(args.output_dir), num_train=args.num_train, num_test=args.num_test, seed=args.seed)
    except OSError as error:
        raise ConfigError(f"--output-dir {args.output_dir}: {error.strerror} ({error.filename})") from error
    print(f"written to {args.output_dir}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from fastr1.demo.pipeline import run_demo

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_demo(Path(args.output_dir), seed=args.seed, quick=args.quick)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastr1.doctor import doctor

    if args.config is None and args.overrides:
        raise ConfigError("--set changes a configuration: give --config too")
    config = None if args.config is None else load_config(args.config, args.overrides)
    return doctor(as_json=args.json, config=config)


if __name__ == "__main__":
    sys.exit(main())
