"""What processes have spent: CPU time, time asleep, and time in which they were ready and others had the cores."""

from __future__ import annotations

import os
import time


class Clock:
    """Of some processes together, from its making on; `look` brings it up to date.

    Attributes:
        cpu: seconds of CPU time, of all threads.
        asleep: seconds in which none of them ran or wanted to.
        waited: seconds for which threads were ready to run and did not; None where the kernel does not count them.
    """

    def __init__(self, pids: list[int]) -> None:
        self.cpu, self.asleep, self.waited = 0.0, 0.0, 0.0
        self._pids = pids
        self._waits: dict[str, float] = {}  # of each thread, those that have ended included
        self._settled = time.monotonic(), 0.0, 0.0

    def look(self) -> None:
        """Read the kernel's counters; processes that have ended keep theirs until they are waited for."""
        now = time.monotonic()
        self.cpu = max(self.cpu, sum(_cpu_s(pid) for pid in self._pids))
        ready = [self._look_at(pid) for pid in self._pids]
        waited = sum(self._waits.values())
        self.waited = waited if self._waits else None
        if any(ready):  # how long it waits is counted when it gets a core: what is not asleep is not known before
            return
        then, cpu, before = self._settled
        self.asleep += max(0.0, now - then - (self.cpu - cpu) - (waited - before))
        self._settled = now, self.cpu, waited

    def _look_at(self, pid: int) -> bool:
        """Whether a thread of it runs or is ready to."""
        is_ready = False
        for folder in _threads(pid):
            try:
                with open(f"{folder}/stat", "rb") as file:
                    is_ready |= file.read().rpartition(b")")[2].split()[0] == b"R"
                with open(f"{folder}/schedstat", "rb") as file:
                    self._waits[folder] = int(file.read().split()[1]) / 1e9
            except (OSError, IndexError):  # it has ended meanwhile, or nobody counts
                continue
        return is_ready


def _cpu_s(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the number that Linux gives the CPU clock of a process
    except OSError:  # it is gone, waited for
        return 0.0


def _threads(pid: int) -> list[str]:
    folder = f"/proc/{pid}/task"
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    except OSError:
        return []
