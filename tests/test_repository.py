"""The repository keeps its promises: README and tree agree, commands exist, imports and sizes stay within the rules."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastr1.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/configuration.md", "docs/design.md", "docs/extending.md", "docs/report.md")
README = (ROOT / "README.md").read_text()
LIBRARY = sorted([*(ROOT / "fastr1").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MAX_LINES = 350
TEXT_SUFFIXES = {"", ".py", ".md", ".json", ".sh", ".toml", ".txt"}
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:farm|home|opt|root|Users|work)/")
AVOIDED_WORD = re.compile(r"\b(?:agents?|responses?|fixme)\b", re.IGNORECASE)


def fenced_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def tree_paths() -> list[str]:
    (tree,) = fenced_blocks(README.partition("## Files")[2].partition("\n## ")[0], "")
    return [line.split()[0].rstrip("/") for line in tree.splitlines()]


def shell_commands() -> list[str]:
    blocks = [block for page in PAGES for block in fenced_blocks((ROOT / page).read_text(), "bash")]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@functools.cache
def imported_packages(path: Path) -> set[str]:
    """Top-level packages a file imports anywhere in it, relative imports left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_every_path_of_the_readme_tree_exists() -> None:
    paths = tree_paths()
    assert len(paths) == len(set(paths)) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_readme_tree_shows_every_package() -> None:
    packages = {str(path.parent.relative_to(ROOT)) for path in LIBRARY if path.name == "__init__.py"} - {"fastr1"}
    assert packages <= set(tree_paths())


def test_readme_tree_shows_every_top_level_entry() -> None:
    shown = {path.partition("/")[0] for path in tree_paths()} | {"README.md", ".gitignore"}
    assert {name.partition("/")[0] for name in tracked_files()} <= shown


def test_readme_python_runs() -> None:
    blocks = fenced_blocks(README, "python")
    assert len(blocks) >= 3
    assert sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 8
    code = "\n".join(blocks)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_documented_commands_parse() -> None:
    makefile = (ROOT / "Makefile").read_text()
    known = {*re.findall(r"^([\w-]+):", makefile, flags=re.M), *re.findall(r"^(\w+ ?)\?=", makefile, flags=re.M)}
    seen = set()
    for line in shell_commands():
        program, *arguments = shlex.split(line, comments=True)
        seen.add(program)
        if program == "fastr1":
            build_parser().parse_args(arguments)
        elif program == "make":
            assert {re.sub("=.*", " ", argument) for argument in arguments} <= known, line
        elif program == "deepspeed":
            assert (ROOT / arguments[0]).is_file(), line
    assert {"fastr1", "make", "deepspeed"} <= seen


def test_numbers_of_the_readme_are_those_of_the_committed_rows() -> None:
    command = [sys.executable, "scripts/render_readme.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_linked_and_named_files_exist(page: str) -> None:
    path = ROOT / page
    text = path.read_text()
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [target for target in linked if not (path.parent / target).exists()]
    named = re.findall(r"(?<![\w/])(?:configs|tests|scripts)/[\w/]+\.(?:json|py|sh)\b", text)
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


def test_names_in_the_recipes_are_those_of_the_code() -> None:
    recipes = re.sub(r"^```.*?^```", "", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    sources = [(ROOT / name).read_text() for name in tracked_files() if name.endswith(".py")]
    words = {word for source in sources for word in re.findall(r"\w+", source)}
    names = re.findall(r"`([A-Za-z_][\w.]*)`", recipes)
    assert len(names) > 30
    assert [name for name in names if name.rpartition(".")[2] not in words] == []


def test_no_module_is_named_like_the_standard_library() -> None:
    # `deepspeed fastr1/train.py` may put the folder of the file on the path, where it would hide the real one.
    names = {path.stem for path in (ROOT / "fastr1").glob("*.py")} - {"__init__"}
    assert "train" in names
    assert names & sys.stdlib_module_names == set()


# Every room (a folder or a file of fastr1) with the rooms it may import; docs/design.md draws it.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "schema": set(),
    "workers": set(),
    "data": {"config", "schema"},
    "video": {"config", "schema"},
    "rewards": {"config", "schema", "workers"},
    "reporting": {"config", "schema", "video"},
    "models": {"config", "schema", "data", "video"},
    "roofline": {"reporting", "models"},
    "rollout": {"config", "schema", "models"},
    "evaluation": {"config", "schema", "data", "video", "rewards", "models", "rollout"},
    "training": {
        *("config", "schema", "data", "video", "rewards", "reporting", "models", "roofline", "rollout", "evaluation")
    },
    "check_data": {"config", "schema", "workers", "data", "video", "models"},
    "doctor": {"config", "video", "models", "rollout", "roofline", "training"},
    "demo": {"config", "schema", "data", "video", "reporting", "models", "evaluation"},
    "cli": {"config", "video", "check_data", "doctor", "demo", "reporting", "evaluation", "training"},
    "train": {"config", "cli"},
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of fastr1 that a file imports anywhere in it, by any of the ways to write it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used in fastr1"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names.add(node.value)  # importlib.import_module("fastr1.video.…")
    rooms = {name.split(".")[1] for name in names if name.startswith("fastr1.") and "/" not in name}
    return rooms & ROOMS.keys()


def test_rooms_import_in_one_direction() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "fastr1").rglob("*.py"):
        room = path.relative_to(ROOT / "fastr1").parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, set()).update(imported_rooms(path) - {room})
    assert found.keys() == ROOMS.keys()
    assert {room: sorted(used - ROOMS[room]) for room, used in found.items() if not used <= ROOMS[room]} == {}
    order = list(ROOMS)
    assert all(order.index(used) < order.index(room) for room, allowed in ROOMS.items() for used in allowed)


