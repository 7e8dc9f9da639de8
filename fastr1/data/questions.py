"""Facts about the text of a question: the place of the video in it and the letters it offers. Pure text."""

from __future__ import annotations

import re

PLACEHOLDER = "<image>"  # literal that marks the place of the visual tokens in a text
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):](?:\s|$)", re.MULTILINE)
_OPTIONS_HEADER = re.compile(r"^\s*Options:\s*$", re.MULTILINE)


def option_letters(problem: str) -> str:
    """Letters of the options, in order of appearance: "ABCDE" for five lines `A. …` to `E. …`.

    Lines `A. text`, `A) text`, `(A) text` and `A: text` count. Where a line `Options:` exists, only what follows it is
    read, so a question that itself starts with "A. " is not mistaken for an option.

    Returns:
        The letters, "" where there are none. Repeated or missing letters are returned as found.
    """
    header = _OPTIONS_HEADER.search(problem)
    return "".join(_OPTION_LINE.findall(problem, header.end() if header else 0))
