"""σ_t against the paper's formula."""

import math

import pytest

from flatlora.perturb.schedule import RAMPS, sigma_at


def test_cosine_is_the_papers_formula():
    for t in range(101):
        assert sigma_at(t, 100, 0.05) == pytest.approx(0.05 * 0.5 * (1 - math.cos(math.pi * t / 100)))


@pytest.mark.parametrize(("ramp", "values"), [("linear", [0, 0.5, 1, 1]), ("constant", [1, 1, 1, 1])])
def test_other_ramps(ramp, values):
    assert [sigma_at(t, 10, 1.0, ramp) for t in (0, 5, 10, 15)] == values


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_never_fall_and_end_at_sigma(ramp):
    strengths = [sigma_at(t, 37, 0.3, ramp) for t in range(38)]
    assert strengths == sorted(strengths)
    assert strengths[-1] == pytest.approx(0.3)
