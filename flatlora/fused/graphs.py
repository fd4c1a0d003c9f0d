"""Captures calls in CUDA graphs, which a GPU replays in one launch."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from flatlora.utils.errors import reason_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Captured(NamedTuple, Generic[T]):
    """A graph and the result of the captured call, which each replay overwrites."""

    graph: torch.cuda.CUDAGraph
    result: T

    def replay(self) -> T:
        self.graph.replay()
        return self.result


class GraphCapture:
    """Captures calls in graphs that share one memory pool, so that they must be replayed one after the other.

    Warm-up and capture run on one stream: the autograd graph of the warm-up may outlive it (a logged ImportError keeps
    its frames), and its nodes that accumulate gradients would make the capture wait for another stream, an error.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, compute: Callable[[], T], label: object, *, warm_ups: int) -> Captured[T] | None:
        """Returns a graph of `compute`, which must not synchronize with the host; None if the device refuses it.

        Args:
            label: what is captured, for the log of a refusal.
            warm_ups: calls before the capture, to compile and allocate what the kernels need.
        """
        stream, caller = self._stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                compute()
        caller.wait_stream(stream)
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # frees the memory of the warm-up runs for the graph's own pool
        graph = torch.cuda.CUDAGraph()
        if not self._alive:
            self._pool = torch.cuda.graph_pool_handle()  # torch gives up a pool with its last graph
        try:
            # thread_local: other threads may call CUDA, as the loader's pins memory and autograd's loads kernels.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result = compute()
        except torch.AcceleratorError as error:
            cause = error.__context__ or error  # the error at the end of a failed capture does not name the cause
            logger.warning("No CUDA graph of %s: %s", label, reason_of(cause))
            torch.cuda.set_stream(caller)  # a failed capture leaves its stream active and its pool unusable
            self._pool = torch.cuda.graph_pool_handle()
            self._end_capture_of_generator()
            return None
        self._alive.add(graph)
        return Captured(graph, result)

    def _end_capture_of_generator(self) -> None:
        """Ends what a failed capture began, by one of a single kernel: until then there are no random numbers."""
        flag = torch.zeros(1, device=self.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
            flag.zero_()
