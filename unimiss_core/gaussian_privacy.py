"""Epsilon of Gaussian releases over everybody, in closed form: nothing is drawn, so nothing need be approximated.

T releases of sensitivity C, each with noise z C, tell as much as one whose sensitivity is mu = sqrt(T) / z times its
noise (Dong, Roth and Su 2019, arXiv:1905.02383, corollaries 2.13 and 3.3), and of that one

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)

(Balle and Wang 2018, arXiv:1805.06530, theorem 8), also where each release was chosen by what came of those before.
Sites work out the same by Opacus (`client.accounting`), at most 0.2% above it; the coordinator has no Opacus.
"""

import math
from collections.abc import Callable

LARGEST = 100.0
"""Epsilon above which there is no privacy worth telling, and e^epsilon would leave what a float holds."""


def gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Of `releases` with this noise each, rounded up in its last bits; infinite above LARGEST."""
    mu = math.sqrt(releases) / noise_multiplier
    if mu == 0:
        return 0.0
    if gaussian_delta(LARGEST, mu) > delta:
        return math.inf
    return _least(lambda epsilon: gaussian_delta(epsilon, mu) <= delta, LARGEST)


def in_words(epsilon: float) -> str:
    """What `gaussian_epsilon` told."""
    return f"epsilon {epsilon:.3g}" if epsilon <= LARGEST else f"an epsilon above {LARGEST:g}, which promises nothing,"


def gaussian_noise_for(epsilon: float, releases: int, delta: float) -> float:
    """The least noise multiplier with which `releases` cost at most this epsilon, which is LARGEST at most."""
    spread = _least(lambda spread: gaussian_delta(epsilon, 1 / spread) <= delta, 1 / delta)  # delta(0) < 0.4 mu
    return spread * math.sqrt(releases)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta at this epsilon. Raises OverflowError: epsilon is above 709."""
    return _phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * _phi(-mu / 2 - epsilon / mu)


def _phi(x: float) -> float:
    """Chance that a standard normal is below x; in its lower tail without the loss of 1 - ..."""
    return math.erfc(-x / math.sqrt(2)) / 2


def _least(holds: Callable[[float], bool], high: float) -> float:
    """The least value up to `high` for which this holds, as it does from there on; rounded up in its last bits."""
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
