"""Hostile programs: each fails its tests, in time, and leaves no process, file or connection behind."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import yaml

from eval import sandbox
from eval.sandbox import inside
from flatlora.config import ConfigError

PROMPT = "def double(x):\n    '''Twice x.'''\n"
TEST = "def check(candidate):\n    assert candidate(21) == 42\n    assert candidate([1]) == [1, 1]\n"
LIMITS = sandbox.Limits(seconds=1.2)
GOOD = "def double(x):\n    return x * 2\n"


def outcome(program, limits=LIMITS, test=TEST):
    return sandbox.run(sandbox.Task(program, PROMPT, test, "double"), limits)


# What a program must not get away with; MARK is a file in FOLDER, PORT a server that listens here, PID this process.
TEXT = (Path(__file__).parent / "hostile.txt").read_text(encoding="utf-8")
HOSTILE = dict(part.split("\n", 1) for part in re.split(r"^# ", TEXT, flags=re.MULTILINE)[1:])


@pytest.fixture(autouse=True)
def own_room(monkeypatch):
    """Folders of this test's sandboxes, which others may run beside; below /tmp, for another user must reach it."""
    room = Path(tempfile.mkdtemp(prefix="flatlora-test-"))
    room.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    yield room
    monkeypatch.undo()
    room.rmdir()  # nothing is left


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precious")
    (folder / "mark").write_text("precious")
    os.environ["FLATLORA_SECRET"] = "secret"
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
    port = servers[0].getsockname()[1]
    servers[1].bind(("127.0.0.1", port))
    for server in servers:
        server.setblocking(False)
    yield {"mark": folder / "mark", "folder": folder, "port": port, "pid": os.getpid()}, servers
    del os.environ["FLATLORA_SECRET"]
    for server in servers:
        server.close()


def aimed(name, around):
    program = HOSTILE[name]
    for word, value in around.items():
        program = program.replace(word.upper(), str(value))
    return program


