"""`fastr1_kernels` stands alone, loads lazily, and its README tells the truth about the API."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fastr1_kernels
from fastr1_kernels import LossOptions, grpo_loss, linear_grpo_loss

PACKAGE = Path(fastr1_kernels.__file__).parent
README = (PACKAGE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
BLOCK = (
    "import sys\nfor name in ('transformers', 'deepspeed', 'fastr1', 'liger_kernel'):\n    sys.modules[name] = None\n"
)
by_loss_function = pytest.mark.parametrize("function", [grpo_loss, linear_grpo_loss])


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_readme_snippet_runs_without_the_trainer_and_its_dependencies() -> None:
    snippet = SNIPPETS[0]
    assert run_python(BLOCK + "import transformers").returncode != 0  # the block blocks
    result = run_python(BLOCK + snippet)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("library", ["liger", "trl", "verl"])
def test_readme_snippets_of_other_signatures_run(library: str) -> None:
    snippets = [snippet for snippet in SNIPPETS[1:] if f"fastr1_kernels.compat.{library} " in snippet]
    assert snippets
    needs_trl = [snippet for snippet in snippets if "patch_trl()" in snippet]
    if importlib.util.find_spec("trl") is None:
        snippets = [snippet for snippet in snippets if snippet not in needs_trl]
    else:  # with TRL its own dependencies
        assert run_python("\n".join([SNIPPETS[0], *needs_trl])).returncode == 0
    # Without the libraries themselves; `advantages` are made in Liger's snippet.
    blocked = BLOCK.replace("'liger_kernel'", "'liger_kernel', 'trl', 'verl'")
    advantages = "advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0])"
    code = [blocked, SNIPPETS[0], advantages, *(snippet for snippet in snippets if snippet not in needs_trl)]
    result = run_python("\n".join(code))
    assert result.returncode == 0, result.stderr


def test_options_are_checked_before_torch_loads() -> None:
    code = """
import sys
import fastr1_kernels
from fastr1_kernels.options import LOSSES, LossOptions
fastr1_kernels.LossOptions(loss_type="dapo").check()
try:
    LossOptions(loss_type="luspo").check()
except ValueError as error:
    print(error)
assert LOSSES["dapo"].counts == "tokens"
loaded = {"torch", "triton", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "importance_sampling_level='token': loss_type='luspo' needs 'sequence'\n"


def test_every_export_resolves_and_is_listed() -> None:
    assert (
        {"LOSSES", "LossOptions", "GRPOOutput", "grpo_loss"} <= set(fastr1_kernels.__all__) <= set(dir(fastr1_kernels))
    )
    for name in fastr1_kernels.__all__:
        assert getattr(fastr1_kernels, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'grpo_los'"):
        _ = fastr1_kernels.grpo_los  # type: ignore[attr-defined]


def test_reference_imports_no_sibling_but_the_options() -> None:
    text = (PACKAGE / "reference.py").read_text()
    assert re.findall(r"^[ \t]*(?:from \.|import fastr1_kernels|from fastr1_kernels).*", text, flags=re.MULTILINE) == [
        "from .options import LossOptions"
    ]


@pytest.mark.parametrize("name", fastr1_kernels.__all__)
def test_readme_names_every_export(name: str) -> None:
    assert f"`{name}" in README


def test_readme_states_where_the_series_of_k3_ends() -> None:
    in_torch, in_kernel = re.findall(r"for \|q\| < ([\d.]+) in", README)
    assert f"q.abs() < {in_torch}," in (PACKAGE / "reference.py").read_text()
    assert f"tl.abs(q) < {in_kernel}," in (PACKAGE / "gpu" / "policy.py").read_text()


@by_loss_function
def test_readme_lists_every_keyword(function: object) -> None:
    for name in inspect.signature(function).parameters:  # type: ignore[arg-type]
        assert re.search(rf"\b{name}\b", README), name


@by_loss_function
def test_signature_is_written_out_and_has_the_options_with_their_defaults(function: object) -> None:
    assert not hasattr(function, "__signature__")
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = list(parameters)
    start = names.index("options") + 1
    assert {p: parameters[p].default for p in names[start:]} == {f.name: f.default for f in fields(LossOptions)}
    assert names[start:] == [f.name for f in fields(LossOptions)]
    others = list(inspect.signature(grpo_loss).parameters)
    assert names[names.index("mask") :] == others[others.index("mask") :]
