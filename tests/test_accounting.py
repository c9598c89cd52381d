"""Epsilon against an accountant that shares no code with ours, and settings that no accountant can tell."""

import math
import re
from collections.abc import Sequence

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from client import accounting
from client.accounting import (
    ALL_RANKS,
    LARGEST,
    check_study,
    delta_is_weak,
    epsilon,
    epsilon_by_renyi,
    noise_for,
    site_epsilon,
    smallest_noise,
    study_epsilon,
    study_history,
)
from tests.federation import small_study
from unimiss_core.errors import ConfigError
from unimiss_core.privacy import Mechanism, joint_multiplier
from unimiss_core.study import StudyConfig

DELTA = 1e-5


def by_loss_distribution(history: Sequence[Mechanism]) -> float:
    """Google's PLD accountant (Doroshenko et al. 2022)."""
    accountant = PLDAccountant()
    for noise, rate, steps in history:
        release = GaussianDpEvent(noise)
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, release) if rate < 1 else release, steps))
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "expected"),
    [
        (0.064, 1.0, 1000, 14.684),
        (0.032, 2.0, 5000, 5.514),
        (0.0128, 0.6, 1000, 9.246),
        (0.0102, 0.8, 20000, 15.610),
        (1.0, 4.0, 100, 13.207),
        (0.2, 1.0, 100, 14.528),
    ],
)
def test_it_is_the_independent_accountants_within_a_hundredth(
    rate: float, noise: float, steps: int, expected: float
) -> None:
    history = [Mechanism(noise, rate, steps)]
    found = epsilon(history, DELTA)
    assert found == pytest.approx(expected, rel=0.01)
    assert found == pytest.approx(by_loss_distribution(history), rel=0.01)
    assert found <= epsilon_by_renyi(history, DELTA) <= 1.2 * found


@pytest.mark.parametrize(
    "history",
    [
        [Mechanism(1.0, 0.064, 1000)],
        [Mechanism(4.0, 1.0, 100), Mechanism(1000.0, 1e-6, 10)],
        [Mechanism(1.0, 0.05, 400), Mechanism(2.0, 0.5, 100), Mechanism(0.8, 0.01, 50)],
    ],
)
@pytest.mark.parametrize("delta", [DELTA, 1e-9])
def test_what_is_known_of_the_grid_beforehand_changes_no_bit_of_the_answer(
    history: list[Mechanism], delta: float
) -> None:
    """Opacus lays the same grid by itself."""
    plain = accounting.PRVAccountant()
    plain.history = [tuple(each) for each in history]
    with accounting._unwarned():
        expected = plain.get_epsilon(delta, eps_error=0.05)
    assert accounting._by_prv(history, delta, math.inf, 0.05) == expected > 0


def test_phases_of_different_noise_and_rate_compose() -> None:
    history = [Mechanism(1.0, 0.05, 400), Mechanism(2.0, 0.2, 100), Mechanism(0.8, 0.01, 50)]
    found = epsilon(history, DELTA)
    assert found == pytest.approx(by_loss_distribution(history), rel=0.01)
    assert found == pytest.approx(epsilon(history[::-1], DELTA), rel=1e-3)


def test_a_joint_release_is_worth_what_both_are_one_after_the_other() -> None:
    """Of Gaussians over everybody, which is exact: mu^2 adds up."""
    together = [Mechanism(joint_multiplier(2.0, 3.0, 1), 1.0, 10)]
    apart = [Mechanism(2.0, 1.0, 10), Mechanism(3.0, 1.0, 10)]
    assert epsilon(together, DELTA) == pytest.approx(epsilon(apart, DELTA), rel=0.005)


@pytest.mark.parametrize(
    ("delta", "patients", "given_away"),
    [(1e-5, 10_000, None), (1e-5, 10_001, "0.1"), (1e-5, 200_000, "2"), (9e-4, 500, "0.45"), (1e-9, 10**6, None)],
)
def test_a_delta_near_one_over_the_patients_is_weak(delta: float, patients: int, given_away: str | None) -> None:
    told = delta_is_weak(delta, patients)
    if given_away is None:
        assert told is None
        return
    assert told is not None
    assert f"delta {delta:g} is weak for {patients:,} patients" in told
    assert f"giving away everything of {given_away} of them, on average" in told
    enough = float(re.search(r"expected at most ([0-9.e-]+),", told)[1])  # type: ignore[index]
    assert delta_is_weak(enough * 0.95, patients) is None


def test_of_no_releases_it_is_nothing() -> None:
    assert epsilon([], DELTA) == epsilon_by_renyi([], DELTA) == 0.0
    assert epsilon([Mechanism(1.0, 0.1, 0)], DELTA) == 0.0
    assert epsilon([Mechanism(1.0, 0.1, 0), Mechanism(1.0, 0.1, 9)], DELTA) == epsilon([Mechanism(1.0, 0.1, 9)], DELTA)


@pytest.mark.parametrize(
    "more", [Mechanism(0.9, 0.05, 100), Mechanism(1.0, 0.06, 100), Mechanism(1.0, 0.05, 120)], ids=["noise", "q", "T"]
)
def test_less_noise_more_chance_and_more_steps_cost_more(more: Mechanism) -> None:
    assert epsilon([more], DELTA) > epsilon([Mechanism(1.0, 0.05, 100)], DELTA)


