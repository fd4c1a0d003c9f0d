"""A cluster takes the machine away: end after the running step, with a checkpoint, and let the job be queued again.

SIGTERM and SIGUSR1 ask for it, and SIGUSR2, which submitit listens to: its own handler is called once the checkpoint is
whole, so that it is queued again with nothing lost. Every process of a run stops at the same step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback

from flatlora.train import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(BaseException):
    """The training ended early because it was told to; its newest checkpoint is whole.

    `forward` calls the handler that the signal had before, such as submitit's: last of all, for it ends the process.
    """

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__("told to end by a signal")
        self.forward = forward


class Preemption(TrainerCallback):
    """Turns those signals into a checkpoint and a stop, for as long as the block lasts.

    A second signal interrupts at once, as it does outside; not one of several processes, which hear of it from the
    cluster and from their launcher.
    """

    def __init__(self) -> None:
        self.accelerator: Accelerator | None = None  # of the trainer, to ask the other processes
        self.stopped = False
        self._told: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._told is not None and distributed.world_size() == 1:
            raise KeyboardInterrupt
        self._told = self._told or number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.asked(args):
            self.stopped = control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        # Not before: a checkpoint that holds this word would be taken for that of a finished training.
        control.should_training_stop |= self.stopped

    def asked(self, args) -> bool:
        """Whether any process was told: signals reach them at different moments, and all must stop at one step."""
        told = self._told is not None
        if args.world_size == 1:
            return told
        import torch

        count = torch.tensor(int(told), device=args.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def forward(self) -> None:
        """As `Preempted` says."""
        handler = self._before.get(self._told) if self._told is not None else None
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self._told, None)
