"""Trains from a configuration file, on one process or under a launcher.

    deepspeed fastr1/train.py --config configs/grpo.json
    deepspeed --num_gpus 4 fastr1/train.py --config configs/nextqa_coldstart.json --set model.path=/models/base
    python fastr1/train.py --config configs/grpo.json --set run.output_dir=runs/try
    python fastr1/train.py --config configs/grpo.json --dry-run

The launchers run this file as a script, from a checkout that need not be installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Python puts the folder of a script first on the path: the modules of this package would hide top-level ones.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _here]
    sys.path[:0] = [str(_here.parent), str(_here.parent / "kernels")]

from fastr1.cli import add_config_arguments, add_dry_run_argument, report_errors, run_config
from fastr1.config import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, checks the configuration, then runs its task."""
    parser = argparse.ArgumentParser(prog="train.py", description="Run the task of a configuration: GRPO or SFT.")
    add_config_arguments(parser)
    add_dry_run_argument(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    args = parser.parse_args(argv)
    if args.local_rank is not None and args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))

    def run() -> int:
        run_config(load_config(args.config, args.overrides), dry_run=args.dry_run)
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
