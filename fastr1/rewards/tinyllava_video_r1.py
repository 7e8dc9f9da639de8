"""The reward of TinyLLaVA-Video-R1, and its two parts, which are reported beside it.

`accuracy_reward` is the training rule of the original code, quirks included: a bare `C` and `Cats are …` count for C,
`(C)`, `c` or a line break inside the tags do not. (`answers.extract_answer_letter` is the parser of its evaluation:
tags needed, either case, `(C)` accepted.) The original also asks a symbolic maths checker first. On lettered answers
that check never succeeds (it finds no expression in `<answer>C</answer>`), so it is left out: no value changes.

Source: arXiv 2504.09641, section 3, and its released code (accuracy, format and combined reward).
"""

from __future__ import annotations

import re

from fastr1.config import RewardConfig
from fastr1.rewards.answers import extract_think

# no DOTALL: tags around a line break are not seen by the accuracy rule
_ANSWER = re.compile(r"<answer>(.*?)</answer>")


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


def _tagged(text: str) -> str:
    match = _ANSWER.search(text)
    return (match[1] if match else text).strip()
