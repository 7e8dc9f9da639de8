"""Ties the shipped base model to the sources it belongs to: base_model/SOURCES.sha256, as `sha256sum` writes it.

    python -m fastr1.demo.digest            # do they still agree?
    python -m fastr1.demo.digest --write    # say that they do

A base model that was taught other scenes or words than those of today still loads and runs; it is merely worse, and
nothing else would tell.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent
SOURCES = ("scenes.py", "base.py", "pretrain.py")
DIGEST_FILE = "SOURCES.sha256"
WRITE_COMMAND = "python -m fastr1.demo.digest --write"


def changed_sources(base_model: Path = DEMO / "base_model", sources: Path = DEMO) -> list[str]:
    """Names of the sources that differ from those `base_model` was written for."""
    recorded = (base_model / DIGEST_FILE).read_text().splitlines()
    return [name for name in SOURCES if _line(sources, name) not in recorded]


def write_digest(base_model: Path = DEMO / "base_model", sources: Path = DEMO) -> Path:
    """Record that `base_model` belongs to the sources as they are."""
    path = base_model / DIGEST_FILE
    path.write_text("".join(f"{_line(sources, name)}\n" for name in SOURCES))
    return path


def explain(changed: list[str]) -> str:
    """What to do about sources that differ."""
    return (
        f"{', '.join(changed)} changed since fastr1/demo/base_model was made. If the base would learn something else "
        "from that (scenes, wording, tokenizer, architecture, recipe): train it again with "
        "`python -m fastr1.demo.pretrain`, run the demo with every seed and add the rows (scripts/record_demo.py). "
        "If it cannot (a comment, a name, a move): "
        f"`{WRITE_COMMAND}`."
    )


def _line(sources: Path, name: str) -> str:
    return f"{hashlib.sha256((sources / name).read_bytes()).hexdigest()}  {name}"


def main(argv: list[str] | None = None) -> int:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Do the demo's base model and its sources agree?")
    parser.add_argument("--write", action="store_true", help="record that they do")
    if parser.parse_args(argv).write:
        print(f"written: {write_digest()}")
    elif changed := changed_sources():
        print(explain(changed), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
