"""What paired differences over seeds can show: p-values corrected for several tests, and the detectable difference."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import optimize, stats

POWER = 0.8
LEVEL = 0.05


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) for testing all of these: rejecting p ≤ α keeps the family-wise error ≤ α.

    The i-th smallest of m p-values becomes max over j ≤ i of (m − j + 1) p_j, at most 1.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def power(difference: float, std: float, count: int) -> float:
    """Probability that the two-sided paired t-test at 5 % finds a true difference.

    Args:
        std: standard deviation of the paired differences.
        count: number of pairs.
    """
    freedom, shift = count - 1, difference / std * count**0.5
    critical = stats.t.ppf(1 - LEVEL / 2, freedom)
    return float(stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift))


def smallest_detectable(std: float, count: int) -> float:
    """The smallest true difference that the test finds with 80 % probability; arguments as for `power`."""
    highest = count**-0.5
    while power(highest, 1.0, count) < POWER:  # far above, SciPy's noncentral t is NaN
        highest *= 1.5
    return std * optimize.brentq(lambda ratio: power(ratio, 1.0, count) - POWER, 0.0, highest, xtol=1e-9)
