"""At the ends of what a study may set, accountants answer, or refuse in words, without hanging or filling memory."""

import functools
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size

from client import accounting
from client.accounting import (
    FEW_POINTS,
    MOST_KINDS,
    MOST_POINTS,
    _divergences,
    _fewer_kinds,
    check_study,
    epsilon,
    epsilon_by_renyi,
)
from client.ledger import Ledger
from client.site_config import PatientLimits
from server.site_level import site_epsilon
from tests.federation import small_study
from tests.test_ledger import asked, charge
from unimiss_core.errors import ConfigError
from unimiss_core.gaussian_privacy import gaussian_noise_for
from unimiss_core.privacy import Mechanism
from unimiss_core.privacy_config import SitePrivacyConfig
from unimiss_core.study import StudyConfig

PATIENT: dict[str, Any] = {"mode": "patient", "max_epsilon": 8.0, "noise_multiplier": 1.0, "centre_noise": 5.0}
FIT = {"batch": {"images": 10**9, "volumes": 10**9}, "aggregation": {"max_size_ratio": None}}


def study_of(privacy: dict[str, Any], rounds: int = 2, local_steps: int = 2) -> StudyConfig:
    length = {"schedule": {"rounds": rounds, "local_steps": local_steps}, "optimiser": {"warmup_steps": 0}}
    return small_study(privacy=privacy, **length, **FIT)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"noise_multiplier": 0.00999},
            r"'privacy\.noise_multiplier': .* greater than or equal to 0\.01, got 0\.00999",
        ),
        ({"noise_multiplier": 1e-200}, r"'privacy\.noise_multiplier': .* 0\.01, got 1e-200"),
        ({"noise_multiplier": 1001.0}, r"'privacy\.noise_multiplier': .* less than or equal to 1000, got 1001\.0"),
        ({"centre_noise": 1e160}, r"'privacy\.centre_noise': .* less than or equal to 1000, got 1e\+160"),
        ({"clip_norm": 1.3e-45}, r"'privacy\.clip_norm': .* greater than or equal to 0\.000001, got 1\.3e-45"),
        ({"clip_norm": 1e38}, r"'privacy\.clip_norm': .* less than or equal to 1000000, got 1e\+38"),
        ({"sampling_rate": {"images": 9e-7}}, r"'privacy\.sampling_rate\.images': .* or equal to 0\.000001, got 9e-07"),
    ],
)
def test_what_lies_outside_is_refused_in_one_message(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^test: 1 problem\n  - {told}$"):
        study_of({**PATIENT, **changes})


@pytest.mark.parametrize(("rounds", "local_steps"), [(10**6 + 1, 1), (1, 10**6 + 1)])
def test_a_study_without_end_is_refused(rounds: int, local_steps: int) -> None:
    with pytest.raises(ConfigError, match="less than or equal to 1000000, got 1000001"):
        study_of(PATIENT, rounds, local_steps)


def test_what_was_charged_outside_of_today_s_bounds_stays_readable(tmp_path: Path) -> None:
    """By an older version; or by two noises of 0.01 together, which are worth one of 0.007."""
    ledger = Ledger(tmp_path, PatientLimits(), lambda history, _: float(len(history)))
    charge(ledger, asked(), [Mechanism(0.005, 1e-9, 2), Mechanism(1e7, 1.0, 3)])
    assert ledger.site_account().spent == 2.0


# --------------------------------------------------------------------------------------------- all that a study may be


def points_of(history: list[tuple[float, float, int]], error: float, delta: float) -> float:
    """Of PRV's grid: 2 L / h, by Opacus' own L and the h of theorem 5.5 of arXiv:2106.02848."""
    prvs = [PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in history]
    steps = [taken for _, _, taken in history]
    reach = compute_safe_domain_size(prvs, steps, error, delta / 1000)
    return float(2 * reach * math.sqrt(sum(steps) * math.log(12_000 / delta) / 2) / error)


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The points of every grid that is asked for, none of which is made."""
    monkeypatch.setattr(rdp, "_compute_rdp", functools.cache(rdp._compute_rdp))  # Opacus asks for each again and again
    asked_for: list[float] = []

    def get_epsilon(self: Any, delta: float, eps_error: float) -> float:
        asked_for.append(points_of(self.history, eps_error, delta))
        return 0.9 * accounting.epsilon_by_renyi(
            [Mechanism(*each) for each in self.history], delta, orders=accounting._REACH_ORDERS
        )

    monkeypatch.setattr(accounting.PRVAccountant, "get_epsilon", get_epsilon)
    return asked_for


def exponents(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


NOISE, CHANCE = st.floats(-2, 2.999), st.floats(-6, 0)


def test_every_study_is_told_or_refused_on_grids_that_fit(grids: list[float]) -> None:
    """Whatever noise, chances, length, delta and limit; three answers on a large grid at most for the study as it is,
    three for the noise that would do, and few small ones between."""

    @given(NOISE, NOISE, CHANCE, CHANCE, st.floats(0, 6), st.floats(0, 6), st.floats(-8.99, -3.01), st.floats(-2, 2.5))
    @example(0.0, 2.9, math.log10(0.5), math.log10(0.5), 1.0, 1.0, -5.0, 0.5)  # a chance of 1/2: the slowest series
    @example(-2.0, -2.0, 0.0, 0.0, 6.0, 6.0, -5.0, 0.5)
    @example(2.999, 2.999, -6.0, -6.0, 6.0, 6.0, -8.99, -2.0)
    @settings(max_examples=3, deadline=None, derandomize=True)
    def told(
        noise: float, centre: float, q2: float, q3: float, rounds: float, steps: float, d: float, e: float
    ) -> None:
        grids.clear()
        rates = {"images": 10**q2, "volumes": 10**q3}
        noises = {"noise_multiplier": 10**noise, "centre_noise": 10**centre}
        promise = {"mode": "patient", "max_epsilon": 10**e, "delta": 10**d, "sampling_rate": rates, **noises}
        study = study_of(promise, int(10**rounds), int(10**steps))
        with suppress(ConfigError):
            check_study(study)
        large = [points for points in grids if points > FEW_POINTS * 1.001]
        assert len(large) <= 6
        assert max(large, default=0) <= MOST_POINTS * 1.001
        assert len(grids) <= 60

    told()


@pytest.mark.parametrize("history", [[Mechanism(1e3, 1e-6, 1)], [Mechanism(1e3, 0.1, 10), Mechanism(1e3, 0.2, 1)]])
def test_next_to_nothing_is_nothing_and_not_less(history: list[Mechanism]) -> None:
    assert 0.0 <= epsilon(history, 1e-5) <= 0.003


@given(exponents(-2, 3), st.integers(1, 10**6), exponents(-9, -3.01))
@settings(max_examples=100, deadline=None)
def test_the_closed_form_answers_everywhere(noise: float, rounds: int, delta: float) -> None:
    promise = SitePrivacyConfig(max_epsilon=1.0, clip_norm=1.0, noise_multiplier=noise, sites=5, delta=delta)
    assert site_epsilon(promise, rounds) >= 0
    for target in (1e-3, 1.0, 100.0):
        assert 0 < gaussian_noise_for(target, rounds, delta) < 1e9


KINDS = 400
"""Of noise and rate, as a coordinator that changes its study a little in every round leaves in a ledger."""


@pytest.fixture(scope="module")
def tiny() -> list[Mechanism]:
    return [Mechanism(1000.0 - 0.01 * number, 1e-3, 5) for number in range(KINDS)]


def test_as_many_kinds_of_release_as_will_are_told_as_tightly_as_the_costly_ones(tiny: list[Mechanism]) -> None:
    honest = [Mechanism(1.0, 0.01, 2000)]
    alone = epsilon(honest, 1e-5)
    began = time.process_time()
    together = epsilon([*tiny, *honest], 1e-5)
    assert time.process_time() - began < 10  # it took minutes, and more with each kind
    assert 0.999 * alone <= together <= 1.005 * alone


@pytest.mark.parametrize(
    ("releases", "too_high_at_most"),
    [
        ([Mechanism(3.0 + 1e-6 * number, 0.01, 100) for number in range(24)], 0.01),
        ([Mechanism(3.0 + 1e-6 * number, 0.01, 100) for number in range(25)], 0.01),  # was told as half as much again
        ([Mechanism(2.0 + number % 2, 0.02 + 1e-6 * number, 20) for number in range(26)], 0.01),  # of two ranks
        ([Mechanism(1.5 + 0.02 * number, 0.02, 20) for number in range(30)], 0.05),
        ([Mechanism(0.5 * 1.1**number, 1e-4 * 1.1**number, 40) for number in range(20)], 0.2),  # joined at great cost
    ],
    ids=["24 alike", "25 alike", "two sorts", "30 unlike", "20 of one price"],
)
def test_however_many_kinds_are_joined_what_is_told_is_a_bound(
    releases: list[Mechanism], too_high_at_most: float
) -> None:
    """Against Google's accountant, which composes them one by one, on its usual grid of 1e-4 where a hundredth is to be
    seen; on one half as fine its answer is higher by 4e-4 of itself at most."""
    accountant = PLDAccountant(value_discretization_interval=min(2e-4, too_high_at_most / 100))
    for each in releases:
        event = PoissonSampledDpEvent(each.sampling_rate, GaussianDpEvent(each.noise_multiplier))
        accountant.compose(event, each.steps)
    exact = accountant.get_epsilon(1e-5)
    assert 0.9995 * exact <= epsilon(releases, 1e-5) <= (1 + too_high_at_most) * exact


def kinds_of(most: int) -> st.SearchStrategy[list[Mechanism]]:
    kind = st.builds(Mechanism, exponents(-1, 1), exponents(-4, 0), st.integers(1, 100))
    return st.lists(kind, min_size=1, max_size=most)


@pytest.mark.parametrize(
    "cheap", [Mechanism(0.14, 1e-6, 1), Mechanism(0.12, 1e-6, 1), Mechanism(0.25, 1e-6, 2), Mechanism(0.1, 1e-7, 9)]
)
def test_a_release_that_delta_covers_makes_no_other_dearer(cheap: Mechanism) -> None:
    """Its Renyi divergences are endless nearly, and of them a share would buy joining all that is honest."""
    honest = [Mechanism(1.0, 0.02, 500), Mechanism(3.0, 0.02, 4000)]
    assert epsilon([cheap], 1e-5) < 0.1
    assert epsilon([cheap, *honest], 1e-5) < epsilon(honest, 1e-5) + 0.1


def test_nothing_is_told_above_the_bound_for_which_nothing_is_joined() -> None:
    history = [
        Mechanism(0.6744572634864814, 5.146476179285298e-05, 4),
        Mechanism(0.17894165058789654, 0.06207891439488128, 1),
        Mechanism(0.13282187037192708, 3.52596240330623e-05, 57),
    ]
    delta = 0.00014118645662484505
    assert epsilon(history, delta) <= epsilon_by_renyi(history, delta)


@given(kinds_of(40))
@settings(max_examples=100, deadline=None)
def test_what_kinds_are_joined_to_costs_as_much_at_least(releases: list[Mechanism]) -> None:
    """By every Renyi divergence, which is exact for each; and as many steps are told as were taken."""
    joined = _fewer_kinds(releases)
    assert len(joined) <= MOST_KINDS
    assert sum(each.steps for each in joined) == sum(each.steps for each in releases)
    for order in (2, 16, 63):
        costs = [
            sum(each.steps * _divergences(each.noise_multiplier, each.sampling_rate, (order,))[0] for each in kinds)
            for kinds in (releases, joined)
        ]
        assert costs[0] <= costs[1] * (1 + 1e-9)
