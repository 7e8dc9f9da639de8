"""`fastr1_kernels` stands alone, and its README tells the truth about the API."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastr1_kernels

PACKAGE = Path(fastr1_kernels.__file__).parent
README = (PACKAGE / "README.md").read_text()
BLOCK = (
    "import sys\nfor name in ('transformers', 'deepspeed', 'fastr1', 'liger_kernel'):\n    sys.modules[name] = None\n"
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_readme_snippet_runs_without_the_trainer_and_its_dependencies() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert run_python(BLOCK + "import transformers").returncode != 0  # the block blocks
    result = run_python(BLOCK + snippet)
    assert result.returncode == 0, result.stderr


def test_package_imports_only_torch_and_the_standard_library() -> None:
    for path in PACKAGE.glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE)
        foreign = set(imported) - set(sys.stdlib_module_names) - {"torch", "triton"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_reference_imports_no_sibling() -> None:
    assert not re.search(r"^\s*from \.|fastr1_kernels", (PACKAGE / "reference.py").read_text(), flags=re.MULTILINE)


def test_source_root_is_not_a_package() -> None:
    # A top-level package `kernels` would shadow the library of that name that transformers imports.
    assert not (PACKAGE.parent / "__init__.py").exists()


@pytest.mark.parametrize("name", fastr1_kernels.__all__)
def test_readme_names_every_export(name: str) -> None:
    assert f"`{name}" in README


@pytest.mark.parametrize("function", [fastr1_kernels.grpo_loss, fastr1_kernels.linear_grpo_loss])
def test_signature_shows_every_keyword_and_readme_lists_it(function: object) -> None:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert {"mask", "rewards", "beta", "normalizer", "log_ratio_clamp"} <= set(parameters)
    for name in parameters:
        assert re.search(rf"\b{name}\b", README), name
