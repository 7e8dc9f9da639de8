"""scripts/install_browser.sh: a browser where one can be had, and never an error."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from browser import NAMES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "install_browser.sh"
TOOLS = ("mktemp", "timeout", "tail", "rm", "touch", "chmod", "env", "sh")


def run(folder: Path, *, user: int = 0, apt: str | None = "exit 0") -> str:
    """What the script says in one line, where nothing but these programs is found."""
    folder.mkdir(exist_ok=True)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    for name, body in (("id", f"echo {user}"), ("apt-get", apt)):
        if body is not None:
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    result = subprocess.run([bash, str(SCRIPT)], env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    return line


def test_a_browser_that_is_there_is_taken(tmp_path: Path) -> None:
    for name in NAMES:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
        assert run(folder, apt="touch $0.was-called") == f"browser: {folder / name}"
        assert not (folder / "apt-get.was-called").exists()


def test_root_installs_one(tmp_path: Path) -> None:
    chromium = tmp_path / "chromium"
    install = f'case "$*" in *"install --no-install-recommends chromium") touch {chromium}; chmod +x {chromium};; esac'
    assert run(tmp_path, apt=install) == f"browser: installed {chromium}"


@pytest.mark.parametrize("others", [{"user": 1000}, {"apt": None}])
def test_whoever_may_not_is_told_what_to_type(tmp_path: Path, others: dict[str, int | None]) -> None:
    line = run(tmp_path, **others)  # type: ignore[arg-type]
    assert line.startswith("browser: none here; the tests of the page in a browser are skipped (as root, on Debian: ")


def test_what_cannot_be_installed_is_no_error(tmp_path: Path) -> None:
    line = run(tmp_path, apt="echo first; echo 'E: no network' >&2; exit 100")
    assert line.startswith("browser: chromium cannot be installed, the tests of the page in a browser are skipped: ")
    assert line.endswith(": E: no network")


def test_it_runs_before_the_tests_do() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines.index("scripts/install_browser.sh") < lines.index("make test")
    assert os.access(SCRIPT, os.X_OK)
