"""Writing behind the training: what is written is copied to the host, and a thread puts it on the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def to_host(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with every tensor in host memory; training on changes nothing of it.

    Tensors that are one in `value` are one in the copy.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(one: Any) -> Any:
        if isinstance(one, torch.Tensor):
            key = (one.data_ptr(), one.device, one.dtype, tuple(one.shape), tuple(one.stride()))
            if key not in copies or not one.numel():
                copies[key] = one.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(one, dict):
            return {key: copy(entry) for key, entry in one.items()}
        if isinstance(one, list | tuple):
            return type(one)(copy(entry) for entry in one)
        return one

    return copy(value)


class BackgroundWriter:
    """One thread that writes, one piece of work at a time.

    An error of the thread is raised by the next `start`, `check` or `wait`, once.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do `work` in the thread, once what it is at is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint writer")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, if anything did; waits for nothing."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            OSError: the disk is full, or does not take it for another reason.
        """
        self.join()
        self.check()

    def join(self) -> None:
        """As `wait`, and keep an error for later."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again where the training can be ended by it
            self._error = error
