"""Reading a completion: the thought of a well-formed one, and the letter it answers with. Text in, no state.

Source: the evaluation of the released code of arXiv 2504.09641.
"""

from __future__ import annotations

import re

_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"
_TAGS = ("<think>", "</think>", _ANSWER_OPEN, _ANSWER_CLOSE)
_WELL_FORMED = re.compile(r"<think>(.*?)</think>\s*<answer>.*?</answer>", re.DOTALL)


def extract_think(completion: str) -> str | None:
    """The stripped text between the think tags of a well-formed completion ("" if empty), None if badly formed.

    Well formed: the whole stripped text is `<think>…</think>`, optional white space, `<answer>…</answer>`, and each of
    the four tags occurs exactly once.
    """
    text = completion.strip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return None
    match = _WELL_FORMED.fullmatch(text)
    return None if match is None else match[1].strip()


def extract_answer_letter(completion: str, options: str = "ABCDE") -> str | None:
    """The option letter a completion answers with, in upper case; None where there is none to read.

    Reads the first `<answer>…</answer>` whose content, stripped, is a single line. If its first character is one of
    `options` in either case, that is the letter; else the first of `options`, in their order, that occurs as `(X)` or
    `(x)`. Where the original guesses at random, this returns None: callers count those.
    """
    content = _answer_line(completion)
    if not content:
        return None
    first = content[0].upper()
    if first in options:
        return first
    return next((letter for letter in options if f"({letter})" in content or f"({letter.lower()})" in content), None)


def _answer_line(text: str) -> str | None:
    r"""What `<answer>\s*(.*?)\s*</answer>` captures first, in linear time per tag.

    The pattern itself takes cubic time on an open tag followed by thousands of blanks, which a derailed model writes.
    """
    for opening in re.finditer(_ANSWER_OPEN, text):
        content, closing, _ = text[opening.end() :].partition(_ANSWER_CLOSE)
        if not closing:
            return None
        if "\n" not in content.strip():
            return content.strip()
    return None
