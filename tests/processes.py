"""Runs in processes of their own: as a user starts them, or forked, where the start is not what is tested."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.forked import ForkedRun

PROJECT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(settings: list[str], **environment: str) -> subprocess.Popen:
    """`python run_exp.py SETTINGS`, the leader of a session."""
    return subprocess.Popen(
        [sys.executable, "run_exp.py", *settings],
        cwd=PROJECT,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str]:
    reported, _ = process.communicate(timeout=seconds)
    return process.returncode, reported


Entry = Callable[[list[str]], int] | None


def fork(settings: list[str], entry: Entry = None, **environment: str) -> ForkedRun:
    """The same, ten seconds sooner; `entry` stands for run_exp.main."""
    (root,) = [Path(word.partition("=")[2]) for word in settings if word.startswith("results_root=")]
    log = root.with_name(f"{root.name}-{environment.get('RANK', 0)}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    return ForkedRun(settings, log, entry, **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment)


def fork_two(settings: list[str], *differing: list[str], entry: Entry = None) -> list[ForkedRun]:
    """Two processes as torchrun starts them on one machine; each may have words of its own."""
    return fork_ranks(2, settings, *differing, entry=entry)


def fork_ranks(
    count: int, settings: list[str], *differing: list[str], entry: Entry = None, **environment: str
) -> list[ForkedRun]:
    """So many of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = str(count)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= environment
    own = differing or [[]] * count
    ranks = range(count)
    return [fork([*own[rank], *settings], entry, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in ranks]


def end_well(*runs: ForkedRun, seconds: float = 240) -> None:
    for run in runs:
        assert run.wait(seconds) == 0, run.log.read_text()[-3000:]


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Another umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def in_a_child(work: Callable[[], None]) -> int:
    """What became of a forked process that does `work`: its wait status."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die(folder: Path) -> None:
    """Be killed with half of the work done."""
    (folder / "half").write_bytes(b"\0" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
