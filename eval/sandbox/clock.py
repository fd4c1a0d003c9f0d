"""Measures the time that processes spend on the CPU, asleep, waiting for a disk, and waiting for a core."""

from __future__ import annotations

import os
import time


class Clock:
    """Measures the time of a group of processes from its creation; `look` updates it.

    Attributes:
        cpu: seconds of CPU time, of all threads.
        asleep: seconds in which no thread ran or was ready to run.
        on_disk: seconds in which no thread ran and one waited for a disk or the like (state D), through no fault of its
            own.
        waited: seconds in which threads were ready but did not run; None if the kernel does not count them.
    """

    def __init__(self, pids: list[int]) -> None:
        self.cpu, self.asleep, self.on_disk, self.waited = 0.0, 0.0, 0.0, 0.0
        self._pids = pids
        self._waits: dict[str, float] = {}  # of each thread, including ended ones
        self._settled = time.monotonic(), 0.0, 0.0

    def look(self) -> None:
        """Reads the kernel's counters; those of an ended process exist until its parent waits for it."""
        now = time.monotonic()
        self.cpu = max(self.cpu, sum(_cpu_s(pid) for pid in self._pids))
        states = set().union(*map(self._states_of, self._pids))
        waited = sum(self._waits.values())
        self.waited = waited if self._waits else None
        if b"R" in states:  # its wait is counted only once it gets a core, so the idle time is not known yet
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
            except (OSError, IndexError):  # it has ended meanwhile, or the kernel does not count
                continue
        return states


def _cpu_s(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Linux's id of the CPU clock of a process
    except OSError:  # its parent has waited for it
        return 0.0


def _threads(pid: int) -> list[str]:
    folder = f"/proc/{pid}/task"
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    except OSError:
        return []
