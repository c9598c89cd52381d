import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.federation import small_study
from tests.labelled_hospitals import task_study
from unimiss_core.groups import GROUPS
from unimiss_core.optimiser_config import AdamWConfig
from unimiss_core.scan import Rank
from unimiss_core.schedule import (
    learning_rate,
    rank_of_step,
    steps_of_rank,
    steps_of_round,
    teacher_momentum,
    teacher_retention,
    total_steps,
    trained_steps,
    untaught,
    weight_decay,
)
from unimiss_core.study import ScheduleConfig, StudyConfig, UniMiSSConfig

STUDY = StudyConfig(
    name="toy",
    optimiser=AdamWConfig(lr=2e-3, final_lr=1e-5, warmup_steps=8, weight_decay=(0.04, 0.4)),
    objective=UniMiSSConfig(teacher_momentum=(0.9, 1.0)),
    schedule=ScheduleConfig(rounds=5, local_steps=7, alternate=(2, 1)),
)
LAST = total_steps(STUDY.schedule) - 1


def test_rounds_count_from_one_and_hold_every_step_once() -> None:
    steps = [step for number in range(1, 6) for step in steps_of_round(STUDY.schedule, number)]
    assert steps == list(range(35))


def test_the_rate_rises_linearly_and_falls_by_a_cosine() -> None:
    warm = [learning_rate(STUDY, step) for step in range(8)]
    assert warm == pytest.approx([2e-3 * (step + 1) / 8 for step in range(8)])
    assert learning_rate(STUDY, 8) == pytest.approx(2e-3)
    assert learning_rate(STUDY, (8 + LAST) // 2) == pytest.approx((2e-3 + 1e-5) / 2, rel=0.1)
    assert learning_rate(STUDY, LAST) == pytest.approx(1e-5)
    assert learning_rate(STUDY, LAST + 100) == pytest.approx(1e-5)


def test_no_warm_up_and_only_warm_up_are_possible() -> None:
    none = STUDY.model_copy(update={"optimiser": AdamWConfig(lr=2e-3, warmup_steps=0)})
    assert learning_rate(none, 0) == pytest.approx(2e-3)
    whole = STUDY.model_copy(update={"optimiser": AdamWConfig(lr=2e-3, warmup_steps=35)})
    assert learning_rate(whole, LAST) == pytest.approx(2e-3)


def test_weight_decay_and_teacher_momentum_go_from_their_first_to_their_second_value() -> None:
    assert (weight_decay(STUDY, 0), weight_decay(STUDY, LAST)) == pytest.approx((0.04, 0.4))
    assert (teacher_momentum(STUDY, 0), teacher_momentum(STUDY, LAST)) == pytest.approx((0.9, 1.0))
    momenta = [teacher_momentum(STUDY, step) for step in range(LAST + 1)]
    assert momenta == sorted(momenta)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [({2}, [2] * 7), ({3}, [3] * 7), ({2, 3}, [2, 2, 3, 2, 2, 3, 2])],
)
def test_a_site_takes_the_ranks_it_has_in_the_stated_ratio(ranks: set[Rank], expected: list[Rank]) -> None:
    assert [rank_of_step(ranks, step, (2, 1)) for step in range(7)] == expected


def test_a_site_without_scans_has_no_rank() -> None:
    with pytest.raises(ValueError, match="without scans"):
        rank_of_step((), 0, (1, 1))


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 12), st.integers(1, 8), st.integers(0, 6))
def test_steps_are_counted_as_if_one_went_through_them(
    alternate: tuple[int, int], local_steps: int, start: int, rounds: int
) -> None:
    schedule = ScheduleConfig(rounds=20, local_steps=local_steps, alternate=alternate)
    some = range(start, start + rounds)
    steps = [step for round in some for step in steps_of_round(schedule, round)]
    both: set[Rank] = {2, 3}
    for ranks in (both, {2}, {3}):
        taken = [rank_of_step(ranks, step, alternate) for step in steps]
        for rank in both:
            assert steps_of_rank(rank, ranks, schedule, some) == taken.count(rank)
    assert steps_of_rank(2, both, schedule, range(5, 3)) == 0


def test_steps_are_counted_per_group() -> None:
    assert trained_steps({2}, STUDY.schedule, 2) == {"shared": 7, "2d": 7, "3d": 0, "head": 7}
    assert trained_steps({3}, STUDY.schedule, 2) == dict.fromkeys(GROUPS, 7)
    # Round 2 is steps 7 to 13, of which 8 and 11 are 3D.
    assert trained_steps({2, 3}, STUDY.schedule, 2) == {"shared": 7, "2d": 7, "3d": 2, "head": 7}


def test_teacher_retention_is_what_an_ema_leaves_of_its_start() -> None:
    left = dict.fromkeys(GROUPS, 1.0)
    for step in range(7, 14):
        for group in GROUPS:
            if group != "3d" or step in {8, 11}:
                left[group] *= teacher_momentum(STUDY, step)
    assert teacher_retention(STUDY, {2, 3}, 2) == pytest.approx(left)
    assert teacher_retention(STUDY, {2}, 2)["3d"] == 1.0
    assert math.isclose(teacher_retention(STUDY, {3}, 2)["3d"], left["shared"])


@pytest.mark.parametrize(
    ("alternate", "rounds", "told"),
    [((6, 5), 3, True), ((5, 5), 3, False), ((1, 1), 3, False), ((3, 1), 1, True), ((1, 9), 1, False)],
)
def test_a_study_that_trains_no_volume_at_a_site_with_both_is_told(
    alternate: tuple[int, int], rounds: int, told: bool
) -> None:
    study = small_study(schedule={"rounds": rounds, "local_steps": 2, "alternate": alternate})
    assert told == (3 not in {rank_of_step({2, 3}, step, alternate) for step in range(2 * rounds)})
    assert told == (untaught(study) is not None)


def test_a_task_is_of_one_rank_and_lacks_no_turn() -> None:
    assert untaught(task_study()) is None