# Libraries that one file of each source root imports, so that an upgrade is that file's matter.
ONE_IMPORTER = {
    "deepspeed": "fastr1/training/distributed.py",
    "flash_attn_interface": "fastr1/models/packed_backends/flash_attn_3.py",
    "jinja2": "fastr1/reporting/page.py",
    "liger_kernel": "fastr1/models/liger.py",
    "matplotlib": "fastr1/reporting/curves.py",
    "safetensors": "fastr1/models/tinyllava/checkpoint.py",
    "torchcodec": "fastr1/video/torchcodec_backend.py",
    "trackio": "fastr1/reporting/trackers.py",
    "wandb": "fastr1/reporting/trackers.py",
}


@pytest.mark.parametrize(("library", "importer"), ONE_IMPORTER.items())
def test_library_is_imported_in_one_file(library: str, importer: str) -> None:
    importers = [str(path.relative_to(ROOT)) for path in LIBRARY if library in imported_packages(path)]
    assert importers == [importer]


def test_every_library_with_one_importer_is_in_the_table() -> None:
    importers: dict[str, set[str]] = {}
    for path in LIBRARY:
        for package in imported_packages(path) - set(sys.stdlib_module_names) - {"fastr1", "fastr1_kernels"}:
            importers.setdefault(package, set()).add(str(path.relative_to(ROOT)))
    assert {package: files.pop() for package, files in importers.items() if len(files) == 1} == ONE_IMPORTER


def test_families_are_known_in_their_room_only() -> None:
    words = re.compile(r"TinyLlava(?:Video|Processor|Config)|[-−]200\b|lm_head|\bimage_size=|\.image_size")
    outside = [path for path in LIBRARY if path.relative_to(ROOT).parts[:2] != ("fastr1", "models")]
    found = [str(path.relative_to(ROOT)) for path in outside if words.search(path.read_text())]
    found += [
        str(path.relative_to(ROOT))
        for path in outside
        if "fastr1.models.tinyllava" in path.read_text() and "demo" not in path.parts  # the demo makes such a model
    ]
    assert found == []


def test_kernels_import_nothing_but_torch_triton_and_the_standard_library() -> None:
    files = [path for path in LIBRARY if "fastr1_kernels" in path.parts]
    imported = set().union(*(imported_packages(path) for path in files))
    assert "torch" in imported
    assert imported - set(sys.stdlib_module_names) <= {"torch", "triton"}


def test_source_root_and_tests_are_no_packages() -> None:
    # A top-level package `kernels` would take the place of the library of that name that transformers imports.
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels.py").exists()


def test_library_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in LIBRARY}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_local_paths_and_no_avoided_words() -> None:
    found = []
    for name in tracked_files():
        is_text = Path(name).suffix in TEXT_SUFFIXES
        if not is_text or name in ("LICENSE", "tests/test_repository.py"):
            continue
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1):
            if LOCAL_PATH.search(line) or AVOIDED_WORD.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []
