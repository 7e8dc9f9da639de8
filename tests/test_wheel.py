"""The wheel is complete: built from the tracked files, unpacked, and used from an empty folder without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fastr1", "kernels", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.json"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy: setuptools leaves its folders in the sources."""
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    leftovers = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name, **({"ignore": leftovers} if copy is shutil.copytree else {}))
    done = subprocess.run([sys.executable, "-c", BUILD, output], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "would be ignored" not in done.stderr, done.stderr
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder an installation would fill."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def required(name: str) -> Iterator[str]:
    """The distributions that one needs without extras, itself included; those that are not installed are left out."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    yield name
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from required(requirement.name)


def link_distributions(folder: Path, *names: str) -> Path:
    """A folder with links to what the distributions consist of, for a process that must see nothing else."""
    for needed in {found for name in names for found in required(name)}:
        distribution = metadata.distribution(needed)
        for entry in {Path(str(file)).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            target, link = Path(str(distribution.locate_file(entry))), folder / entry
            if target.exists() and not link.exists():
                link.symlink_to(target)
    return folder


def run_alone(code: str, path: list[Path], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with exactly these folders beside the standard library, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_wheel_holds_every_module_configuration_template_and_file_of_the_base_model(installed: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastr1").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    expected |= {f"fastr1/configs/{name}.json" for name in CONFIGS}
    base_model = ROOT / "fastr1" / "demo" / "base_model"
    expected |= {str(path.relative_to(ROOT)) for path in base_model.iterdir() if path.is_file()}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastr1" / "reporting" / "templates").iterdir()}
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {name for name in found if not re.match(r"fastr1-[\d.]+\.dist-info/", name)} == expected


def test_shipped_configurations_load_by_name_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fastr1.config import load_config\n"
        "for name in sys.argv[1:]:\n"
        "    path = load_config(name).model.path\n"
        "    print(path if 'base_model' in path else '-')\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_alone(code, [installed], tmp_path, *CONFIGS, "demo_coldstart.json")
    assert done.returncode == 0, done.stderr
    base_model = str(installed / "fastr1" / "demo" / "base_model")
    assert [line for line in done.stdout.split() if line != "-"] == [base_model] * 2
    assert done.stderr.count(f"taking the shipped {installed}") == len(CONFIGS) + 1


def test_readme_of_the_kernels_runs_without_any_extra(installed: Path, tmp_path: Path) -> None:
    text = (ROOT / "kernels" / "fastr1_kernels" / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    code = "\n".join(block for block in blocks if "patch_trl()" not in block)  # that one is for an installed TRL
    check = "\nimport sys, fastr1_kernels; print(fastr1_kernels.__file__, 'transformers' in sys.modules)"
    (tmp_path / "libraries").mkdir()
    (tmp_path / "empty").mkdir()
    libraries = link_distributions(tmp_path / "libraries", "torch", "triton")
    done = run_alone(code + check, [installed, libraries], tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "fastr1_kernels" / "__init__.py"), "False"]


def test_command_without_the_extra_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    code = "import sys; from fastr1.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run_alone(code, [installed], tmp_path, "demo")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert re.search(r"error: the package '\w+' is not installed; .* pip install 'fastr1\[train\]'", done.stderr)


def test_doctor_without_any_library_says_what_is_missing(installed: Path, tmp_path: Path) -> None:
    code = "from fastr1 import cli, doctor; doctor._run_kernels = list; sys.exit(cli.main(sys.argv[1:]))"
    done = run_alone(f"import sys; {code}", [installed], tmp_path, "doctor")
    assert done.returncode == 1, done.stderr
    missing = re.findall(r"^MISSING (\S+)", done.stdout, flags=re.MULTILINE)
    assert {"torch", "transformers", "deepspeed", "av"} <= set(missing)
    assert "pip install 'fastr1[train]'" in done.stdout


@pytest.mark.slow
def test_commands_run_from_an_empty_folder_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """The heavy libraries are seen through a .pth file; what that file does not show is this checkout."""
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    binaries = environment / "bin"
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [binaries / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(install, check=True)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [binaries / command[0], *command[1:]],
            cwd=folder,
            env={**variables, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    where = run("python", "-c", "import fastr1, fastr1_kernels as k; print(fastr1.__file__, k.__file__)").stdout.split()
    assert [Path(path).parents[1] for path in where] == [site, site]
    assert "Everything that training needs works." in run("fastr1", "doctor").stdout
    demo = run("fastr1", "demo", "--quick", "--output-dir", "quick")
    assert "after GRPO" in demo.stdout
    run("fastr1", "demo-data", "--num-train", "8", "--num-test", "5")
    cold_start = run("fastr1", "sft", "--config", "demo_coldstart", "--set", "optim.max_steps=1")
    printed = demo.stdout + demo.stderr + cold_start.stdout + cold_start.stderr
    assert re.findall(r"^.*(?:\[(?:INFO|WARNING)\]|Warning:).*", printed, flags=re.MULTILINE) == []
    run("fastr1", "train", "--config", "grpo.json", "--set", "optim.max_steps=1", "--set", "grpo.num_generations=2")
    assert (folder / "runs" / "demo" / "grpo" / "final" / "model.safetensors").exists()