def processes():
    """Commands of all processes that this test's sandboxes started: their home is in its room."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if tempfile.gettempdir().encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def left_over():
    return list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_and_leaves_nothing(name, surroundings):
    around, servers = surroundings
    open_files, nice, threads = len(os.listdir("/proc/self/fd")), os.nice(0), set(threading.enumerate())
    begun, state = time.monotonic(), around["mark"].stat()
    found = outcome(aimed(name, around))
    assert not found.passed
    assert time.monotonic() - begun < LIMITS.seconds + 3
    assert around["mark"].stat()[:9] == state[:9]
    assert around["mark"].read_text() == "precious"  # which may change its date of access
    assert [path.name for path in around["folder"].iterdir()] == ["mark"]
    assert processes() == []
    assert left_over() == []
    assert os.nice(0) == nice
    assert len(os.listdir("/proc/self/fd")) <= open_files
    for server in servers:
        with pytest.raises(BlockingIOError):
            server.accept() if server.type == socket.SOCK_STREAM else server.recv(1)
    assert set(threading.enumerate()) <= threads


def test_there_are_25_hostile_programs_and_a_good_one_passes():
    assert len(HOSTILE) >= 25
    assert outcome(GOOD) == (True, "")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("def double(x):\n    return 0", "wrong answer"),
        ("def double(x):\n    raise KeyError('k')", "KeyError: 'k'"),
        ("def double(x) return", "SyntaxError:"),
        ("double = 5", "TypeError: 'int' object is not callable"),
        ("def other(x):\n    pass", "KeyError: 'double'"),
        ("import numpy_that_is_not_there", "ModuleNotFoundError"),
        ("def double(x):\n    return object()", "Unspeakable: object cannot be told apart from a trick"),
        ("def double(x):\n    while True:\n        pass", "no verdict within 1 s"),
    ],
)
def test_a_failure_says_why(program, error):
    assert outcome(program, sandbox.Limits(seconds=1.0)).error.startswith(error)


def test_files_of_its_own_and_the_standard_library_are_there():
    program = "import heapq, json, os, re\ndef double(x):\n    open('a', 'w').write(json.dumps(x))\n"
    program += "    os.makedirs('b', exist_ok=True)\n    return json.load(open('a')) * 2\n"
    assert outcome(program).passed


VALUES = [None, True, 0, -7, 10**40, 1.5, -0.0, float("inf"), 2j, "é\ud83d\ude00\n", b"\x00\xff", bytearray(b"a")]
VALUES += [[1, [2]], (1, (2, [3])), {1, 2}, frozenset({3}), {1: {"a": (2.5, None)}, "b": []}, [], (), {}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_through_as_they_are(value):
    found = inside.decode(inside.encode(value))
    assert found == value
    assert type(found) is type(value)


def test_a_number_that_is_none_comes_through_as_well():
    assert str(inside.decode(inside.encode(float("nan")))) == "nan"


@pytest.mark.parametrize(
    "made",
    [
        "collections.Counter('aab')",
        "collections.defaultdict(int, {'a': 2, 'b': 1})",
        "collections.OrderedDict(a=2, b=1)",
    ],
)
def test_dicts_of_the_standard_library_are_compared_as_dicts(made):
    test = "def check(candidate):\n    assert candidate(1) == {'a': 2, 'b': 1}\n"
    assert outcome(f"import collections\ndef double(x):\n    return {made}\n", test=test) == (True, "")


@pytest.mark.parametrize(
    ("made", "check"),
    [
        ("(one for one in [1, 2])", "tuple(candidate(1)) == (1, 2)"),
        ("map(abs, [-1, 2])", "list(candidate(1)) == [1, 2]"),
        ("itertools.count(3)", "next(candidate(1)) == 3"),
        ("range(3)", "candidate(1) == range(3)"),
        ("fractions.Fraction(1, 3)", "abs(candidate(1) - 1 / 3) < 1e-9"),
        ("decimal.Decimal('0.5')", "candidate(1) == 0.5"),
        ("numpy.longdouble('0.5')", "candidate(1) == 0.5"),
    ],
)
def test_right_values_of_other_types_pass(made, check):
    program = f"import decimal, fractions, itertools\n{'import numpy' if 'numpy' in made else ''}\n"
    program += f"def double(x):\n    return {made}\n"
    test = f"def check(candidate):\n    assert {check}\n"
    assert outcome(program, sandbox.Limits(seconds=10.0), test) == (True, "")
    assert not outcome(program, sandbox.Limits(seconds=10.0), test.replace("assert ", "assert not ")).passed


def test_a_main_block_is_not_run_and_long_numbers_come_through():
    program = "def double(x):\n    return x * 2\nif __name__ == '__main__':\n    input()\n"
    assert outcome(program).passed
    test = "def check(candidate):\n    assert candidate(10**6000) == 2 * 10**6000\n"
    assert outcome(GOOD, test=test).passed


def test_a_sandbox_that_cannot_be_made_is_no_wrong_answer(monkeypatch):
    held = sandbox.walls()
    monkeypatch.setattr(sandbox, "_order", lambda limits, held: plain(limits, held) | {"memory": 10**30})
    with pytest.raises(OSError, match="no sandbox"):
        sandbox._run(sandbox.Task(GOOD, PROMPT, TEST, "double"), LIMITS, held)


plain = sandbox._order


def test_subclasses_and_deep_nests_do_not():
    deep = []
    for _ in range(200):
        deep = [deep]
    for value in (type("A", (int,), {})(), type("B", (str,), {})("x"), object(), deep, [len]):
        with pytest.raises(inside.Unspeakable):
            inside.encode(value)


def test_several_run_at_once_in_order():
    tasks = [sandbox.Task(f"def double(x):\n    return x * {n}", PROMPT, TEST, "double") for n in (2, 3, 2, 1)]
    assert [one.passed for one in sandbox.run_all(tasks, LIMITS, workers=4)] == [True, False, True, False]


def test_walls_without_namespaces_hold_too(surroundings):
    around, _ = surroundings
    held = sandbox.Walls(False, inside.landlock_version(), True, False)
    for name in ("writing outside", "socket", "early exit", "daemon", "reading files", "equal to everything"):
        task = sandbox.Task(aimed(name, around), PROMPT, TEST, "double")
        assert not sandbox._run(task, LIMITS, held).passed
    assert sandbox._run(sandbox.Task(GOOD, PROMPT, TEST, "double"), LIMITS, held).passed
    assert processes() == []


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("for n in range(99): open(str(n), 'wb').write(bytes(1 << 20))", "more than 8 MiB of files"),
        ("for n in range(99999): open(str(n), 'w')", "more than 8 MiB of files"),
        ("for n in range(1500): os.mkdir('d'), os.chdir('d')", ""),  # deeper than Python removes
    ],
)
def test_files_are_counted_where_there_is_no_file_system_for_them(body, error):
    held = sandbox.Walls(False, inside.landlock_version(), True, False)
    program = f"import os, time\ndef double(x):\n    {body}\n    time.sleep(60)\n"
    limits = sandbox.Limits(seconds=4.0, files=8 << 20)
    outcome = sandbox._run(sandbox.Task(program, PROMPT, TEST, "double"), limits, held)
    assert not outcome.passed
    assert error in outcome.error
    assert left_over() == []


def test_nothing_outlives_an_evaluation_that_is_killed(own_room):
    program = "import time\ndef double(x):\n    time.sleep(100)\n"
    task = f"sandbox.Task({program!r}, {PROMPT!r}, {TEST!r}, 'double')"
    script = f"from eval import sandbox\nsandbox.run({task}, sandbox.Limits(seconds=90.0))"
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(own_room)})
    deadline = time.monotonic() + 90
    while len(processes()) < 3 and time.monotonic() < deadline:  # it, candidate and checker
        time.sleep(0.05)
    assert len(processes()) == 3
    process.kill()
    process.wait()
    while processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes() == []
    for folder in left_over():  # the one thing that a killed process cannot take away
        folder.rmdir()


def test_the_packages_of_this_machine_are_closed_and_numpy_is_not():
    folder = str(Path(yaml.__file__).parent)
    program = f"import numpy, os\ndef double(x):\n    return [numpy.int64(1).item(), os.listdir({folder!r})]\n"
    assert "PermissionError" in outcome(program, sandbox.Limits(seconds=10.0)).error
    program = "import numpy, zoneinfo, sqlite3\ndef double(x):\n    return x * 2\n"
    assert outcome(program, sandbox.Limits(seconds=10.0)) == (True, "")


def test_a_machine_that_cannot_keep_a_program_in_is_told_so(monkeypatch):
    monkeypatch.setattr(inside, "landlock_version", lambda: 0)
    sandbox.walls.cache_clear()
    with pytest.raises(ConfigError, match=r"cannot be run safely on this machine: its kernel has no Landlock"):
        sandbox.walls()
    sandbox.walls.cache_clear()
