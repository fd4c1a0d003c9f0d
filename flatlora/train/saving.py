"""Asynchronous saving: state is copied to host memory and written by a background thread while training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def to_host(value: Any) -> Any:
    """Returns a deep copy of nested dicts, lists and tuples with all tensors in host memory.

    Tensors that share memory in `value` share it in the copy.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            key = (item.data_ptr(), item.device, item.dtype, tuple(item.shape), tuple(item.stride()))
            if key not in copies or not item.numel():
                copies[key] = item.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(item, dict):
            return {key: copy(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(copy(entry) for entry in item)
        return item

    return copy(value)


class BackgroundWriter:
    """Runs one write at a time in a background thread.

    An exception in the thread is raised once, by the next call of `start`, `check` or `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for the previous work and starts `work` in a thread."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint writer")
        self._thread.start()

    def check(self) -> None:
        """Raises the exception of finished work, if there was one; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: the disk is full or not writable.
        """
        self.join()
        self.check()

    def join(self) -> None:
        """Same as `wait`, but keeps an exception for the next call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again in the main thread
            self._error = error
