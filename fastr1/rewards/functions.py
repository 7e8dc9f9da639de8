"""The built-in rewards for one completion. Text in, float out; no state.

Two rules exist for "is the answer right", on purpose:

- `accuracy_reward` is the training rule of the original code, quirks included: a bare `C` and `Cats are …` count for C,
  `(C)`, `c` or a line break inside the tags do not.
- `extract_answer_letter` is the parser of its evaluation: tags needed, either case, `(C)` accepted.

The original also asks a symbolic maths checker first. On lettered answers that check never succeeds (it finds no
expression in `<answer>C</answer>`), so it is left out: no value changes.

Source: arXiv 2504.09641, section 3, and its released code (accuracy, format and combined reward).
"""

from __future__ import annotations

import re

from fastr1.config import RewardConfig

_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"
_TAGS = ("<think>", "</think>", _ANSWER_OPEN, _ANSWER_CLOSE)
# no DOTALL: tags around a line break are not seen by the accuracy rule
_ANSWER = re.compile(r"<answer>(.*?)</answer>")
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


def accuracy_reward(completion: str, solution: str) -> float:
    """1.0 if the completion answers as `solution` ("<answer>C</answer>") does, else 0.0.

    The student's answer is the content of its first answer tags on one line, or the whole text where there are none. It
    is right if it equals the solution's letter or, without being empty, starts with it. Case matters.
    """
    text, truth = completion.strip(), _tagged(solution.strip())
    student = _tagged(text)
    return float(student != "" and truth in (student, student[0]))


def format_reward(completion: str, config: RewardConfig) -> float:
    """r0 + r1 · min(L / max_think_chars, 1) for a well-formed completion with L characters of thought, else 0.0."""
    think = extract_think(completion)
    if think is None:
        return 0.0
    return config.base + config.length_bonus * min(len(think) / config.max_think_chars, 1.0)


def tinyllava_video_r1(completion: str, solution: str, config: RewardConfig) -> float:
    """The reward of TinyLLaVA-Video-R1 from accuracy a ∈ {0, 1} and format reward f.

    | case                | mode "code" | mode "paper" | with the default constants |
    |---------------------|-------------|--------------|----------------------------|
    | right, well formed  | correct + f | correct + f  | 1.5 to 2                   |
    | wrong, well formed  | −f          | −f           | −1 to −0.5                 |
    | right, badly formed | correct     | bad_format   | code 1, paper −2           |
    | wrong, badly formed | bad_format  | bad_format   | −2                         |

    "code" is written as in the released code: r = correct·a + (2a − 1)·f, and any r that is exactly 0 becomes
    `bad_format`. "paper" gives `bad_format` whenever f = 0.
    """
    is_right = accuracy_reward(completion, solution) == 1.0
    quality = format_reward(completion, config)
    reward = config.correct + quality if is_right else -quality
    if config.mode == "paper":
        return reward if quality > 0.0 else config.bad_format
    return reward if reward != 0.0 else config.bad_format


def think_format(completion: str) -> float:
    """1.0 if the completion is well formed (see `extract_think`), else 0.0."""
    return float(extract_think(completion) is not None)


def multiple_choice_accuracy(completion: str, solution: str, options: str = "ABCDE") -> float:
    """1.0 if the letter read by `extract_answer_letter` is the solution's, else 0.0 (also where none can be read)."""
    truth = extract_answer_letter(solution, options)
    if truth is None:
        raise ValueError(f"solution {solution!r} names none of the options {options!r}; write '<answer>A</answer>'")
    return float(extract_answer_letter(completion, options) == truth)


def _tagged(text: str) -> str:
    match = _ANSWER.search(text)
    return (match[1] if match else text).strip()


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
