"""Time that processes spent on CPU, asleep, waiting for a disk, and ready but waiting for a core."""

from __future__ import annotations

import os
import time


class Clock:
    """Measures the time of a group of processes from its creation; `look` updates it.

    Attributes:
        cpu: seconds of CPU time, of all threads.
        asleep: seconds in which none of them ran or wanted to.
        on_disk: seconds in which none ran, and one waited for a disk or the like (state D), which is none of its doing.
        waited: seconds for which threads were ready to run and did not; None where the kernel does not count them.
    """

    def __init__(self, pids: list[int]) -> None:
        self.cpu, self.asleep, self.on_disk, self.waited = 0.0, 0.0, 0.0, 0.0
        self._pids = pids
        self._waits: dict[str, float] = {}  # of each thread, those that have ended included
        self._settled = time.monotonic(), 0.0, 0.0

    def look(self) -> None:
        """Read the kernel's counters; processes that have ended keep theirs until they are waited for."""
        now = time.monotonic()
        self.cpu = max(self.cpu, sum(_cpu_s(pid) for pid in self._pids))
        states = set().union(*map(self._states_of, self._pids))
        waited = sum(self._waits.values())
        self.waited = waited if self._waits else None
        if b"R" in states:  # how long it waits is counted when it gets a core: what is not asleep is not known before
            return
        then, cpu, before = self._settled
        idle = max(0.0, now - then - (self.cpu - cpu) - (waited - before))
        if b"D" in states:
            self.on_disk += idle
        else:
            self.asleep += idle
        self._settled = now, self.cpu, waited

    def _states_of(self, pid: int) -> set[bytes]:
        """Returns the states of its threads: R for running or ready, D for waiting for a disk, and others."""
        states = set()
        for folder in _threads(pid):
            try:
                with open(f"{folder}/stat", "rb") as file:
                    states.add(file.read().rpartition(b")")[2].split()[0])
                with open(f"{folder}/schedstat", "rb") as file:
                    self._waits[folder] = int(file.read().split()[1]) / 1e9
            except (OSError, IndexError):  # it has ended meanwhile, or nobody counts
                continue
        return states


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
