"""Runs programs that a model wrote in a sandbox: only what they return leaves it, to be compared.

Each program gets a process of its own, without network, environment or capabilities; its memory, time, files and
threads are limited. It makes the system calls of `calls.py` and no others: it starts no process, so that nothing is
left when its own is killed, and it reaches no other process, queue or socket. It may write to a file system of its own
in memory, of a fixed size; where there are no namespaces, which that takes, it may write nowhere. It may open the
standard library, NumPy, shared libraries and their index, time zones, /dev/null, /dev/zero and /dev/urandom, nothing
else of /usr, /proc, /sys, /etc, /dev and home folders; that a file is there, its size and dates can be asked of any
path that its user may reach. `inside.py` has the walls and says why a program cannot reach the verdict. Linux alone.

What a program and its tests compute is measured in CPU time (`clock.py`), so that other programs do not decide whether
one is in time. A time-out while others wanted the same cores, or after a wait for a disk, is repeated alone, and so is
a program that something else killed, such as a kernel without memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval.sandbox import calls, inside
from eval.sandbox.clock import Clock
from flatlora.utils.errors import ConfigError

_INSIDE = Path(inside.__file__)
_MIB = 1 << 20
_LOOK_S = 0.1
_CROWDED = 0.1  # of the limit, spent waiting for a core or a disk: others may be why a program was late
_DISK_PATIENCE = 5  # times the limit, for a disk that does not answer
_NO_FOLDER = "there is no folder to write to: this machine has no namespaces"
_FIRST_UID = 1_900_000_000  # of users that no machine has; each program is one


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    seconds: float = 10.0  # of CPU time, start and tests included; asleep it may be as long again
    memory: int = 1024 * _MIB  # of address space, in all: a program is one process; its tests have as much
    file: int = 16 * _MIB  # a file
    files: int = 64 * _MIB  # all of them, removed ones that are still open included; none without namespaces
    threads: int = 12  # of the one process; one where nobody counts them: neither namespaces nor a user of its own
    open_files: int = 64


class Task(NamedTuple):
    """A program and its tests, as HumanEval has them: `test` defines check(candidate)."""

    program: str
    prompt: str
    test: str
    entry_point: str


class Outcome(NamedTuple):
    """Whether the tests passed; if not, the error of the program or its tests."""

    passed: bool
    error: str


@dataclass(frozen=True)
class Walls:
    """The isolation mechanisms that this machine supports."""

    namespaces: bool
    landlock: int  # its version, 0 without
    seccomp: bool
    own_user: bool

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return {
            "namespaces": self.namespaces,
            "landlock": self.landlock,
            "seccomp": self.seccomp,
            "own_user": self.own_user,
        }


@functools.cache
def walls() -> Walls:
    """Returns the mechanisms that work on this machine, each tested with a program.

    Raises:
        ConfigError: this machine cannot isolate a program from files or the network; the message says what is needed.
    """
    errors = []
    if sys.platform != "linux":
        errors.append("it is no Linux")
    else:
        landlock, seccomp = inside.landlock_version(), calls.can_filter()
        if not landlock:
            errors.append("its kernel has no Landlock (5.13, and enabled), which keeps files from a program")
        for namespaces, own_user in ((True, True), (True, False), (False, True), (False, False)):
            if errors or not seccomp or (own_user and os.geteuid() != 0):
                continue
            found = Walls(namespaces, landlock, seccomp, own_user)
            with contextlib.suppress(OSError):
                if _run(_TRIAL, Limits(seconds=20.0), found).passed:
                    return found
        if not seccomp:
            errors.append(f"the system calls of {platform.machine()} are not known here")
        errors = errors or ["a program of ours did not run behind the walls that it has"]
    raise ConfigError(
        [
            f"Generated code cannot be run safely on this machine: {'; '.join(errors)}. Score the predictions on "
            "another one (score_only=true needs no model), or leave the benchmark out."
        ]
    )


_TRIAL = Task(
    "import heapq, random, decimal\ndef f(x):\n    return [x, 'é', 1.5, (None, {1: {2}})]\n",
    "def f(x):\n    ''\n",
    "def check(candidate):\n    assert candidate(1) == [1, 'é', 1.5, (None, {1: {2}})]\n",
    "f",
)


def run(task: Task, limits: Limits | None = None) -> Outcome:
    """Runs the tests on a program; all its processes and files are gone when this returns.

    Raises:
        ConfigError: as `walls`.
        OSError: the machine had no room for the sandbox; the program was not run.
    """
    return _run(task, limits or Limits(), walls())


def run_all(tasks: list[Task], limits: Limits | None = None, workers: int | None = None) -> Iterator[Outcome]:
    """`run` of each task, in their order, as many at a time as there are cores."""
    walls()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from pool.map(lambda task: run(task, limits), tasks)


_uids = itertools.count()


class _Room:
    """Programs run side by side, or one alone."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._running = 0
        self._closed = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._closed)
            self._running += 1
        try:
            yield
        finally:
            with self._change:
                self._running -= 1
                self._change.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._closed)
            self._closed = True
            self._change.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._change:
                self._closed = False
                self._change.notify_all()


_room = _Room()


class _KilledEarly(OSError):
    """A process was killed before the program started."""


def _run(task: Task, limits: Limits, held: Walls) -> Outcome:
    try:
        with _room.shared():
            outcome, disturbed = _attempt(task, limits, held)
    except _KilledEarly:
        disturbed = True
    if disturbed:
        with _room.alone():
            outcome, _ = _attempt(task, limits, held)
    return outcome


