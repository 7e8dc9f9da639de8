#!/usr/bin/env bash
# Makes .venv with everything that `make demo` and `make test` need, pinned; `make` runs it when it is out of date.
# Needs Python 3.10 or later with venv, a C compiler and a package index. No root. PYTHON=... chooses the interpreter.
# pip's own configuration (index, proxy, certificates) is respected.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=2.13.0
torchcodec_cpu=0.13.0  # later wheels need CUDA 13 libraries
torchcodec_cuda=0.17.0
python=${PYTHON:-python3}

say() { printf 'environment: %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
pinned() { grep -E "^($1)==" requirements.txt; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is missing or older than Python 3.10; set PYTHON=..."
if [ ! -x .venv/bin/python ]; then
  say "creating .venv with $("$python" --version)"
  "$python" -m venv .venv || fail "$python has no venv module; on Debian and Ubuntu install python3-venv"
fi

say "torch $torch (the largest download)"
install "torch==$torch"

say "build tools"
mapfile -t tools < <(pinned 'setuptools|wheel|ninja|numpy|packaging|psutil')
install "${tools[@]}"

cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")')
case $cuda in
  "" | 1[0-2].*) torchcodec=$torchcodec_cpu ;;
  *) torchcodec=$torchcodec_cuda ;;
esac
say "torchcodec $torchcodec (torch is built for ${cuda:+CUDA }${cuda:-the CPU})"
install "torchcodec==$torchcodec"

if [ -n "$cuda" ] && nvidia-smi -L > /dev/null 2>&1; then
  # `make test` hides the GPU, from this script too.
  env -u CUDA_VISIBLE_DEVICES .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
    || say "WARNING: torch is built for CUDA $cuda and cannot use this GPU: update its driver, or everything runs on the CPU"
  # Triton builds its launchers where the kernels run.
  headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')
  if [ ! -f "$headers/Python.h" ] || ! { [ -n "${CC:-}" ] || command -v gcc || command -v clang; } > /dev/null; then
    say "WARNING: Triton needs gcc or clang and $headers/Python.h on a GPU; on Debian and Ubuntu install gcc and python3-dev"
  fi
fi

say "requirements.txt"
# DeepSpeed's setup probes for nvcc where it sees a GPU and fails without one. Nothing is compiled at installation, so it
# is told to look for a CPU only; at run time it finds the GPU.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu install --no-build-isolation -r requirements.txt
install --no-deps --no-build-isolation -e .

if [ "$(uname -s)" = Linux ]; then
  say "FFmpeg for torchcodec"
  .venv/bin/python scripts/link_ffmpeg.py || say "torchcodec finds no FFmpeg (see above): PyAV decodes instead"
fi
touch .venv/.ready
say "ready"
