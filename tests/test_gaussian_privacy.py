"""The closed form against a published value, an integral and two accountants that share no code with it."""

import math

import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.integrate import quad
from scipy.stats import norm

from client.accounting import epsilon
from unimiss_core.gaussian_privacy import LARGEST, gaussian_delta, gaussian_epsilon, gaussian_noise_for
from unimiss_core.privacy import Mechanism

DELTA = 1e-5


def test_it_is_the_published_one() -> None:
    """z = 4, 100 rounds: the design's section 2.2, 'exact GDP'."""
    assert gaussian_epsilon(4.0, 100, DELTA) == pytest.approx(13.207, abs=5e-4)


@pytest.mark.parametrize(("of", "mu"), [(0.5, 0.3), (3.0, 1.0), (13.2, 2.5)])
def test_delta_is_what_one_density_exceeds_the_other_by(of: float, mu: float) -> None:
    """Integral of max(0, p - e^epsilon q) for p = N(mu, 1) and q = N(0, 1), which is positive from one point on."""
    cross = of / mu + mu / 2
    exceeds, _ = quad(lambda x: norm.pdf(x - mu) - math.exp(of) * norm.pdf(x), cross, cross + 30, epsabs=1e-14)
    assert gaussian_delta(of, mu) == pytest.approx(exceeds, rel=1e-6)


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 10), (2.0, 50), (4.0, 100), (8.0, 100), (32.0, 300), (1.0, 1)])
def test_both_accountants_tell_the_same(noise: float, rounds: int) -> None:
    """Sites refuse by Opacus: never less than this, and by half of a hundredth more at most."""
    ours, theirs = gaussian_epsilon(noise, rounds, DELTA), epsilon([Mechanism(noise, 1.0, rounds)], DELTA)
    assert ours <= theirs <= 1.005 * ours
    by_loss = PLDAccountant()
    by_loss.compose(SelfComposedDpEvent(GaussianDpEvent(noise), rounds))
    assert ours == pytest.approx(by_loss.get_epsilon(DELTA), rel=2e-3)


@pytest.mark.parametrize("target", [0.01, 1.0, 8.0, LARGEST])
def test_the_least_noise_meets_its_target_and_no_less_does(target: float) -> None:
    least = gaussian_noise_for(target, 100, DELTA)
    assert gaussian_epsilon(least * (1 + 1e-9), 100, DELTA) <= target < gaussian_epsilon(least * 0.999, 100, DELTA)


def test_nothing_costs_nothing_and_too_much_is_not_told() -> None:
    assert gaussian_epsilon(1.0, 0, DELTA) == 0.0
    assert gaussian_epsilon(0.1, 100, DELTA) == math.inf
