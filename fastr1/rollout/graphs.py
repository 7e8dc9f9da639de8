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


# Makes a graph of a function that was run before, in the memory pool of a graph that is still there, or in a new one.
Capture = Callable[[Callable[[], None], Any], Graph]


def bucket_of(num_rows: int, most: int) -> int:
    """How many rows a step computes for so many: the next of `BUCKETS`, and no more than there can be."""
    return min(next((size for size in BUCKETS if size >= num_rows), most), most)


class StepGraphs:
    """Graphs by key."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or capture_on_gpu
        self._graphs: dict[Hashable, Graph] = {}
        self.num_replays = 0
        self.num_captures = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def capture(self, key: Hashable, step: Callable[[], None]) -> None:
        """Make the graph of a key."""
        self._graphs[key] = self._capture(step, next(iter(self._graphs.values()), None))
        self.num_captures += 1

    def replay(self, key: Hashable) -> None:
        self._graphs[key].replay()
        self.num_replays += 1

    def clear(self) -> None:
        """Forget all, where what they read is no longer there."""
        self._graphs.clear()


def capture_on_gpu(step: Callable[[], None], neighbour: Any) -> Graph:
    """A pool lives as long as a graph of it does; the allocator refuses its handle after that. Threads that load clips
    go on using the GPU meanwhile, which would end a capture that is not of this thread alone."""
    graph = torch.cuda.CUDAGraph()
    pool = None if neighbour is None else neighbour.pool()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph
