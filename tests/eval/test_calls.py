"""The filter of system calls: its numbers are the kernel's, and a program that computes needs no more."""

import re
import struct
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


@pytest.mark.parametrize("domain", [2, 10, 16, 17, 30, 38])  # IPv4, IPv6, netlink, packets, TIPC, the kernel's ciphers
def test_a_pair_of_sockets_is_of_this_machine(domain):
    """The kernel itself refuses each of them otherwise: it is not asked."""
    program = "import ctypes, errno, socket\ndef double(x):\n    libc = ctypes.CDLL(None, use_errno=True)\n"
    program += f"    assert libc.socketpair({domain}, 1, 0, (ctypes.c_int * 2)()) == -1\n"
    program += "    assert ctypes.get_errno() == errno.EPERM, errno.errorcode[ctypes.get_errno()]\n"
    program += "    a, b = socket.socketpair()\n    a.send(b'x')\n    return x * 2 if b.recv(1) == b'x' else 0\n"
    limits = sandbox.Limits(seconds=10.0)
    assert sandbox.run(sandbox.Task(program, PROMPT, TEST, "double"), limits) == (True, "")


def answer_to(number, arguments, machine):
    """What the kernel makes of the filter for one call, by the rules of classic BPF."""
    program = calls.filter_program(7, True, machine)
    lines = [struct.unpack_from("<HBBI", program, place) for place in range(0, len(program), 8)]
    data = struct.pack("<IIQ6Q", number, calls._ARCHITECTURE[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    place, held = 0, 0
    while True:
        code, yes, no, k = lines[place]
        if code == 0x06:
            return {0x7FFF0000: True}.get(k, False)
        if code == 0x20:
            (held,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:
            held &= k
        else:
            place += yes if (held == k if code == 0x15 else held >= k) else no
        place += 1


@pytest.mark.parametrize("machine", HEADERS)
def test_conditions_hold_all_at_once(machine):
    def passes(name, *arguments):
        return answer_to(calls.CONDITIONAL[name][list(HEADERS).index(machine)], arguments, machine)

    for domain in range(46):
        for kind in range(8):
            for flags in (0, 0o4000, 0o2000000, 0o2004000, 0o1000):
                wanted = domain == 1 and kind == 1 and flags != 0o1000
                assert passes("socketpair", domain, kind | flags) == wanted
    assert [one for one in range(64) if passes("fcntl", 3, one)] == [0, 1, 2, 3, 4]
    assert passes("kill", 7)
    assert not passes("kill", 8)
    assert passes("sendto", 3, 0, 1, 0, 0)
    assert not passes("sendto", 3, 0, 1, 0, 1 << 32)
    flags = [1 << bit for bit in range(32) if passes("sendto", 3, 0, 1, 1 << bit, 0)]
    assert flags == [1 << bit for bit in range(32) if passes("recvfrom", 3, 0, 1, 1 << bit)] == [0x40, 0x4000]
    assert passes("recvfrom", 3, 0, 1, 0)
    assert not passes("clone", 17)
    assert passes("clone", calls._THREAD)
    assert passes("prctl", 15)
    assert not passes("prctl", 4)
