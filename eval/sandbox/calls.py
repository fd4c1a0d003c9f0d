"""A seccomp filter that allows the system calls of a Python program that computes, and no others.

The list has the calls of HumanEval's solutions, NumPy and the standard library to calculate, sleep, start threads, run
an asyncio loop and write files. None of them starts a process or a program, reaches another process or its memory,
queues and sockets, or changes a file that was not opened for it. So a filtered program is a single process, and nothing
is left of it when that process ends.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Collection
from typing import NamedTuple

# name: (number on x86-64, number on aarch64 (asm-generic)); None if the architecture has no such call
NUMBERS: dict[str, tuple[int | None, int]] = {
    # memory
    "brk": (12, 214),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "msync": (26, 227),
    "munmap": (11, 215),
    # open files
    "close": (3, 57),
    "copy_file_range": (326, 285),
    "dup": (32, 23),
    "dup3": (292, 24),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "fadvise64": (221, 223),
    "fdatasync": (75, 83),
    "fstat": (5, 80),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "getdents64": (217, 61),
    "lseek": (8, 62),
    "pipe2": (293, 59),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "preadv": (295, 69),
    "pselect6": (270, 72),
    "pwrite64": (18, 68),
    "pwritev": (296, 70),
    "read": (0, 63),
    "readv": (19, 65),
    "sendfile": (40, 71),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "write": (1, 64),
    "writev": (20, 66),
    # paths
    "chdir": (80, 49),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fchdir": (81, 50),
    "fstatfs": (138, 44),
    "getcwd": (79, 17),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "statfs": (137, 43),
    "statx": (332, 291),
    "umask": (95, 166),
    "unlinkat": (263, 35),
    # threads, signals to itself, time
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "getitimer": (36, 102),
    "gettimeofday": (96, 169),
    "nanosleep": (35, 101),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigpending": (127, 136),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sched_yield": (24, 124),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "setitimer": (38, 103),
    "sigaltstack": (131, 132),
    # ids, limits and resources
    "getcpu": (309, 168),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getgroups": (115, 158),
    "getpgid": (121, 155),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getresgid": (120, 150),
    "getresuid": (118, 148),
    "getrusage": (98, 165),
    "getsid": (124, 156),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "sched_getaffinity": (204, 123),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "uname": (63, 160),
}
# older forms of the above, which only x86-64 has
NUMBERS_X86_64: dict[str, int] = {
    "access": 21,
    "alarm": 37,
    "arch_prctl": 158,
    "dup2": 33,
    "epoll_create": 213,
    "epoll_wait": 232,
    "getdents": 78,
    "getpgrp": 111,
    "getrlimit": 97,
    "lstat": 6,
    "mkdir": 83,
    "pause": 34,
    "pipe": 22,
    "poll": 7,
    "readlink": 89,
    "rename": 82,
    "rmdir": 84,
    "select": 23,
    "stat": 4,
    "time": 201,
    "unlink": 87,
}


class Rule(NamedTuple):
    """Allowed values of one argument of a call."""

    argument: int
    values: Collection[int]
    mask: int = 0xFFFFFFFF  # of the argument's lower 32 bits
    wide: bool = False  # the argument is a pointer: its upper 32 bits must be 0 too


_THREAD = 0x3D0F00  # CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID: no process
_DETACHED = 0x400000  # set by musl, ignored by the kernel
# Read, write or both, with or without truncation; reading only without, as Landlock before version 3 allows truncation.
_OPENED = Rule(2, (0, 1, 2, 0o1001, 0o1002), mask=0o1003)
# No flags, MSG_DONTWAIT or MSG_NOSIGNAL; not MSG_OOB, by which programs took over Linux 6.9 to 6.15 (CVE-2025-38236).
_ON_SOCKETS = Rule(3, (0,), mask=0xFFFFFFFF & ~0x4040)
CONDITIONAL: dict[str, tuple[int | None, int]] = {
    "clone": (56, 220),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "open": (2, None),
    "openat": (257, 56),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "recvfrom": (45, 207),
    "sendto": (44, 206),
    "socketpair": (53, 199),
    "tgkill": (234, 131),
}
_CLONE3 = 435  # its flags are in memory, where a filter cannot see them: the C library falls back to clone
_NEWER = 436  # for calls from this number on, C libraries have a fallback for kernels without them
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def can_filter() -> bool:
    """Whether the system calls of this machine's architecture are known."""
    return platform.machine() in _ARCHITECTURE


def rules(pid: int, threads: bool) -> dict[str, tuple[Rule, ...]]:
    """Returns the rules of the calls in `CONDITIONAL` for one process; a call is allowed if all of its rules hold.

    Args:
        threads: whether it may start threads; their number must be limited elsewhere.
    """
    return {
        "clone": (Rule(0, (_THREAD,) if threads else (), mask=0xFFFFFFFF & ~_DETACHED),),
        "fcntl": (Rule(1, (0, 1, 2, 3, 4, 1030)),),  # duplicates and flags; not owner, lease, lock or size of a pipe
        "ioctl": (Rule(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),  # is it a terminal; flags
        "kill": (Rule(0, (pid,)),),
        "open": (_OPENED._replace(argument=1),),
        "openat": (_OPENED,),
        "prctl": (Rule(0, (15, 16)),),  # a thread's name
        "prlimit64": (Rule(0, (0, pid)),),
        "recvfrom": (_ON_SOCKETS,),
        "sendto": (Rule(4, (0,), wide=True), _ON_SOCKETS),  # without an address: within a socket pair
        "socketpair": (
            Rule(0, (1,)),  # local (AF_UNIX)
            Rule(1, (1,), mask=0xFFFFFFFF & ~0o2004000),  # a stream, which cannot be reconnected, unlike datagrams
        ),
        "tgkill": (Rule(0, (pid,)),),
    }


def filter_program(pid: int, threads: bool, machine: str | None = None) -> bytes:
    """Returns the BPF program for one process, 8 bytes per instruction."""
    machine = machine or platform.machine()
    column = list(_ARCHITECTURE).index(machine)
    allowed = [both[column] for both in NUMBERS.values()]
    allowed += NUMBERS_X86_64.values() if machine == "x86_64" else ()
    load, equal, at_least, mask, answer = 0x20, 0x15, 0x35, 0x54, 0x06
    number, architecture, arguments = 0, 4, 16  # offsets in seccomp_data
    allow, refuse, unknown = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

    def statement(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("<HBBI", code, yes, no, k)

    program = [statement(load, architecture), statement(equal, _ARCHITECTURE[machine], 1, 0), statement(answer, refuse)]
    program += [statement(load, number), statement(at_least, 0x40000000, 0, 1), statement(answer, refuse)]  # x32
    for call in sorted(allowed):
        program += [statement(equal, call, 0, 1), statement(answer, allow)]
    for name, conditions in rules(pid, threads).items():
        if (call := CONDITIONAL[name][column]) is None:
            continue
        block = []
        for rule in conditions:
            offset, count = arguments + 8 * rule.argument, len(rule.values)
            if rule.wide:
                block += [statement(load, offset + 4), statement(equal, 0, 1, 0), statement(answer, refuse)]
            block += [statement(load, offset), statement(mask, rule.mask)]
            block += [statement(equal, value, count - index, 0) for index, value in enumerate(rule.values)]
            block.append(statement(answer, refuse))
        block.append(statement(answer, allow))
        program += [statement(equal, call, 0, len(block)), *block]
    program += [statement(equal, _CLONE3, 1, 0), statement(at_least, _NEWER, 0, 1), statement(answer, unknown)]
    return b"".join([*program, statement(answer, refuse)])
