"""Programs that a model wrote, run behind walls: what they return is compared, whatever else they do stays inside.

Each program gets a process of its own, without network, environment, capabilities or a place to write to but an empty
one; its memory, time, files and threads are limited. It makes the system calls of `calls.py` and no others: it starts
no process, so that nothing is left when its own is killed, and it reaches no other process, queue or socket. It may
open the standard library, NumPy, shared libraries of the system and time zones, nothing of /proc, /sys, /etc and home
folders; that a file is there, its size and dates can be asked of any path that its user may reach. `inside.py` has the
walls and says why a program cannot reach the verdict. Linux alone.
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
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval.sandbox import calls, inside
from flatlora.config import ConfigError

_INSIDE = Path(inside.__file__)
_MIB = 1 << 20
_LOOK_S = 0.1
_BLOCK = 4096  # bytes that an empty file counts for: there is no end of those either
_FIRST_UID = 1_900_000_000  # of users that no machine has; each program is one


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0  # by the clock, start and tests included
    memory: int = 1024 * _MIB  # of address space, in all: a program is one process; its tests have as much
    file: int = 16 * _MIB  # a file
    files: int = 64 * _MIB  # all of them; without namespaces looked at ten times a second
    threads: int = 12  # of the one process; one where nobody counts them: neither namespaces nor a user of its own
    open_files: int = 64


class Task(NamedTuple):
    """A program and its tests, as HumanEval has them: `test` defines check(candidate)."""

    program: str
    prompt: str
    test: str
    entry_point: str


class Outcome(NamedTuple):
    """Whether the tests passed; else why not, as the program or its tests put it."""

    passed: bool
    error: str


@dataclass(frozen=True)
class Walls:
    """What this machine can do to keep a program in."""

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
    """Those that hold here, each tried on a program of ours.

    Raises:
        ConfigError: files or the network cannot be kept from a program on this machine; with what it would take.
    """
    faults = []
    if sys.platform != "linux":
        faults.append("it is no Linux")
    else:
        landlock, seccomp = inside.landlock_version(), calls.can_filter()
        if not landlock:
            faults.append("its kernel has no Landlock (5.13, and enabled), which keeps files from a program")
        for namespaces, own_user in ((True, True), (True, False), (False, True), (False, False)):
            if faults or not seccomp or (own_user and os.geteuid() != 0):
                continue
            found = Walls(namespaces, landlock, seccomp, own_user)
            with contextlib.suppress(OSError):
                if _run(_TRIAL, Limits(seconds=20.0), found).passed:
                    return found
        if not seccomp:
            faults.append(f"the system calls of {platform.machine()} are not known here")
        faults = faults or ["a program of ours did not run behind the walls that it has"]
    raise ConfigError(
        [
            f"Generated code cannot be run safely on this machine: {'; '.join(faults)}. Score the predictions on "
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
    """Run the tests on a program; nothing of it is left when this returns.

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


def _run(task: Task, limits: Limits, held: Walls) -> Outcome:
    deadline = time.monotonic() + limits.seconds
    works = [tempfile.mkdtemp(prefix="flatlora-sandbox-") for _ in range(2)]
    (calls_read, calls_write), (answers_read, answers_write), (verdict_read, verdict_write) = (
        os.pipe() for _ in range(3)
    )
    theirs = [calls_read, calls_write, answers_read, answers_write, verdict_write]
    processes: list[subprocess.Popen] = []
    try:
        for work in works:
            os.chmod(work, 0o777)
        candidate = [calls_read, answers_write], works[0], {}
        checker = [answers_read, calls_write, verdict_write], works[1], {"task": task._asdict()}
        for role, (handles, work, more) in (("candidate", candidate), ("checker", checker)):
            processes.append(_start(role, handles, work))
            threads = held.namespaces or held.own_user
            own = {"parent": os.getpid(), "filter": calls.filter_program(processes[-1].pid, threads).hex()}
            _send(processes[-1], {"limits": _order(limits, held) | own, "work": work, **more})
        while theirs:  # each is closed once: its number may be another thread's file a moment later
            os.close(theirs.pop())
        told = _hear(verdict_read, deadline, [] if held.namespaces else works, limits.files)
    finally:
        for process in processes:
            _end(process)
        for handle in [*theirs, verdict_read]:
            os.close(handle)
        for work in works:
            _remove(work)
    if told is None:
        return Outcome(False, f"no verdict within {limits.seconds:g} s")
    if not told:
        return Outcome(False, "the tests ended without a verdict")
    if told.get("sandbox") is False:
        raise OSError(f"no sandbox: {told['error']}")
    return Outcome(told["passed"] is True, told["error"])


def _order(limits: Limits, held: Walls) -> dict[str, Any]:
    return {
        "namespaces": held.namespaces,
        "memory": limits.memory,
        "cpu_s": int(limits.seconds) + 1,
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

    No other package: HumanEval's own holds the solutions.
    """
    paths = sysconfig.get_paths()
    installed = [Path(paths[key]) / name for key in ("purelib", "platlib") for name in ("numpy", "numpy.libs")]
    folders = [Path(paths["stdlib"]), Path(paths["platstdlib"]), Path(sys.base_prefix) / "lib", Path("/lib64")]
    folders += [Path("/usr/lib64"), *Path("/usr/lib").glob("*-linux-gnu")]
    standard = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if _is_library(path)]
    found = [*installed, *standard, Path("/etc/ld.so.cache"), Path("/usr/share/zoneinfo")]
    return sorted({str(path.resolve()) for path in found if path.exists()})


def _is_library(path: Path) -> bool:
    return not re.match(r"(site|dist)-packages$|python\d|pypy", path.name)


def _start(role: str, handles: list[int], work: str) -> subprocess.Popen:
    """A process with nothing of this one's but the pipes."""
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


def _hear(handle: int, deadline: float, works: list[str], files: int) -> dict[str, Any] | None:
    """The verdict; {} when the checker ended without one, None at the deadline.

    Args:
        works: folders to be watched, which may hold so many bytes in `files`.
    """
    data = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([handle], [], [], min(left, _LOOK_S) if works else left)[0]:
            if any(_is_larger(work, files) for work in works):
                return {"passed": False, "error": f"more than {files // _MIB} MiB of files"}
            continue
        part = os.read(handle, 65536)
        if not part:
            return json.loads(data) if data else {}
        data += part
    return None


def _is_larger(folder: str, most: int) -> bool:
    found, left = 0, [folder]
    while left and found <= most:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    found += max(_BLOCK, entry.stat(follow_symlinks=False).st_blocks * 512)
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    if found > most:
                        break
        except FileNotFoundError:
            continue  # gone meanwhile
        except OSError:  # a path that is too long, or closed: no program needs such
            return True
    return found > most


def _remove(folder: str) -> None:
    """Also one that is nested deeper than Python recurses."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:
        subprocess.run(["/bin/rm", "-rf", "--", folder], check=False, stderr=subprocess.DEVNULL)


def _end(process: subprocess.Popen) -> None:
    """Kill a process, which has no others."""
    process.kill()
    process.wait()
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()
