"""The table of losses and the options: one home, which the README repeats and no other file."""

from __future__ import annotations

import ast
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import ADVANTAGES, CASES, LOGITS, MASK, OPTION_NAMES, TOKEN_IDS, V, by_case, by_loss, loss_of

import fastr1_kernels
from fastr1_kernels import LOSSES, LossOptions, linear_grpo_loss

PACKAGE = Path(fastr1_kernels.__file__).parent
README = (PACKAGE / "README.md").read_text()
REDUCTIONS = {
    ("tokens", "tokens"): "sum of tokens / loss tokens",
    ("tokens", "sequences"): "sum of tokens / sequences",
    ("tokens", "sequences_times_length"): "sum of tokens / (sequences · max_completion_length)",
    ("sequence_means", "sequences"): "sum of sequence means / sequences",
}


def readme_rows() -> dict[str, list[str]]:
    table = README.partition("| `loss_type` |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: rest for name, *rest in cells}


def test_readme_table_is_the_table() -> None:
    rows = readme_rows()
    assert list(rows) == list(LOSSES)
    for name, row in LOSSES.items():
        objective, reduction, needs, refuses, source = rows[name]
        assert objective == row.objective, name
        assert reduction == REDUCTIONS[row.reduction, row.denominator], name
        assert re.findall(r"\w+", needs) == [*row.needs], name
        assert sorted(re.findall(r"\w+", refuses)) == sorted([*row.ignores, *["old_logps"] * row.is_on_policy]), name
        assert source == row.source, name


@by_loss
def test_columns_are_words_that_the_kernels_know(loss_type: str) -> None:
    row = LOSSES[loss_type]
    for home in ("reference.py", "gpu/policy.py"):
        assert row.objective in (PACKAGE / home).read_text(), home
    assert (row.reduction, row.denominator) in REDUCTIONS
    assert row.counts in ("tokens", "sequences")
    assert row.kl in (None, "k3_output")
    assert set(row.clip_metrics) <= {"clip_low", "clip_high"}
    assert set(row.needs) <= OPTION_NAMES | {"normalizer"}
    assert set(row.ignores) <= OPTION_NAMES


def test_no_loss_is_named_outside_the_table() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if path.name == "options.py" or path.parent.name == "compat":  # which translates the names of others
            continue
        found += [
            f"{path.name}: {line.strip()}"
            for line in text.splitlines()
            if re.search(r"loss_type\s*(?:[!=]=|\bin\b)", line)
        ]
        tree = ast.parse(text)
        defaults = {id(d) for node in ast.walk(tree) if isinstance(node, ast.arguments) for d in node.kw_defaults}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in LOSSES and id(node) not in defaults:
                found.append(f"{path.name}:{node.lineno}: {node.value!r}")
    assert found == []


@by_case
def test_options_at_once_equal_the_keywords(arguments: dict[str, Any]) -> None:
    chosen = {k: v for k, v in arguments.items() if k in OPTION_NAMES}
    options = LossOptions(**chosen)
    options.check()
    others = {k: v for k, v in arguments.items() if k not in OPTION_NAMES}
    assert torch.equal(loss_of(LOGITS, others, options=options).loss, loss_of(LOGITS, arguments).loss)
    head = torch.eye(V, dtype=torch.float64), TOKEN_IDS
    common: dict[str, Any] = {"mask": MASK, "advantages": ADVANTAGES}
    at_once = linear_grpo_loss(LOGITS, *head, options=options, **common, **others)
    assert torch.equal(at_once.loss, linear_grpo_loss(LOGITS, *head, **common, **arguments).loss)


OTHER_VALUES: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": "sequence", "kl_estimator": "k1"}
OTHER_VALUES |= {"sampler_correction": "icepop", "scale_rewards": "none", "leave_one_out": True}


@pytest.mark.parametrize("name", [f.name for f in fields(LossOptions)])
def test_keyword_beside_options_is_refused(name: str) -> None:
    value = OTHER_VALUES.get(name, 2)
    with pytest.raises(ValueError, match=f"options and {name}={value!r}: .*dataclasses.replace"):
        loss_of(LOGITS, {name: value}, options=LossOptions(loss_type="bnpo"))


def test_options_are_frozen_and_comparable() -> None:
    options = LossOptions(loss_type="grpo")
    assert options == replace(LossOptions(), loss_type="grpo")
    assert len({options, LossOptions(loss_type="grpo")}) == 1
    with pytest.raises(FrozenInstanceError):
        options.beta = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError):
        LOSSES["mine"] = LOSSES["grpo"]  # type: ignore[index]
    with pytest.raises(ValueError, match="options is a dict: give LossOptions"):
        loss_of(LOGITS, {"options": {"loss_type": "grpo"}})


@by_loss
def test_needs_and_ignored_options_are_refused(loss_type: str) -> None:
    row, arguments = LOSSES[loss_type], CASES[loss_type]
    chosen = {k: v for k, v in arguments.items() if k in OPTION_NAMES}
    for name, why in row.needs.items():
        without = {k: v for k, v in arguments.items() if k != name}
        with pytest.raises(ValueError, match=re.escape(f"loss_type={loss_type!r} {why}")):
            loss_of(LOGITS, without)
        if name in OPTION_NAMES:
            with pytest.raises(ValueError, match=re.escape(why)):
                LossOptions(**{k: v for k, v in chosen.items() if k != name}).check()
    for name in row.ignores:
        value = OTHER_VALUES.get(name, 2.0)
        with pytest.raises(ValueError, match=f"{name}={value!r} has no effect on loss_type={loss_type!r}"):
            LossOptions(**chosen | {name: value}).check()
    if row.is_on_policy:
        with pytest.raises(ValueError, match="old_logps has no effect on the on-policy"):
            loss_of(LOGITS, arguments, old_logps=LOGITS[..., 0])