def _attempt(task: Task, limits: Limits, held: Walls) -> tuple[Outcome, bool]:
    """(The outcome, whether something other than the program may be why it failed).

    Raises:
        OSError: as `run`; `_KilledEarly` where another attempt may fare better.
    """
    works = [tempfile.mkdtemp(prefix="flatlora-sandbox-") for _ in range(2)]
    (calls_read, calls_write), (answers_read, answers_write), (verdict_read, verdict_write) = (
        os.pipe() for _ in range(3)
    )
    theirs = [calls_read, calls_write, answers_read, answers_write, verdict_write]
    processes: list[subprocess.Popen] = []
    killed = False
    try:
        for work in works:
            os.chmod(work, 0o755)
        candidate = [calls_read, answers_write], works[0], {}
        checker = [answers_read, calls_write, verdict_write], works[1], {"task": task._asdict()}
        for role, (handles, work, more) in (("candidate", candidate), ("checker", checker)):
            processes.append(_start(role, handles, work))
            threads = held.namespaces or held.own_user
            own = {"parent": os.getpid(), "filter": calls.filter_program(processes[-1].pid, threads).hex()}
            _send(processes[-1], {"limits": _order(limits, held) | own, "work": work, **more})
        while theirs:  # each is closed once: its number may be another thread's file a moment later
            os.close(theirs.pop())
        clock = Clock([process.pid for process in processes])
        told = _hear(verdict_read, clock, limits.seconds)
        clock.look()
        if told is not None and not told.get("passed"):
            killed = _was_killed(processes)
    finally:
        for process in processes:
            _end(process)
        for handle in [*theirs, verdict_read]:
            os.close(handle)
        for work in works:
            os.rmdir(work)  # what is written is written to a file system that nobody else sees, or not at all
    crowded = clock.waited is None or clock.waited + clock.on_disk > _CROWDED * limits.seconds
    if clock.cpu > limits.seconds:
        return Outcome(False, f"no verdict within {limits.seconds:g} s of CPU time"), crowded
    if told is None:
        disk = clock.asleep <= limits.seconds
        doing = (
            f"{_DISK_PATIENCE * limits.seconds:g} s of waiting for a disk" if disk else f"{limits.seconds:g} s asleep"
        )
        return Outcome(False, f"no verdict within {doing}"), crowded
    if not told:
        return Outcome(False, "the tests ended without a verdict"), killed
    if told.get("sandbox") is False:
        raise (_KilledEarly if killed else OSError)(f"no sandbox: {told['error']}")
    error = told["error"]
    if not held.namespaces and re.match(r"PermissionError: \[Errno 13\]|FileNotFoundError: .* temporary", error):
        error = f"{error} ({_NO_FOLDER})"
    return Outcome(told["passed"] is True, error), killed


def _was_killed(processes: list[subprocess.Popen]) -> bool:
    """Whether one of the processes was killed; waits briefly for those that are ending."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_LOOK_S if _is_ending(process.pid) else 0)
    return any(process.returncode == -signal.SIGKILL for process in processes)


def _is_ending(pid: int) -> bool:
    try:
        return not os.listdir(f"/proc/{pid}/fd")  # closed before the parent hears of the end
    except OSError:
        return True


def _order(limits: Limits, held: Walls) -> dict[str, Any]:
    return {
        "namespaces": held.namespaces,
        "memory": limits.memory,
        "cpu_s": int(limits.seconds) + 1,  # of each process, should this one be too late to end it
        "file": limits.file,
        "files": limits.files,
        "threads": limits.threads,
        "open_files": limits.open_files,
        "uid": _FIRST_UID + (os.getpid() * 1000 + next(_uids)) % 100_000_000 if held.own_user else None,
        "readable": [sys.prefix, sys.base_prefix],
        "granted": _granted(),
    }


@functools.cache
def _granted() -> list[str]:
    """What a program may open: the standard library, NumPy, and the shared libraries behind them.

    No other package: HumanEval's own holds the solutions. Of /usr/lib and the like nothing but shared libraries.
    """
    paths = sysconfig.get_paths()
    found = [Path(paths[key]) / name for key in ("purelib", "platlib") for name in ("numpy", "numpy.libs")]
    for folder in {Path(paths["stdlib"]), Path(paths["platstdlib"])}:
        found += [path for path in folder.iterdir() if not re.match(r"(site|dist)-packages$", path.name)]
    lib = Path("/usr/lib")
    for folder in [Path(sys.base_prefix) / "lib", lib, Path("/lib64"), Path("/usr/lib64"), *lib.glob("*-linux-gnu")]:
        found += [path for path in folder.glob("*.so*") if path.is_file()]
    found += [Path("/etc/ld.so.cache"), Path("/usr/share/zoneinfo")]
    return sorted({str(path.resolve()) for path in found if path.exists()})


def _start(role: str, handles: list[int], work: str) -> subprocess.Popen:
    """Starts a process that inherits only the pipes."""
    return subprocess.Popen(
        [sys.executable, "-I", "-B", str(_INSIDE), role, *map(str, handles)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "HOME": work, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
        cwd="/",
        pass_fds=handles,
        start_new_session=True,
    )


def _send(process: subprocess.Popen, order: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended already: there will be no verdict
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
    return process


def _hear(handle: int, clock: Clock, seconds: float) -> dict[str, Any] | None:
    """Returns the verdict; {} if the checker ended without one, None if it ran out of time (CPU, sleep or disk)."""
    data = b""
    while max(clock.cpu, clock.asleep, clock.on_disk / _DISK_PATIENCE) <= seconds:
        if not select.select([handle], [], [], min(_LOOK_S, seconds))[0]:
            clock.look()
            continue
        part = os.read(handle, 65536)
        if not part:
            return json.loads(data) if data else {}
        data += part
    return None


def _end(process: subprocess.Popen) -> None:
    """Kills a process, which has no children."""
    process.kill()
    process.wait()
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()
