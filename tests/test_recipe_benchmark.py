"""What `benchmarks/recipe.py` says of its runs: intervals and verdicts, on made-up runs."""

import math
import sys

import pytest
from scipy.stats import ttest_1samp

from benchmarks.recipe import Gain, Run, _options, gain_lines, nano, over_seeds, verdict_lines, with_reconstruction
from unimiss_core.config import parse
from unimiss_core.study import StudyConfig, UniMiSSConfig, UniMiSSPlusConfig


def run(seed: int = 0, **changes: float) -> Run:
    """One that passes by a little, but for what is changed."""
    found = {"target": 0.89, "mean": 0.51, "nih": 0.06, "adrenal": 0.06, "minutes": 19.9} | changes
    return Run(
        seed=seed,
        cpu_s=60 * found["minutes"],
        wall_s=1.0,
        entropies={
            "target_entropy_image": 0.3,
            "mean_target_entropy_image": 0.95,
            "target_entropy_slices": found["target"],
            "mean_target_entropy_slices": found["mean"],
        },
        gains={
            "nih-pneumonia": Gain(0.5, 0.5 + found["nih"], (0.01, 0.11)),
            "adrenal": Gain(0.6, 0.6 + found["adrenal"], (0.02, 0.10)),
            "hippocampus": Gain(0.6, 0.5, (-0.2, 0.0)),
        },
    )


def test_a_recipe_that_meets_every_demand_passes_whatever_the_tasks_beside_say() -> None:
    assert [line.split()[0] for line in verdict_lines([run(), run(1)])] == ["PASS"] * 5


@pytest.mark.parametrize(
    ("changes", "failing"),
    [({"target": 0.91}, 0), ({"mean": 0.49}, 1), ({"nih": 0.01}, 2), ({"adrenal": 0.01}, 3), ({"minutes": 20.1}, 4)],
)
def test_one_seed_that_misses_a_demand_fails_it_alone(changes: dict[str, float], failing: int) -> None:
    verdicts = [line.split()[0] for line in verdict_lines([run(), run(1, **changes)])]
    assert verdicts == ["FAIL" if place == failing else "PASS" for place in range(5)]


def test_the_gain_asked_for_is_that_of_the_mean_over_seeds() -> None:
    lines = list(verdict_lines([run(adrenal=0.02), run(1, adrenal=0.09)]))
    assert lines[3] == "PASS  gain of at least 0.05 AUC in 3D: adrenal +0.055"


def test_the_interval_over_seeds_is_that_of_the_t_test() -> None:
    gains = [0.069, 0.014, 0.011]
    expected = ttest_1samp(gains, 0.0).confidence_interval(0.95)
    assert over_seeds(gains) == pytest.approx((expected.low, expected.high))
    assert over_seeds([0.1]) == (-math.inf, math.inf)


def test_every_task_is_told_with_its_floor_and_every_seed_with_its_interval() -> None:
    lines = list(gain_lines([run(), run(1)], {"adrenal": 0.69, "hippocampus": 0.77}))
    assert lines[0].startswith("adrenal: floor 0.690; AUC 0.600 before, 0.660 after; gain +0.060 [")
    assert lines[2] == "    seed 1: 0.600 to 0.660, +0.060 [+0.020, +0.100] over patients"
    assert len(lines) == 6


@pytest.mark.parametrize(("steps", "refused"), [(2, True), (100, True), (101, False)])
def test_steps_that_the_warm_up_would_use_up_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: int, refused: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "--steps", str(steps)])
    if not refused:
        assert _options().steps == steps
        return
    with pytest.raises(SystemExit):
        _options()
    assert "give more than nano's warm-up of 100 steps" in capsys.readouterr().err


def test_the_other_objective_is_the_same_study_with_its_published_weights() -> None:
    plain, plus = (parse(StudyConfig, nano(1200, name), where="nano") for name in ("unimiss", "unimiss_plus"))
    assert isinstance(plain.objective, UniMiSSConfig)
    assert isinstance(plus.objective, UniMiSSPlusConfig)
    assert plus.objective == UniMiSSPlusConfig(
        teacher_temperature=plain.objective.teacher_temperature,
        volume_teacher_temperature=plain.objective.volume_teacher_temperature,
        teacher_momentum=plain.objective.teacher_momentum,
    )
    changed = {"objective": plus.objective, "model": plain.model.model_copy(update={"reconstruction": True})}
    assert plus == plain.model_copy(update=changed)
    assert with_reconstruction(nano(None), reconstruction_weight=7.0)["objective"]["reconstruction_weight"] == 7.0
