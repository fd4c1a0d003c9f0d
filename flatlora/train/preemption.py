"""Preemption on a cluster: training stops after the current step with a checkpoint, so that the job can be requeued.

It is requested by SIGTERM, SIGUSR1, or SIGUSR2, which submitit uses: submitit's own handler is called once the
checkpoint is complete, and requeues the job. All processes of a run stop at the same step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from flatlora.train import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(BaseException):
    """Training stopped early because of a signal; the newest checkpoint is complete.

    `forward` calls the previous handler of the signal, such as submitit's. Call it last: it ends the process.
    """

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__("ended by a signal")
        self.forward = forward


class Preemption(TrainerCallback):
    """Context manager and callback that turns the signals into a checkpoint and a stop.

    A second signal interrupts at once if the run has one process. With several, each gets the signal twice: from the
    cluster and from the launcher.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._signal: int | None = None  # the first one received
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set signal handlers
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and distributed.world_size() == 1:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.asked():
            self.stopped = control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        # Only after saving: a checkpoint with should_training_stop is treated as that of a finished training.
        control.should_training_stop |= self.stopped

    def asked(self) -> bool:
        """Whether any process received a signal: they arrive at different times, and all must stop at the same step."""
        return bool(distributed.largest(int(self._signal is not None)))

    def forward(self) -> None:
        """Calls the previous handler of the received signal, if there was one."""
        handler = self._before.get(self._signal) if self._signal is not None else None
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self._signal, None)
