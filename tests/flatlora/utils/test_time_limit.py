"""Work that takes for ever ends, and nothing of the limit is left behind."""

import re
import signal
import threading
import time

import pytest

from flatlora.utils.time_limit import in_time, time_limit


def test_a_regular_expression_is_given_up():
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0.1 s"), time_limit(0.1):
        re.fullmatch(r"(a+)+b", "a" * 64)
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_quick_is_let_be():
    with time_limit(5):
        assert re.fullmatch("a+", "aaa")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_threads_have_no_limit():
    done = []

    def work():
        with time_limit(0.01):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_work_in_another_thread_has_a_limit_a_result_and_errors():
    done = threading.Event()
    with pytest.raises(TimeoutError, match=r"more than 0.1 s"):
        in_time(done.wait, 0.1)
    done.set()
    assert in_time(lambda: threading.current_thread().daemon, 5.0)  # it keeps no process from ending
    with pytest.raises(KeyError, match="x"):
        in_time(lambda: {}["x"], 5.0)
