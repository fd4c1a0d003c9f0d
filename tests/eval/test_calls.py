"""The filter of system calls: its numbers are the kernel's, and a program that computes needs no more."""

import re
from pathlib import Path

import pytest

from eval import sandbox
from eval.sandbox import calls
from tests.eval.test_sandbox import GOOD, PROMPT, TEST

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernels(machine):
    if not HEADERS[machine].exists():
        pytest.skip("no headers of the kernel")
    text = HEADERS[machine].read_text()
    known = dict(re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", text, flags=re.MULTILINE))
    column = list(HEADERS).index(machine)
    listed = {name: both[column] for name, both in (calls.NUMBERS | calls.CONDITIONAL).items()}
    if machine == "x86_64":
        listed |= calls.NUMBERS_X86_64
    alias = {"newfstatat": "fstatat"} if machine == "aarch64" else {}
    wrong = {name for name, number in listed.items() if number is not None}
    wrong = {name for name in wrong if int(known[alias.get(name, name)]) != listed[name]}
    assert wrong == set()


def test_each_architecture_has_a_program_of_its_own():
    for machine in HEADERS:
        program = calls.filter_program(7, True, machine)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096  # the kernel takes no longer one


COMPUTES = {
    "threads": "import concurrent.futures as c\ndef double(x):\n    with c.ThreadPoolExecutor(3) as pool:\n"
    "        return pool.submit(lambda: x * 2).result()\n",
    "asyncio": "import asyncio\nasync def f(x):\n    await asyncio.sleep(0.01)\n    return x * 2\n"
    "def double(x):\n    return asyncio.run(f(x))\n",
    "alarm": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\ndef double(x):\n"
    "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n    signal.pause()\n    return x * 2\n",
    "numpy": "import numpy\ndef double(x):\n    a = numpy.eye(99)\n    assert (a == numpy.linalg.inv(a)).all()\n"
    "    return x * 2\n",
}


@pytest.mark.parametrize("name", COMPUTES)
def test_a_program_that_computes_is_let_through(name):
    limits = sandbox.Limits(seconds=10.0)
    assert sandbox.run(sandbox.Task(COMPUTES[name], PROMPT, TEST, "double"), limits) == (True, "")


@pytest.mark.parametrize("own_user", [False, True])
def test_there_is_one_process_where_there_are_no_namespaces(own_user):
    held = sandbox.Walls(False, sandbox.walls().landlock, True, own_user)
    if own_user and sandbox._run(sandbox.Task(GOOD, PROMPT, TEST, "double"), sandbox.Limits(), held) != (True, ""):
        pytest.skip("no user of its own can be had here, or none that reaches the interpreter")
    for body in ("os.fork()", "os.execv('/bin/true', ['true'])", "os.kill(os.getppid(), 0)"):
        program = f"import os\ndef double(x):\n    {body}\n    return x * 2\n"
        error = sandbox._run(sandbox.Task(program, PROMPT, TEST, "double"), sandbox.Limits(), held).error
        assert error.startswith("PermissionError"), (body, error)
