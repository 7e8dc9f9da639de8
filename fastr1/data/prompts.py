"""Prompt text, token ids with the place of the video, and labels for supervised fine-tuning.

The template is the original's `qwen2_base`:

    {SYSTEM} USER: <image>\\n{question} ASSISTANT: {answer}<|endoftext|>

A prompt stops after `ASSISTANT:`, without a trailing space, so a completion starts with its own space. `<image>` is not
a token: the text is cut there and `IMAGE_TOKEN_INDEX` put in its place.
Source: arXiv 2504.09641, released code, templates `qwen2_base` and `pretrain`.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fastr1.data.questions import PLACEHOLDER
from fastr1.schema import IGNORE_INDEX, IMAGE_TOKEN_INDEX, DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SEPARATOR = " ASSISTANT: "
_MISMATCH_RULES = ("error", "blank")


def build_prompt(problem: str, *, instruction: str) -> str:
    """The text of one question up to and including `ASSISTANT:`.

    The user turn is the problem, one space and the instruction; any `<image>` in it is removed, the whole stripped, and
    the one placeholder put in front on a line of its own. With an empty instruction the problem stands alone.
    """
    question = f"{problem} {instruction}".replace(PLACEHOLDER, "").strip()
    return f"{SYSTEM} USER: {PLACEHOLDER}\n{question}{_SEPARATOR.rstrip()}"


def build_caption_text(caption: str) -> str:
    """The text of one captioned video (template `pretrain`): the placeholder, the caption, a newline."""
    return f"{PLACEHOLDER}{caption}\n"


def tokenize_with_image(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of `text` with `IMAGE_TOKEN_INDEX` at every `<image>`; the pieces between are tokenised separately."""
    pieces = text.split(PLACEHOLDER)
    ids = list(tokenizer(pieces[0]).input_ids)
    for piece in pieces[1:]:
        ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(tokenizer(piece).input_ids)
    return ids


def build_prompt_ids(
    problem: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    instruction: str,
    max_tokens: int,
    origin: str = "question",
) -> list[int]:
    """Token ids of `build_prompt`, the placeholder among them.

    Raises:
        DataError: more than `max_tokens`; the model would cut the end of the question off without a word.
    """
    ids = tokenize_with_image(build_prompt(problem, instruction=instruction), tokenizer)
    if len(ids) > max_tokens:
        raise DataError(
            f"{origin}: the prompt has {len(ids)} tokens and the model takes {max_tokens} beside the video; "
            "shorten the question or raise tokenizer_model_max_length in the config.json of the model"
        )
    return ids


def build_sft_example(
    question: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_mismatch: str = "error",
    origin: str = "sample",
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one supervised turn; the loss covers the answer and the end-of-sequence token.

    Everything is `IGNORE_INDEX` before the boundary: the token count of the text up to and including ` ASSISTANT: `,
    minus 1, because the trailing space merges into the first token of the answer.

    Args:
        question: text of the human turn, instruction included; any `<image>` is removed and the rest stripped.
        on_mismatch: what to do where that boundary cannot be trusted, i.e. the question or the answer holds the
            end-of-sequence text or ` ASSISTANT: `, or the counts disagree: "error" raises, "blank" sets every label to
            `IGNORE_INDEX` as the original does, so the sample trains nothing.
        origin: name of the sample in error messages, "file.json[3]".

    Returns:
        (input_ids, labels), equally long lists; `input_ids` holds `IMAGE_TOKEN_INDEX` once.

    Raises:
        DataError: a mismatch under "error", or an unknown `on_mismatch`.
    """
    if on_mismatch not in _MISMATCH_RULES:
        raise DataError(f"on_mismatch is {on_mismatch!r}; choose one of {', '.join(_MISMATCH_RULES)}")
    eos = str(tokenizer.eos_token)
    prefix = f"{build_prompt(question, instruction='')} "
    input_ids = tokenize_with_image(f"{prefix}{answer}{eos}", tokenizer)
    prefix_ids = tokenize_with_image(prefix, tokenizer)
    boundary = len(prefix_ids) - 1
    mismatch = _find_mismatch(prefix, answer, eos)
    if mismatch is None and input_ids[:boundary] != prefix_ids[:boundary]:
        mismatch = f"the answer {answer[:40]!r} changes how the text before it is tokenised"
    if mismatch is None:
        return input_ids, [IGNORE_INDEX] * boundary + input_ids[boundary:]
    if on_mismatch == "error":
        raise DataError(f"{origin}: no label boundary, because {mismatch}; rewrite the text or drop the sample")
    return input_ids, [IGNORE_INDEX] * len(input_ids)


def _find_mismatch(prefix: str, answer: str, eos: str) -> str | None:
    """Why the turn cannot be split into prompt and answer by its separators, or None."""
    text = prefix + answer
    if eos in text:
        return f"the question or the answer holds {eos!r}"
    if text.count(PLACEHOLDER) != 1:
        return f"the answer holds {PLACEHOLDER!r}"
    if text.count(_SEPARATOR) != 1:
        return f"the question or the answer holds {_SEPARATOR!r}"
    return None
