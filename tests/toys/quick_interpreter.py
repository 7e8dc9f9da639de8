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
    if hasattr(interpreter, "_patch_attr"):
        _pass_arguments_on(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        _look_types_up_by_name(interpreter)
    if hasattr(getattr(interpreter.interpreter_builder, "options", None), "sanitize_overflow"):
        _leave_out_unread_checks(interpreter.interpreter_builder)
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    if hasattr(core, "_unwrap_if_constexpr"):
        _know_plain_values(core)
    _make_shapes_once(core)
    if hasattr(type(semantic), "binary_op_type_checking_impl"):
        _match_operands_at_a_glance(type(semantic), core)


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


def _pass_arguments_on(interpreter: Any) -> None:
    """To the builtins as they came: the interpreter writes all keywords down anew for each of them, behind which a
    wrapper sees whether one of them is there that always is."""

    def patch_attribute(obj: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
        member = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attribute


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
    of_tensor: dict[str, dict[str, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in of_type:
            make_type(self, element_ty, shape)
            of_type[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        vars(self).update(of_type[key], element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in of_tensor:  # it has the shape in it
            make_tensor(self, handle, type)
            of_tensor[type.name] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(of_tensor[type.name], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor


def _know_plain_values(core: Any) -> None:
    """What is no constant of the compiler is seen by its class; a type is equal to itself."""
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}
    core._unwrap_if_constexpr = lambda value: value if value.__class__ in plain else unwrap(value)
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _match_operands_at_a_glance(semantic: Any, core: Any) -> None:
    """Tensors of one type need no promotion, and a number beside a tensor becomes the block it became before."""
    match, tensor, halves = semantic.binary_op_type_checking_impl, core.tensor, ("fp16", "bf16")
    blocks: dict[Any, Any] = {}

    def match_operands(
        self: Any,
        lhs: Any,
        rhs: Any,
        left: bool = False,
        right: bool = False,
        check: bool = True,
        divides: bool = False,
    ) -> Any:
        first, second = lhs.__class__ is tensor, rhs.__class__ is tensor
        if first and second:
            name = lhs.dtype.name
            if name != rhs.dtype.name or lhs.dtype.is_ptr() or (divides and name in halves):
                return match(self, lhs, rhs, left, right, check, divides)
            return (lhs, rhs) if lhs.type.name == rhs.type.name else self.broadcast_impl_value(lhs, rhs)
        block, number = (lhs, rhs) if first else (rhs, lhs)
        if number.__class__ not in (int, float) or number != number or not (first or second):
            return match(self, lhs, rhs, left, right, check, divides)
        key = (block.type.name, number.__class__, number, first, left, right, check, divides)
        if key in blocks:
            return (lhs, blocks[key]) if first else (blocks[key], rhs)
        matched = match(self, lhs, rhs, left, right, check, divides)
        if matched[not first] is block:  # and not converted to the type of the number
            blocks[key] = matched[first]
            blocks[key].handle.data.flags.writeable = False
        return matched

    semantic.binary_op_type_checking_impl = match_operands
