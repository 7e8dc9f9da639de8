"""What a call costs, counted without a GPU: products with the head, bytes at the peak, waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul", "einsum")


class ProductCounter(TorchDispatchMode):
    """The rows of every product between rows, D and V: one of a chunk counts its rows."""

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.head, self.rows, self.others = {vocabulary, size}, [], 0  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor) and x.dim() == 2][-2:]
            sizes = [*left.shape, right.shape[1]]
            rest = [n for n in sizes if n not in self.head]
            if self.head <= set(sizes) and len(rest) == 1:
                self.rows.append(rest[0])
            else:
                self.others += 1
        return func(*args, **(kwargs or {}))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that torch held on the CPU during the call beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "argwhere", "allclose"}
WAITING |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"}
COPYING = {"lift_fresh", "lift_fresh_copy"}  # a Python number to the device


class _Reads(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu"):  # the others end in an operator
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class WaitCounter(TorchDispatchMode):
    """Names what would wait for a GPU: operators whose result, or its shape, the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.reads = _Reads(self.seen)

    def __enter__(self) -> WaitCounter:
        self.reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in WAITING | COPYING:
            self.seen.append(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.seen += [f"{name} by mask"] * bool(masks)
        return func(*args, **(kwargs or {}))
