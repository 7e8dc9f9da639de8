"""Triton's interpreter without what it repeats: half of the time of small kernels, for the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_language_once_a_launch() -> None:
    """A device function does not patch again what its kernel has patched.

    The interpreter replaces the builtins of `triton.language` for a launch and restores them behind it. In every call
    of a device function it looks through all of them once more, and finds them replaced. A release of Triton that has
    other names for this keeps its speed.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor")):
        return
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = (interpreter.tl, interpreter.tl.core)
    patched: set[int] = set()  # in this launch

    def patch_what_is_new(fn: Callable[..., Any]) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if any(value is language for language in languages)}
        if seen and seen <= patched:
            return interpreter._LangPatchScope()
        patched.update(seen)
        return patch(fn)

    def run_from_scratch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_new, run_from_scratch
