"""Starts runs as processes that are forked from a server which has done the imports already.

A new process spends ten seconds of a core on importing torch, transformers and PEFT, which is most of a run of a few
steps. A forked process otherwise behaves like `python run_exp.py SETTINGS`: it can be killed, and shares nothing with
its siblings.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_exp", "deepspeed"])  # missing modules are skipped


class ForkedRun:
    """A started run.

    Args:
        settings: arguments of the command line.
        log: file to which stdout and stderr are appended.
        entry: function that takes the settings and returns the exit code; None is `run_exp.main`.
        environment: environment variables in addition to those of the process that started the server.
    """

    def __init__(
        self,
        settings: Sequence[str],
        log: Path,
        entry: Callable[[list[str]], int] | None = None,
        **environment: str,
    ) -> None:
        _let_children_import(PROJECT)
        self.log = log
        self._process = SERVER.Process(target=_run, args=(list(settings), log, entry, environment))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, -N for signal N; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the exit code; returns None after `timeout` seconds."""
        self._process.join(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start_server() -> None:
    """Do the imports now, so that the first run takes no longer than the next."""
    _let_children_import(PROJECT)
    process = SERVER.Process(target=os.getpid)
    process.start()
    process.join()


def _let_children_import(folder: Path) -> None:
    """Set PYTHONPATH, because Python 3.11's server does not inherit sys.path."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(folder) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, paths)])


def _end_with_the_server() -> None:
    """Let the kernel kill this process when the server ends, as it does when the process that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1


def _run(settings: list[str], log: Path, entry: Callable[[list[str]], int] | None, environment: dict[str, str]) -> None:
    os.setsid()
    _end_with_the_server()
    os.chdir(PROJECT)
    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    import run_exp

    sys.argv = ["run_exp.py", *settings]
    sys.exit((entry or run_exp.main)(settings))
