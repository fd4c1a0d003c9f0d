"""Values and times of a device that the host reads later, so that it does not wait for the device now."""

from __future__ import annotations

import time

import torch


class HostCopy:
    """A copy of a small tensor on the host. The copy of a tensor on a GPU is asynchronous; only `tolist` waits."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._copy = tensor.clone()
            return
        self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list | float | bool:
        if self._done is not None:
            self._done.synchronize()
        return self._copy.tolist()


class Moment:
    """The time at which a GPU has finished what was submitted before; on a CPU the time at which this is created."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    @property
    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def seconds_to(self, later: Moment) -> float:
        """Seconds from this moment to a later one of the same device, which the host waits for."""
        if self._event is None or later._event is None:
            return later._time - self._time
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1000
