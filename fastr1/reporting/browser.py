"""The groups, questions and contact sheets of a page, as its template takes them.

Each kind has a share of the page's size; what comes first is kept, and what is left out is counted.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastr1.reporting.held_out import AFTER, BEFORE, OUTCOMES, Pair
from fastr1.reporting.read_run import MAX_CHARS, Run, Sheet, cut
from fastr1.reporting.rollout_picks import Group

GROUP_BYTES, PAIR_BYTES, SHEET_BYTES = 4_000_000, 2_000_000, 7_000_000
_PIECES = re.compile(r"<think>(?P<think>.*?)(?:</think>|\Z)|<answer>(?P<answer>.*?)(?:</answer>|\Z)", re.DOTALL)
_OPTION = re.compile(r"^\(?([A-Z])[.):]")

Context = dict[str, Any]


class Budget:
    """Bytes that may still be written."""

    def __init__(self, size: float) -> None:
        self._left = size
        self.num_refused = 0

    def takes(self, size: int) -> bool:
        if size > self._left:
            self.num_refused += 1
            return False
        self._left -= size
        return True


class Sheets:
    """The contact sheets of a page, each once."""

    def __init__(self, run: Run, share: float = 1.0) -> None:
        self._run, self._budget = run, Budget(share * SHEET_BYTES)
        self.content: dict[str, str] = {}  # name → base64 of the JPEG
        self._missing: set[Path] = set()
        self._num_wanted = 0

    def use(self, video: str, sample_id: str | None = None) -> Context | None:
        """What the template needs of the clip's sheet; None where there is none, or no room."""
        sheet: Sheet | None = self._run.sheet_of(video, sample_id)
        if sheet is None:
            return None
        name = sheet.file.name
        if name not in self.content and not self._embed(sheet, name):
            return None
        lines = sheet.num_lines
        width, height = sheet.frame_px[0] * sheet.columns, sheet.frame_px[1] * lines
        times = [f"{time:.1f} s" for time in sheet.timestamps_seconds]
        return {"name": name, "columns": sheet.columns, "lines": lines, "size": (width, height), "times": times}

    def notes(self) -> Iterable[str]:
        if not self._run.sheets:
            yield "The run folder has no contact sheets (frames/): frames are not shown."
        if self._missing:
            first = min(self._missing).name
            yield f"{len(self._missing)} contact sheets are named in frames/ but cannot be read, e.g. {first}."
        if self._budget.num_refused:
            yield "Some contact sheets are left out to keep the page small; the folder frames/ has them."

    def _embed(self, sheet: Sheet, name: str) -> bool:
        try:
            size = sheet.file.stat().st_size
            if not self._budget.takes(4 * size // 3 + 100):
                return False
            self.content[name] = base64.b64encode(sheet.file.read_bytes()).decode("ascii")
        except OSError:
            self._missing.add(sheet.file)
            return False
        return True


def group_views(run: Run, sheets: Sheets, budget: Budget) -> list[Context]:
    """Every kept group once, the last update first, with the views it belongs to and its places in the rankings. A full
    page keeps those of the rankings and of the last updates."""
    views: dict[int, set[str]] = {}
    ranks: dict[int, dict[str, int]] = {}
    groups: dict[int, Group] = {}
    for name, ranked in run.picks.ranked.items():
        for place, group in enumerate(ranked):
            groups[id(group)] = group
            views.setdefault(id(group), set()).add(name)
            ranks.setdefault(id(group), {})[name] = place
    for step in sorted(run.picks.by_step, reverse=True):
        for group in run.picks.by_step[step]:
            groups[id(group)] = group
            views.setdefault(id(group), set()).add("update")
    shown = []
    for key, group in groups.items():
        view = _group_view(group, sorted(views[key]))
        if budget.takes(view["size"]):
            shown.append({**view, "rank": ranks.get(key, {}), "sheet": sheets.use(view["video"])})
    return sorted(shown, key=lambda view: -view["step"])


def _group_view(group: Group, views: list[str]) -> Context:
    first = group.rows[0]
    completions = [_completion_view(row) for row in group.rows]
    size = 1500 + _size(first["question"]) + sum(900 + 2 * _size(row["completion"]) for row in group.rows)
    return {
        "views": views,
        "step": group.step,
        "video": first["video"],
        "sample_id": first["sample_id"],
        **_question_view(first["question"], first["solution"]),
        "mean_reward": group.mean_reward,
        "surprise": group.surprise,
        "has_signal": group.has_signal,
        "is_valid": group.is_valid,
        "completions": completions,
        "size": size,
    }


def _completion_view(row: Context) -> Context:
    return {
        **_text_view(row["completion"]),
        "num_cut": row["num_cut"],
        "reward": row["reward"],
        "parts": {name: value for name, value in row["rewards"].items() if isinstance(value, (int, float))},
        "advantage": row["advantage"],
        "strength": round(min(1.0, abs(row["advantage"]) / 2), 2),
        "is_truncated": bool(row.get("is_truncated")),
        "is_valid": bool(row.get("valid", True)),
    }


def pair_views(run: Run, pairs: Sequence[Pair], sheets: Sheets, budget: Budget) -> list[Context]:
    """What changed comes first, so that a full page keeps it."""
    shown = []
    order = list(OUTCOMES)
    for pair in sorted(pairs, key=lambda pair: order.index(pair.outcome)):
        answers = [{"when": when, **_answer_view(row)} for when, row in ((BEFORE, pair.before), (AFTER, pair.after))]
        size = 1500 + sum(
            2 * _size(text[:MAX_CHARS])
            for text in (pair.after["question"], pair.before["completion"], pair.after["completion"])
        )
        if not budget.takes(size):
            continue
        sample = str(pair.after["sample_id"])
        view = {"outcome": pair.outcome, "kind": pair.kind, "sample_id": sample, "answers": answers}
        question = _question_view(pair.after["question"], pair.after["solution"])
        shown.append({**view, **question, "sheet": sheets.use(str(pair.after.get("video", "")), sample)})
    return shown


def _answer_view(row: Context) -> Context:
    text, num_cut = cut(str(row["completion"]))
    is_right, is_formed = bool(row["is_correct"]), bool(row["is_well_formed"])
    letter = str(row.get("letter") or "none")
    return {
        **_text_view(text),
        "num_cut": num_cut,
        "is_right": is_right,
        "is_formed": is_formed,
        "letter": letter,
    }


def _question_view(question: str, solution: str) -> Context:
    """The lines of the question; the option whose letter is the solution's is marked."""
    text, letter = cut(question)[0], re.sub(r"</?answer>", "", str(solution)).strip()
    lines: list[Context] = []
    for line in text.splitlines():
        option = _OPTION.match(line.strip())
        lines.append({"text": line, "is_right": bool(option and option[1] == letter)})
    return {
        "question": lines,
        "heading": next((line["text"] for line in lines if line["text"].strip()), ""),
        "solution": letter,
    }


def _text_view(text: str) -> Context:
    """Its pieces; and as it was written, where it is not one thought and one answer."""
    pieces = split_completion(text)
    is_plain = [kind for kind, _ in pieces] == ["think", "answer"] and text.count("</") == 2
    return {"pieces": pieces, "raw": None if is_plain else text}


def split_completion(text: str) -> list[tuple[str, str]]:
    """(kind, text) in order, kind "think", "answer" or "outside"; an element that is not closed reaches to the end.
    Nothing but the tags and white space outside of them is lost."""
    pieces: list[tuple[str, str]] = []
    end = 0
    for match in _PIECES.finditer(text):
        pieces.append(("outside", text[end : match.start()]))
        kind = "think" if match["think"] is not None else "answer"
        pieces.append((kind, match[kind].strip()))
        end = match.end()
    pieces.append(("outside", text[end:]))
    return [(kind, piece.strip()) for kind, piece in pieces if piece.strip() or kind != "outside"]


def _size(text: str) -> int:
    """Bytes it takes in the page."""
    return len(escape(text).encode("utf-8", "replace"))
