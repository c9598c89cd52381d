"""What noise is worth: epsilon of a site's releases, by Opacus' accountants.

The number is the PRV accountant's (Gopi, Lee and Wutschitz 2021, arXiv:2106.02848), a tight numerical composition.
Beside it stands the older bound by Renyi divergences (Mironov 2017, arXiv:1702.07476), which is looser and never fails.
Both speak of Poisson draws and of adding or removing one unit: a patient, or a whole site.

Across sites: nobody is at two of them, it is assumed. Then each patient pays for one site's releases alone, and the
study's epsilon is the largest of any site (parallel composition). Where a patient is at two sites, the two add up.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.prv import Domain
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from unimiss_core.errors import ConfigError
from unimiss_core.privacy import Mechanism, mechanisms
from unimiss_core.privacy_config import PatientPrivacyConfig, SitePrivacyConfig
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

LARGEST = 100.0
"""Epsilon above which the answer is that there is no privacy: PRV would need gigabytes to tell 100 from 1,000."""

SMALLEST_DELTA = 1e-9
"""Below it the rounding errors of PRV's Fourier transforms, 1e-16 at each of millions of points, are no longer small
beside delta."""

FINE, COARSE = 0.002, 0.01
"""Shares of epsilon that PRV's answer may be too high by: what is asked for, and what is put up with."""

FINEST = 0.001
"""What it may be too high by however small epsilon is: less would take the largest grids to tell next to nothing."""

MOST_POINTS = 2**22
"""Of the grid that PRV works on: 165 bytes each at most, measured, so 0.7 GB, and 1.5 us, so 6 s."""

WEAK = 0.1
"""Patients, on average, that delta may allow to be given away whole."""

MOST_KINDS = 8
"""Of releases, by noise and rate, that PRV is asked about: each takes two transforms of the whole grid."""

ALIKE = 0.005
"""Share of all costs that may be added to them so that PRV is asked about fewer kinds than there are. Costs are those
of squares, so that epsilon grows by half of it, about."""

FEW_POINTS = 2**18
"""Likewise, where many answers are asked for in a search."""

_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 96, 128, 192, 256, 512, 1024]
"""Of the Renyi divergences among which the best is taken; small epsilons need large ones."""

_PLACES = {order: place for place, order in enumerate(_ORDERS)}

_WHOLE_ORDERS = [order for order in _ORDERS if order == int(order)]
"""Looser where epsilon is large, and faster, the more so for chances near 1/2."""

_REACH_ORDERS = [order for order in RDPAccountant.DEFAULT_ALPHAS if order == int(order)]

ALL_RANKS: tuple[frozenset[Rank], ...] = (frozenset({2}), frozenset({3}), frozenset({2, 3}))
"""What a site may hold."""


def epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """Of all these releases together, by PRV, an upper bound; 0 where there are none.

    Releases that are alike are told as the dearer of them (`_fewer_kinds`), for PRV's time grows with the kinds, and a
    ledger keeps them for ever. Up to MOST_KINDS kinds this adds a few thousandths at most. More are joined whatever
    it adds, and where that is much, the Renyi bound is told, for which nothing is joined.

    Raises ConfigError, before anything large is allocated: epsilon is above LARGEST by the Renyi bound, so that it is
    not worth working out; or delta is below SMALLEST_DELTA; or the grid of a usable answer would exceed MOST_POINTS.
    """
    taken = [each for each in history if each.steps > 0]
    if not taken:
        return 0.0
    kinds = _fewer_kinds(taken)
    bounded = taken if len(kinds) == MOST_KINDS else kinds
    bound = _bound_worth_telling(bounded, delta, _ORDERS if len(bounded) <= MOST_KINDS else _WHOLE_ORDERS)
    return _by_prv(kinds, delta, bound, _error_that_fits(kinds, delta, bound, MOST_POINTS))


