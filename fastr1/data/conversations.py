"""Conversation files (a LLaVA-style JSON list) → samples of supervised fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastr1.config import DataConfig
from fastr1.data.ledger import LoadedSamples, collect
from fastr1.data.rows import (
    RowError,
    VideoFiles,
    checked_paths,
    describe,
    identifier,
    json_object,
    quote,
    text_field,
    without_placeholder,
)
from fastr1.schema import DataError, SftSample

_EXPECTED = (
    "expected a JSON list of objects with id, conversations and video; "
    "a JSONL file of questions belongs to the task grpo"
)


def load_conversations(
    path: str | Path,
    video_root: str | Path,
    *,
    policy: str = DataConfig.policy,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
    check_files: bool = True,
) -> LoadedSamples[SftSample]:
    """Read a LLaVA-style JSON list: objects with id, video and conversations = [human turn, gpt turn].

    The human turn may carry `<image>` at either end; it is removed and the question stripped. The answer is kept as it
    is. Arguments and errors as in `questions.load_questions`; a bad entry is named by its place in the list, from 0. A
    file that is not one JSON list raises under either policy, because no entry of it can be told good from bad.
    """
    path, root = checked_paths(path, video_root, check_files)
    videos = VideoFiles(root, check_files)
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:  # malformed JSON or not UTF-8
        raise DataError(f"{path}: not valid JSON ({error}); {_EXPECTED}") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: the top level is {type(entries).__name__}; {_EXPECTED}")
    rows = ((f"[{index}]", entry) for index, entry in enumerate(entries))
    return collect(path, rows, lambda origin, entry: _parse_row(entry, origin, videos), policy, max_bad_fraction)


def _parse_row(row: Any, origin: str, videos: VideoFiles) -> SftSample:
    row = json_object(row)
    sample_id = identifier(row, "id")
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise RowError(f"field 'conversations' is {describe(turns)}", "give a list of a human and a gpt turn")
    speakers = [turn.get("from") if isinstance(turn, dict) else turn for turn in turns]
    if speakers != ["human", "gpt"]:
        raise RowError(
            f"the turns are from {quote(speakers)}", "give exactly one 'human' turn followed by one 'gpt' turn"
        )
    question = without_placeholder(text_field(turns[0], "value"), "human turn").strip()
    return SftSample(
        sample_id=sample_id,
        question=question,
        answer=text_field(turns[1], "value"),
        video_path=videos.resolve(text_field(row, "video")),
        origin=origin,
    )