@pytest.mark.parametrize(
    "hopeless", [Mechanism(0.1, 0.01, 20_000), Mechanism(0.02, 0.5, 10), Mechanism(1.0, 1.0, 10**6)]
)
def test_what_would_take_gigabytes_to_tell_is_refused_at_once(hopeless: Mechanism) -> None:
    with pytest.raises(ConfigError, match=f"above {LARGEST:g}: that promises nothing. Raise noise_multiplier"):
        epsilon([hopeless], DELTA)


@pytest.mark.parametrize(("target", "published"), [(1.0, 15.6), (3.0, 5.8), (8.0, 2.6)])
def test_the_least_noise_meets_its_target_and_little_less_does_not(target: float, published: float) -> None:
    """500 patients, 64 in a step, 1,000 steps: the design's section 2.3, whose epsilon is too high by 0.01."""

    def reached(noise: float) -> float:
        return epsilon([Mechanism(noise, 64 / 500, 1000)], DELTA)

    noise = smallest_noise(reached, target)
    assert reached(noise) <= target < reached(noise / 1.02)
    assert noise == pytest.approx(published, rel=0.03)


def test_a_target_that_no_noise_meets_is_told() -> None:
    with pytest.raises(ConfigError, match=r"no noise multiplier up to 10000 reaches epsilon 0\.5"):
        smallest_noise(lambda _: 1.0, 0.5)


def study(mode: str, **privacy: object) -> StudyConfig:
    return small_study(
        100,
        privacy={"mode": mode, "noise_multiplier": 4.0, **privacy},
        batch={"images": 256, "volumes": 256},
        aggregation={"max_size_ratio": None},
    )


def test_a_site_pays_for_every_round() -> None:
    """The design's section 2.4: z = 4, 100 rounds."""
    by_site = study("site", max_epsilon=20.0, clip_norm=1.0, sites=5)
    history = study_history(by_site, frozenset({2, 3}))
    assert history == [Mechanism(4.0, 1.0, 100)]
    assert epsilon(history, DELTA) == pytest.approx(13.2, abs=0.05)
    assert site_epsilon(by_site.privacy, 100) == epsilon(history, DELTA)
    check_study(by_site)


def test_what_is_exceeded_is_told_with_the_noise_that_would_do() -> None:
    def by_site(**changes: float) -> StudyConfig:
        return study("site", **{"max_epsilon": 8.0, "clip_norm": 1.0, "sites": 5, **changes})

    told = (
        r"comes to epsilon 13\.2 at delta 1e-05, above privacy\.max_epsilon=8\. .*noise_multiplier: ([0-9.]+) would do"
    )
    with pytest.raises(ConfigError, match=told) as caught:
        check_study(by_site())
    enough = float(re.search(told, str(caught.value))[1])
    check_study(by_site(noise_multiplier=enough))
    with pytest.raises(ConfigError, match="would do"):
        check_study(by_site(noise_multiplier=enough * 0.98))
    with pytest.raises(ConfigError, match=r"^study 'toy': .* promises nothing.*noise_multiplier: [0-9.]+ would do"):
        check_study(by_site(noise_multiplier=0.1))


def test_a_centre_that_costs_more_than_the_target_cannot_be_outdone() -> None:
    of = study("patient", max_epsilon=1.0, centre_noise=0.5)
    with pytest.raises(ConfigError, match=r"the centres alone come to [0-9.]+; raise centre_noise"):
        noise_for(of, 1.0)


def test_the_worst_kind_of_site_decides() -> None:
    of = study("patient", max_epsilon=100.0, sampling_rate={"images": 0.01, "volumes": 0.1})
    costs = [epsilon(study_history(of, ranks), DELTA) for ranks in ALL_RANKS]
    assert costs[0] < costs[2] < costs[1] == study_epsilon(of)
    check_study(of)
    check_study(small_study())


@pytest.mark.parametrize("few", [Mechanism(50.0, 0.001, 10), Mechanism(1.0, 1e-5, 1000), Mechanism(1000.0, 0.5, 1000)])
def test_little_is_told_as_little(few: Mechanism) -> None:
    """To a hundredth, not as the hundredth that the accountant adds."""
    exact = by_loss_distribution([few])
    assert exact - 1e-3 <= epsilon([few], DELTA) <= exact + 0.01


def test_what_would_not_fit_in_memory_is_refused_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting.PRVAccountant, "get_epsilon", None)
    with pytest.raises(
        ConfigError, match=r"1,000,000,000 steps .* would take a grid of [0-9.e+]+ points to tell, above"
    ):
        epsilon([Mechanism(1000.0, 0.05, 10**9)], DELTA)
    with pytest.raises(ConfigError, match="delta=1e-12 is below 1e-09"):
        epsilon([Mechanism(1.0, 0.05, 1000)], 1e-12)


def test_a_long_study_is_told_on_a_grid_that_fits() -> None:
    """100,000 steps, where an error of 0.01 would take 10 million points."""
    long = [Mechanism(1.0, 0.0128, 100_000)]
    assert epsilon(long, DELTA) == pytest.approx(35.78, rel=0.005)
