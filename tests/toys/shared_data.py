"""Optional conformance data beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared_path(relative: str) -> Path:
    """A file of the conformance data; the calling test skips where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"conformance data not present: {relative}")
    return path
