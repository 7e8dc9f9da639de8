"""Prompt text, token ids with the place of the video, and the border between prompt and answer of a conversation.

The template is the original's `qwen2_base`:

    {SYSTEM} USER: <image>\\n{question} ASSISTANT: {answer}<|endoftext|>

A prompt stops after `ASSISTANT:`, without a trailing space, so a completion starts with its own space. `<image>` is not
a token: the text is cut there and `IMAGE_TOKEN_INDEX` put in its place.
Source: arXiv 2504.09641, released code, templates `qwen2_base` and `pretrain`.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fastr1.data.rows import PLACEHOLDER
from fastr1.schema import DataError

IMAGE_TOKEN_INDEX = -200  # id that marks the place of the visual tokens

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SEPARATOR = " ASSISTANT: "


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


def split_conversation(
    question: str, answer: str, tokenizer: PreTrainedTokenizerBase, *, origin: str = "sample"
) -> tuple[list[int], list[int]]:
    """Token ids of one supervised turn: the prompt, and the answer with the end-of-sequence token behind it.

    The border is the token count of the text up to and including ` ASSISTANT: `, minus 1, because the trailing space
    merges into the first token of the answer.

    Args:
        question: text of the human turn, instruction included; any `<image>` is removed and the rest stripped.
        origin: name of the sample in error messages, "file.json[3]".

    Raises:
        DataError: the border cannot be trusted, because the question or the answer holds the end-of-sequence text or
            ` ASSISTANT: `, or the answer changes how the prompt is tokenised.
    """
    eos = str(tokenizer.eos_token)
    prefix = f"{build_prompt(question, instruction='')} "
    input_ids = tokenize_with_image(f"{prefix}{answer}{eos}", tokenizer)
    prefix_ids = tokenize_with_image(prefix, tokenizer)
    boundary = len(prefix_ids) - 1
    mismatch = _find_mismatch(prefix, answer, eos)
    if mismatch is None and input_ids[:boundary] != prefix_ids[:boundary]:
        mismatch = f"the answer {answer[:40]!r} changes how the text before it is tokenised"
    if mismatch is not None:
        raise DataError(f"{origin}: no label boundary, because {mismatch}; rewrite the text or drop the sample")
    return input_ids[:boundary], input_ids[boundary:]


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
