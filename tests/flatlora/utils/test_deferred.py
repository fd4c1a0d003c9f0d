"""Values and times that are read later are those of the moment at which they were taken."""

import time

import pytest
import torch

from flatlora.utils.deferred import HostCopy, Moment

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_of_its_time(device):
    value = torch.ones(3, device=device)
    copy = HostCopy(value)
    value.zero_()
    assert copy.tolist() == [1.0, 1.0, 1.0]
    assert HostCopy(torch.tensor(True, device=device)).tolist() is True


def test_seconds_between_moments():
    first = Moment(torch.device("cpu"))
    time.sleep(0.02)
    second = Moment(torch.device("cpu"))
    assert first.reached
    assert 0.02 <= first.seconds_to(second) < 5
    assert first.seconds_to(second) == -second.seconds_to(first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_neither_waits_for_the_device():
    device = torch.device("cuda")
    torch.cuda.synchronize()
    first = Moment(device)
    torch.cuda._sleep(2_000_000_000)  # about a second
    copy, second = HostCopy(torch.ones(1, device=device)), Moment(device)
    assert not second.reached
    assert copy.tolist() == [1.0]
    assert first.seconds_to(second) > 0.1