def _fewer_kinds(taken: Sequence[Mechanism]) -> Sequence[Mechanism]:
    """At most MOST_KINDS kinds of release, which tell of a patient whatever `taken` does.

    Two kinds become one, of the smaller noise and the larger rate: whoever sees its releases can make either's of them,
    by adding noise, and by putting noise alone in the place of some. Joined are neighbours, by rate to a tenth and then
    by noise, those first that add least to the cost. Up to MOST_KINDS a pair is joined only where that adds little to
    its own cost, too: of a release with hardly any noise and a tiny rate the cost is next to endless, though delta
    covers it, and a share of that would make any other as dear.
    """
    ordered = sorted(taken, key=lambda each: (round(10 * math.log(each.sampling_rate)), each.noise_multiplier))
    noise, rate, steps = np.array(ordered, dtype=np.float64).T
    spare = ALIKE * _costs(noise, rate, steps).sum()
    while len(noise) > 1:
        alone = _costs(noise, rate, steps)
        joined = np.minimum(noise[1:], noise[:-1]), np.maximum(rate[1:], rate[:-1]), steps[1:] + steps[:-1]
        apart = alone[1:] + alone[:-1]
        added = _costs(*joined) - apart
        few = len(noise) <= MOST_KINDS
        least = int(np.where(added <= ALIKE * apart, added, math.inf).argmin() if few else added.argmin())
        spare -= added[least]
        if few and (spare < 0 or added[least] > ALIKE * apart[least]):
            break
        pairs = zip((noise, rate, steps), joined, strict=True)
        noise, rate, steps = (np.r_[each[:least], both[least], each[least + 2 :]] for each, both in pairs)
    return [Mechanism(float(s), float(q), int(n)) for s, q, n in zip(noise, rate, steps, strict=True)]


def _costs(noise: NDArray[np.float64], rate: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """What releases add to the square of epsilon, roughly: the central limit's mu^2 (Bu et al. 2020, arXiv:1911.11607).
    Where it is beyond e^500 epsilon is not told anyway."""
    return np.asarray(steps * rate**2 * np.expm1(np.minimum(noise**-2, 500.0)))


def _quickly(history: Sequence[Mechanism], delta: float, enough: float) -> float:
    """As `epsilon`, or the Renyi bound: where that is `enough` already, and where PRV would take seconds."""
    taken = [each for each in history if each.steps > 0]
    if (bound := _bound_worth_telling(taken, delta, _WHOLE_ORDERS)) <= enough:
        return bound
    try:
        return _by_prv(taken, delta, bound, _error_that_fits(taken, delta, bound, FEW_POINTS))
    except ConfigError:
        return bound


def _bound_worth_telling(taken: Sequence[Mechanism], delta: float, orders: Sequence[float]) -> float:
    """Epsilon by Renyi. Raises ConfigError: it is above LARGEST, or delta below SMALLEST_DELTA."""
    if delta < SMALLEST_DELTA:
        raise ConfigError(f"delta={delta:g} is below {SMALLEST_DELTA:g}, where epsilon cannot be told; raise delta")
    if not (bound := epsilon_by_renyi(taken, delta, orders=orders)) <= LARGEST:
        raise ConfigError(
            f"epsilon of these releases is {bound:.3g} at most, above {LARGEST:g}: that promises nothing. Raise "
            "noise_multiplier and centre_noise, or lower sampling_rate, rounds or local_steps"
        )
    return bound


def _by_prv(taken: Sequence[Mechanism], delta: float, bound: float, error: float) -> float:
    """By PRV, `error` too high at most, or by Renyi (`bound`): both hold."""
    accountant = _QuickPRV()
    accountant.history = [tuple(each) for each in taken]
    with _unwarned():
        try:
            found = float(accountant.get_epsilon(delta, eps_error=error))
        except (ArithmeticError, RuntimeError, ValueError):  # the grid misses what is there to be told
            found = math.inf
    return max(0.0, min(found, bound))  # of next to nothing, rounding leaves less than nothing


class _QuickPRV(PRVAccountant):  # type: ignore[misc]  # Opacus has no annotations
    """Opacus', with its own grid. That is laid by Renyi divergences, of which Opacus works out each twice, in most of
    the time that an answer takes; here they are known from the bound."""

    def _get_domain(self, *, eps_error: float, delta_error: float, **_: object) -> Domain:
        taken = [Mechanism(*each) for each in self.history]
        steps = sum(each.steps for each in taken)
        reach = max(_largest_losses(taken, delta_error, RDPAccountant.DEFAULT_ALPHAS), eps_error) + 3
        return Domain.create_aligned(-reach, reach, eps_error / np.sqrt(steps * np.log(12 / delta_error) / 2))


def _largest_losses(taken: Sequence[Mechanism], beyond: float, orders: Sequence[float]) -> float:
    """Beyond which the losses of all releases, and of each, lie with a chance that PRV may leave out of account, a
    share of `beyond` (arXiv:2106.02848, remark 5.6)."""
    steps = sum(each.steps for each in taken)
    alone = [[each._replace(steps=1)] for each in taken]
    return max(
        epsilon_by_renyi(taken, beyond / 4, orders=orders),
        *(epsilon_by_renyi(each, beyond / (8 * steps), orders=orders) for each in alone),
    )


def _error_that_fits(taken: Sequence[Mechanism], delta: float, bound: float, most: int) -> float:
    """What PRV's epsilon may be too high by. Its grid has 2 L / h points, L covering all losses that matter (Opacus'
    compute_safe_domain_size, here of whole orders alone, which makes it no smaller) and
    h = error / sqrt(steps log(12 / delta_error) / 2) (arXiv:2106.02848, theorem 5.5); finer is larger.

    most: points that the grid may have. Raises ConfigError: not even COARSE fits.
    """
    beyond, steps = delta / 1000, sum(each.steps for each in taken)  # Opacus' own delta_error
    reach = 3 + _largest_losses(taken, beyond, _REACH_ORDERS)
    points = 2 * reach * math.sqrt(steps * math.log(12 / beyond) / 2)  # for an error of 1
    error = max(FINE * bound, FINEST, points / most)
    if not error <= COARSE * max(1.0, bound):
        raise ConfigError(
            f"epsilon of {steps:,} steps with noise as small as {min(each.noise_multiplier for each in taken):.3g} "
            f"would take a grid of {points / (COARSE * max(1.0, bound)):.2g} points to tell, above {most:.2g}. "
            "Raise noise_multiplier and centre_noise, or lower rounds or local_steps"
        )
    return error


def epsilon_by_renyi(history: Sequence[Mechanism], delta: float, *, orders: Sequence[float] = tuple(_ORDERS)) -> float:
    """The bound beside it; 0 where there are no releases. orders: some of _ORDERS."""
    taken = [each for each in history if each.steps > 0]
    if not taken:
        return 0.0
    spent = sum(each.steps * _divergences(each.noise_multiplier, each.sampling_rate, orders) for each in taken)
    with _unwarned():
        return float(get_privacy_spent(orders=list(orders), rdp=spent, delta=delta)[0])


def _divergences(noise_multiplier: float, sampling_rate: float, orders: Sequence[float]) -> NDArray[np.float64]:
    """Renyi divergences of one step, which add up over steps, of some of _ORDERS."""
    known, places = _known_divergences(noise_multiplier, sampling_rate), [_PLACES[order] for order in orders]
    if missing := [place for place in places if np.isnan(known[place])]:
        asked = [_ORDERS[place] for place in missing]
        with _unwarned():
            known[missing] = compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=asked)
    return known[places]


