"""Command lines of `fastr1 report` and `fastr1 compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastr1.config import ConfigError


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastr1 report`."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, finished or not")
    help_ = "the page to write (default: RUN_DIR/report.html); the curves are drawn beside it as PNG"
    parser.add_argument("--output", metavar="HTML", help=help_)
    parser.add_argument("--serve", action="store_true", help="serve the page to this machine, and refresh it")
    parser.add_argument("--port", type=int, metavar="N", help="with --serve (default: 8765; 0: any that is free)")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastr1 compare`."""
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folders of runs")
    parser.add_argument(
        "--output", default="compare.html", metavar="HTML", help="the page to write (default: %(default)s)"
    )


def report(args: argparse.Namespace) -> int:
    """`fastr1 report`. Raises: ConfigError for options that do not go together."""
    if args.port is not None and not args.serve:
        raise ConfigError("--port belongs to --serve")
    if args.port is not None and not 0 <= args.port < 2**16:
        raise ConfigError(f"--port is {args.port}; choose one from 0 to 65535")
    if args.serve:
        if args.output is not None:
            raise ConfigError("--serve writes no file: leave out --output")
        from fastr1.reporting.serve import DEFAULT_PORT, serve

        serve(args.run_dir, DEFAULT_PORT if args.port is None else args.port)
        return 0
    if args.output is not None:
        _check_name(args.output)
    from fastr1.reporting.curves import write_report
    from fastr1.reporting.page import PAGE_FILE, save_page
    from fastr1.reporting.read_run import read_run
    from fastr1.reporting.run_log import RunLogError

    run = read_run(args.run_dir)
    page = run.folder / PAGE_FILE if args.output is None else Path(args.output)
    try:
        print(write_report(args.run_dir, page.with_suffix(".png")))
    except RunLogError as error:
        print(f"no {page.with_suffix('.png').name}: {error}", file=sys.stderr)
    print(save_page(run, page))
    return 0


def compare(args: argparse.Namespace) -> int:
    """`fastr1 compare`. Raises: ConfigError for another kind of file."""
    _check_name(args.output)
    from fastr1.reporting.compare import write_comparison

    print(write_comparison(args.run_dirs, args.output))
    return 0


def _check_name(output: str) -> None:
    if Path(output).suffix not in (".html", ".htm"):
        raise ConfigError(f"--output is {output}; the page is HTML: name it so")
