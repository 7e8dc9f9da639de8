"""CUDA graphs of token steps, one for each number of rows and for everything else that shapes a launch.

A graph replays launches with the arguments they were captured with: tensors are read where they were, numbers are those
of then. So a key holds every number that a launch is shaped by or given, and where the tensors are that the step reads
and does not own; one that is missing would not raise, it would compute something else. Graphs share one memory pool:
they never run at the same time. They stay valid while weights change in place.

A step is run once before its capture, on rows that are all padding, so that kernels are compiled and libraries have
their workspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

BUCKETS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)


class Graph(Protocol):
    def replay(self) -> None:
        """What was captured, once more."""


def bucket_of(num_rows: int, most: int) -> int:
    """How many rows a step computes for so many: the next of `BUCKETS`, and no more than there can be."""
    return min(next((size for size in BUCKETS if size >= num_rows), most), most)


class StepGraphs:
    """Graphs by key; `capture` makes one of a function that was run before."""

    def __init__(self, capture: Callable[[Callable[[], None]], Graph] | None = None) -> None:
        self._capture = capture or _CudaCapture()
        self._graphs: dict[Hashable, Graph] = {}
        self.num_replays = 0
        self.num_captures = 0

    def run(self, key: Hashable, step: Callable[[], None], warm_up: Callable[[Callable[[], None]], None]) -> None:
        """Replay the graph of the key, after capturing it where there is none. `warm_up(step)` runs the step without
        a trace."""
        if key not in self._graphs:
            warm_up(step)
            self._graphs[key] = self._capture(step)
            self.num_captures += 1
        self._graphs[key].replay()
        self.num_replays += 1

    def clear(self) -> None:
        """Forget all, where what they read is no longer there."""
        self._graphs.clear()


class _CudaCapture:
    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph
