"""Time limits for work that may never end, such as a regular expression from elsewhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer. It uses SIGALRM, so in other threads there is no limit.

    Python's regular expressions check for signals while they match.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_time(work: Callable[[], T], seconds: float) -> T:
    """Returns the result of `work`, which runs in another thread; for libraries that no signal interrupts.

    Raises:
        TimeoutError: it takes longer; its thread goes on until the process ends.
    """
    results: list[tuple[T | None, BaseException | None]] = []

    def attempt() -> None:
        try:
            results.append((work(), None))
        except BaseException as error:  # raised again in the calling thread
            results.append((None, error))

    thread = threading.Thread(target=attempt, name="limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError(f"it took more than {seconds} s")
    result, error = results[0]
    if error is not None:
        raise error
    return result
