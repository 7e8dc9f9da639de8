"""The recipes of docs/extending.md, followed to the letter on a copy of the sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_toys import child_environment, make_config, metrics_of, write_world

from fastr1.config import save_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
RECIPES = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}


def blocks(recipe: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", RECIPES[recipe], flags=re.DOTALL | re.MULTILINE)


def apply_diff(diff: str, root: Path) -> None:
    """Insert the lines with a plus behind the lines without a sign, which stand in the file once."""
    header, *lines = diff.splitlines()
    file = root / header.removeprefix("--- ")
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    added = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
    text = file.read_text()
    assert text.count(before) == 1, f"{file}: {before!r} stands there {text.count(before)} times"
    file.write_text(text.replace(before, before + added))


def test_a_reward_is_one_file_and_its_name(tmp_path: Path) -> None:
    (code,) = blocks("A reward", "python")
    (command,) = blocks("A reward", "bash")
    (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)
    functions = re.search(r"reward\.functions=(\[.*?\])", command)
    assert functions is not None
    config = make_config(write_world(tmp_path / "world"), tmp_path / "run", optim__max_steps=1)
    save_config(config, tmp_path / "config.json")
    assert list(config.reward.functions) != json.loads(functions[1])
    # as the installed command, whose path does not begin with the folder it is started in
    installed = "import sys; sys.path.remove(''); from fastr1.cli import main; sys.exit(main())"
    arguments = ["train", "--config", "config.json", "--set", f"reward.functions={functions[1]}"]
    done = subprocess.run(
        [sys.executable, "-c", installed, *arguments],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "run")[0]["rewards/my_rewards:brief"] == 1.0


@pytest.fixture(scope="module")
def copy_with_a_loss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the losses and their tests, with the loss of the recipe."""
    root = tmp_path_factory.mktemp("copy")
    # Not the compiled files, most of which stay valid; but those that another process is just writing.
    ignore = shutil.ignore_patterns("base_model", "*.pyc.*")
    for name in ("kernels", "tests", "fastr1"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    diffs = blocks("A loss", "diff")
    assert len(diffs) >= 6
    for diff in diffs:
        apply_diff(diff, root)
    return root


@pytest.mark.parametrize("interpret", ["0", "1"], ids=["torch", "interpreter"])
def test_a_loss_is_a_row_an_objective_and_a_branch(copy_with_a_loss: Path, interpret: str) -> None:
    root = copy_with_a_loss
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": interpret,
        "CUDA_VISIBLE_DEVICES": "",
    }
    files = ["tests/losses/test_losses.py", "tests/losses/test_loss_table.py", "tests/config/test_config.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "bent or table", *files]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= (3 if interpret == "1" else 10), done.stdout
