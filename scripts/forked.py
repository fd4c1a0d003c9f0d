"""Runs in processes of their own that are forked from one that has made the imports already.

A process that starts from nothing spends ten seconds of a core on importing torch, transformers and PEFT, which is most
of a run of a few steps. What is forked here is otherwise `python run_exp.py SETTINGS`: it can be killed, and shares
nothing with its siblings.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_exp", "deepspeed"])  # one that is missing is left out


class ForkedRun:
    """A run that has been started.

    Args:
        settings: words of the command line.
        log: file that its stdout and stderr are appended to.
        entry: what takes the settings and returns the exit code; None: `run_exp.main`.
        environment: variables set in addition to those of the first call's process.
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
        """The exit code, -N after signal N; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code as soon as there is one; None when so many seconds have passed."""
        self._process.join(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start_server() -> None:
    """Make the imports now, so that the first run takes no longer than the next."""
    _let_children_import(PROJECT)
    process = SERVER.Process(target=os.getpid)
    process.start()
    process.join()


def _let_children_import(folder: Path) -> None:
    """Python 3.11's server does not take over sys.path."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(folder) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, paths)])


def _run(settings: list[str], log: Path, entry: Callable[[list[str]], int] | None, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(PROJECT)
    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    import run_exp

    sys.argv = ["run_exp.py", *settings]
    sys.exit((entry or run_exp.main)(settings))
