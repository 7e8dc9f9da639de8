"""The benches are no package: their modules are found beside each other."""

from __future__ import annotations

import sys
from pathlib import Path

# At the end: a conftest is there too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
