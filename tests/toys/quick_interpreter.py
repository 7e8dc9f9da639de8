"""Triton's interpreter without what it repeats or throws away: small kernels take a fraction of the time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


def hurry_interpreter() -> None:
    """A release of Triton that has other names for what is replaced here keeps its speed."""
    from triton.runtime import interpreter

    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor")):
        _patch_language_once_a_launch(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        _look_types_up_by_name(interpreter)
    if hasattr(getattr(interpreter.interpreter_builder, "options", None), "sanitize_overflow"):
        _leave_out_unread_checks(interpreter.interpreter_builder)
    _make_shapes_once(interpreter.tl.core)


def _patch_language_once_a_launch(interpreter: Any) -> None:
    """A device function does not patch again what its kernel has patched.

    The interpreter replaces the builtins of `triton.language` for a launch and restores them behind it. In every call
    of a device function it looks through all of them once more, and finds them replaced.
    """
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = (interpreter.tl, interpreter.tl.core)
    patched: set[int] = set()  # in this launch

    @functools.cache
    def languages_of(fn: Callable[..., Any]) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if any(value is lang for lang in languages))

    def patch_what_is_new(fn: Callable[..., Any]) -> Any:
        seen = languages_of(fn)
        if seen and seen <= patched:
            return interpreter._LangPatchScope()
        patched.update(seen)
        return patch(fn)

    def run_from_scratch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_new, run_from_scratch


def _look_types_up_by_name(interpreter: Any) -> None:
    """NumPy's type of a type of Triton; the interpreter writes the whole table down in every call."""
    look_up, found = interpreter._get_np_dtype, {}

    def by_name(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = by_name


def _leave_out_unread_checks(builder: Any) -> None:
    """Every sum and product of integers is computed once more in 64 bits, for an assertion that only `debug` makes."""
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _make_shapes_once(core: Any) -> None:
    """Blocks and their types share a shape of the same numbers; every operation makes some."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    of_type: dict[Any, dict[str, Any]] = {}
    of_tensor: dict[Any, dict[str, Any]] = {}

    def numbers(shape: Any) -> tuple[Any, ...]:
        return tuple(getattr(size, "value", size) for size in shape)

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *numbers(shape))
        if key not in of_type:
            make_type(self, element_ty, shape)
            of_type[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        vars(self).update(of_type[key], element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = numbers(type.shape) if type.is_block() else ()
        if key not in of_tensor:
            make_tensor(self, handle, type)
            of_tensor[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(of_tensor[key], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor
