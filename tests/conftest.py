"""Helpers shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def shared_path(relative: str) -> Path:
    """A file of the optional conformance data beside the checkout; the calling test skips where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"conformance data not present: {relative}")
    return path