@lru_cache(maxsize=2**14)
def _known_divergences(noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:  # noqa: ARG001 - the key
    """Of each order, NaN until it is worked out: milliseconds for all of them, and a ledger asks in every round."""
    return np.full(len(_ORDERS), np.nan)


def delta_is_weak(delta: float, patients: int) -> str | None:
    """In words, where delta lets a patient be given away: above a tenth of one over the patients. None elsewhere.

    A mechanism that publishes everything of one patient in a thousand, drawn at random, has epsilon 0 at delta 1e-3.
    """
    if delta * patients <= WEAK:
        return None
    return (
        f"delta {delta:g} is weak for {patients:,} patients: the promise would also be kept by giving away everything "
        f"of {delta * patients:.2g} of them, on average; expected at most {WEAK / patients:.2g}, a tenth of one over "
        "the patients"
    )


def study_history(study: StudyConfig, ranks: frozenset[Rank]) -> list[Mechanism]:
    """Everything that a site with scans of `ranks` releases in the whole study; in mode `site`, what is released of it.

    Raises ValueError: the study promises nothing.
    """
    if isinstance(study.privacy, SitePrivacyConfig):
        return site_history(study.privacy, study.schedule.rounds)
    return mechanisms(study, ranks, range(1, study.schedule.rounds + 1))


def site_history(privacy: SitePrivacyConfig, rounds: int) -> list[Mechanism]:
    """Every site takes part in every round: nothing is drawn, nothing amplified, and the number of sites is no help."""
    return [Mechanism(privacy.noise_multiplier, 1.0, rounds)]


def site_epsilon(privacy: SitePrivacyConfig, rounds: int) -> float:
    """What a whole site pays for `rounds` releases of the coordinator. Raises ConfigError, as `epsilon` does."""
    return epsilon(site_history(privacy, rounds), privacy.delta)


def study_epsilon(study: StudyConfig) -> float:
    """What the study costs a patient at the worst kind of site, or a site; of the study it is the maximum over sites,
    if nobody is at two. Raises ConfigError, as `epsilon` does; ValueError: the study promises nothing."""
    return max(epsilon(history, _promise(study).delta) for history in _kinds(study))


def check_study(study: StudyConfig) -> None:
    """Raises ConfigError: the study's noise does not keep its own `max_epsilon`, at a site that holds both ranks or
    either. Says which noise would."""
    if study.privacy.mode == "none":
        return
    promise = _promise(study)
    try:
        worst = study_epsilon(study)
    except ConfigError as error:
        raise ConfigError(f"study '{study.name}': {error}{_way_out(study)}") from None
    if worst > promise.max_epsilon:
        raise ConfigError(
            f"study '{study.name}': its noise comes to epsilon {worst:.3g} at delta {promise.delta:g}, above "
            f"privacy.max_epsilon={promise.max_epsilon:g}{_way_out(study)}"
        )


def noise_for(study: StudyConfig, target: float) -> float:
    """The least `privacy.noise_multiplier` with which the study costs at most `target` at every kind of site, all else
    as it stands. Raises ConfigError: none does, as when the centre's noise alone costs more."""
    delta = _promise(study).delta

    def worst(noise: float, told: Callable[[Sequence[Mechanism], float], float]) -> float:
        """Of the kinds of site; of the first that is above the target, where one is."""
        privacy = study.privacy.model_copy(update={"noise_multiplier": noise})
        kinds = _kinds(study.model_copy(update={"privacy": privacy}))
        costs: list[float] = []
        while kinds and max(costs, default=0.0) <= target:
            costs.append(told(kinds.pop(), delta))
        return max(costs)

    def quickly(history: Sequence[Mechanism], delta: float) -> float:
        return _quickly(history, delta, target)

    if study.privacy.mode == "patient" and _or_infinity(partial(worst, told=quickly), math.inf) > target:
        _require_centres_below(target, _or_infinity(partial(worst, told=epsilon), math.inf))
    enough = 1.0
    with suppress(ConfigError):  # epsilons so small that only PRV can tell them
        enough = smallest_noise(partial(worst, told=partial(epsilon_by_renyi, orders=_WHOLE_ORDERS)), target)
    found = smallest_noise(partial(worst, told=quickly), target, known=enough)
    if _or_infinity(partial(worst, told=epsilon), found) > target:  # the grid may be too large even of this
        raise ConfigError(f"no noise_multiplier is known to reach epsilon {target:g}; ask for fewer steps")
    return found


def _require_centres_below(target: float, free: float) -> None:
    """free: epsilon of the centres alone. Raises ConfigError: it is above the target, whatever the gradients' noise."""
    if free > target:
        told = f"{free:.3g}" if free < math.inf else "more than can be told"
        raise ConfigError(
            f"no noise_multiplier reaches epsilon {target:g}: the centres alone come to {told}; raise centre_noise"
        )


def _promise(study: StudyConfig) -> PatientPrivacyConfig | SitePrivacyConfig:
    if not isinstance(study.privacy, PatientPrivacyConfig | SitePrivacyConfig):
        raise ValueError("the study promises no privacy")
    return study.privacy


def _kinds(study: StudyConfig) -> list[list[Mechanism]]:
    """The history of each kind of site that there may be."""
    kinds = [ranks for ranks in ALL_RANKS if ranks.issubset(study.ranks)]
    return [study_history(study, ranks) for ranks in (kinds if study.privacy.mode == "patient" else kinds[:1])]


def _way_out(study: StudyConfig) -> str:
    """The end of a sentence: what would keep the study's promise."""
    limit = _promise(study).max_epsilon
    try:
        return f". privacy.noise_multiplier: {_rounded_up(noise_for(study, limit)):g} would do"
    except ConfigError as error:
        return f"; {error}"


def _rounded_up(noise: float) -> float:
    """To three figures: more noise, never less."""
    step = 10.0 ** (math.floor(math.log10(noise)) - 2)
    return math.ceil(noise / step) * step


def smallest_noise(
    reached: Callable[[float], float], target: float, *, tolerance: float = 0.01, known: float = 1.0
) -> float:
    """The least multiplier with which `reached(multiplier)`, falling, is at most `target`; above it by `tolerance` of
    itself at most. known: where to begin, best a multiplier that does. Raises ConfigError: none up to 10,000 does."""
    high = known
    while _or_infinity(reached, high) > target:
        high *= 2
        if high > 10_000:
            raise ConfigError(f"no noise multiplier up to 10000 reaches epsilon {target:g}; ask for fewer steps")
    low = high / 2
    while low > 1e-3 and _or_infinity(reached, low) <= target:
        low, high = low / 2, low
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _or_infinity(reached, middle) <= target else (middle, high)
    return high


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without Opacus' warnings: of logarithms of zero at the ends of PRV's grid, which it means, and of a best order at
    the end of a list, where a longer one could only tighten a bound that holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _or_infinity(reached: Callable[[float], float], multiplier: float) -> float:
    """The epsilon reached; infinity where it is beyond all that can be told."""
    try:
        return reached(multiplier)
    except ConfigError:
        return math.inf
