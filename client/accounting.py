"""What noise is worth: epsilon of a site's releases, by Opacus' accountants.

The number is the PRV accountant's (Gopi, Lee and Wutschitz 2021, arXiv:2106.02848), a tight numerical composition.
Beside it stands the older bound by Renyi divergences (Mironov 2017, arXiv:1702.07476), which is looser and never fails.
Both speak of Poisson draws and of adding or removing one unit: a patient, or a whole site.

Across sites: nobody is at two of them, it is assumed. Then each patient pays for one site's releases alone, and the
study's epsilon is the largest of any site (parallel composition). Where a patient is at two sites, the two add up.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from opacus.accountants import PRVAccountant, RDPAccountant

from unimiss_core.errors import ConfigError
from unimiss_core.privacy import Mechanism, mechanisms
from unimiss_core.privacy_config import PatientPrivacyConfig, SitePrivacyConfig
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

LARGEST = 100.0
"""Epsilon above which the answer is that there is no privacy: PRV would need gigabytes to tell 100 from 1,000."""

_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 96, 128, 192, 256, 512, 1024]
"""Of the Renyi divergences among which the best is taken; small epsilons need large ones."""

ALL_RANKS: tuple[frozenset[Rank], ...] = (frozenset({2}), frozenset({3}), frozenset({2, 3}))
"""What a site may hold."""


def epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """Of all these releases together, by PRV; 0 where there are none.

    Raises ConfigError: it is above LARGEST by the Renyi bound, so that it is not worth working out.
    """
    taken = [each for each in history if each.steps > 0]
    if not taken:
        return 0.0
    if not (bound := epsilon_by_renyi(taken, delta)) <= LARGEST:
        raise ConfigError(
            f"epsilon of these releases is {bound:.3g} at most, above {LARGEST:g}: that promises nothing. Raise "
            "noise_multiplier and centre_noise, or lower sampling_rate, rounds or local_steps"
        )
    accountant = PRVAccountant()
    accountant.history = [tuple(each) for each in taken]
    with _unwarned():
        return float(accountant.get_epsilon(delta))


def epsilon_by_renyi(history: Sequence[Mechanism], delta: float) -> float:
    """The bound beside it; 0 where there are no releases."""
    taken = [each for each in history if each.steps > 0]
    if not taken:
        return 0.0
    accountant = RDPAccountant()
    accountant.history = [tuple(each) for each in taken]
    with _unwarned():
        return float(accountant.get_epsilon(delta, alphas=_ORDERS))


def study_history(study: StudyConfig, ranks: frozenset[Rank]) -> list[Mechanism]:
    """Everything that a site with scans of `ranks` releases in the whole study; in mode `site`, what is released of it.

    Raises ValueError: the study promises nothing.
    """
    if isinstance(study.privacy, SitePrivacyConfig):
        return [Mechanism(study.privacy.noise_multiplier, 1.0, study.schedule.rounds)]
    return mechanisms(study, ranks, range(1, study.schedule.rounds + 1))


def check_study(study: StudyConfig) -> None:
    """Raises ConfigError: the study's noise does not keep its own `max_epsilon`, at a site that holds both ranks or
    either."""
    privacy = study.privacy
    if not isinstance(privacy, PatientPrivacyConfig | SitePrivacyConfig):
        return
    worst = max(epsilon(study_history(study, ranks), privacy.delta) for ranks in ALL_RANKS)
    if worst > privacy.max_epsilon:
        raise ConfigError(
            f"study '{study.name}': its noise comes to epsilon {worst:.3g} at delta {privacy.delta:g}, above "
            f"privacy.max_epsilon={privacy.max_epsilon:g}. `unimiss plan-privacy` says what noise would do"
        )


def smallest_noise(reached: Callable[[float], float], target: float, *, tolerance: float = 0.01) -> float:
    """The least multiplier with which `reached(multiplier)`, falling, is at most `target`; above it by `tolerance` of
    itself at most. Raises ConfigError: no multiplier up to 10,000 does."""
    high = 1.0
    while not _meets(reached, high, target):
        high *= 2
        if high > 10_000:
            raise ConfigError(f"no noise multiplier up to 10000 reaches epsilon {target:g}; ask for fewer steps")
    low = high / 2
    while low > 1e-3 and _meets(reached, low, target):
        low, high = low / 2, low
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _meets(reached, middle, target) else (middle, high)
    return high


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without Opacus' warnings: of logarithms of zero at the ends of PRV's grid, which it means, and of a best order at
    the end of a list, where a longer one could only tighten a bound that holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _meets(reached: Callable[[float], float], multiplier: float, target: float) -> bool:
    try:
        return reached(multiplier) <= target
    except ConfigError:  # beyond all that can be told
        return False
