"""Copies on the host, and errors of the thread that writes them."""

import threading

import pytest
import torch

from flatlora.train.saving import BackgroundWriter, to_host


def test_a_copy_is_of_its_moment_and_keeps_what_is_one():
    weight = torch.arange(6.0).view(2, 3)
    value = {"state": {0: {"moment": weight, "step": 3}}, "tied": [weight, weight.t()], "groups": ({"lr": 0.1},)}
    copied = to_host(value)
    weight.zero_()
    assert copied["state"][0]["moment"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["tied"][0] is copied["state"][0]["moment"]
    assert copied["tied"][1].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (copied["state"][0]["step"], copied["groups"]) == (3, ({"lr": 0.1},))


def test_work_is_done_one_after_the_other_and_an_error_is_raised_once():
    writer, gate, done = BackgroundWriter(), threading.Event(), []
    writer.start(lambda: done.append(gate.wait(10)))
    writer.check()
    assert done == []
    gate.set()
    writer.start(lambda: (_ for _ in ()).throw(OSError("no space left")))
    assert done == [True]
    with pytest.raises(OSError, match="no space left"):
        writer.wait()
    writer.wait()
    writer.start(lambda: done.append("again"))
    writer.join()
    assert done == [True, "again"]
