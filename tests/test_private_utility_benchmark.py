"""What `benchmarks/private_utility.py` claims of its arms before any of them trains: noise, clip, lengths of steps."""

import math
from pathlib import Path

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from benchmarks.private_utility import ARMS, CENTRE, DELTA, _noise_for, _options, _site, _study
from client.site import Site
from client.site_config import DataSource
from unimiss_core.network import tensors_of
from unimiss_core.private_learner import PrivateLearner

STEPS, RATE = 20, 0.25
NAMED = {arm.name: arm for arm in ARMS}


@pytest.mark.parametrize("name", ["epsilon-8", "epsilon-1"])
def test_an_arms_noise_is_the_least_that_keeps_its_epsilon(name: str) -> None:
    """By Google's accountant, of gradients and centre as one release."""
    options, arm = _options(["--steps", str(STEPS)]), NAMED[name]
    noise = _noise_for(options, arm, RATE)
    joint = 1 / math.hypot(1 / noise, 1 / CENTRE["reconstruction"][0])
    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(RATE, GaussianDpEvent(joint)), STEPS))
    assert accountant.get_epsilon(DELTA) == pytest.approx(arm.epsilon, rel=0.01)


def test_arms_are_clipped_or_not_and_never_between_noise_and_optimiser() -> None:
    options = _options(["--clip-norm", "7"])
    for arm in ARMS:
        study = _study(options, arm=arm, rate=RATE, noise=2.0)
        assert study.privacy.mode == "patient"
        assert (study.privacy.clip_norm == 7.0) == (arm.name != "no-clip")
        assert study.optimiser.clip_norm is None
        assert study.optimiser.name == arm.optimiser
        assert study.privacy.trained == arm.trained


def test_every_step_is_of_radiographs(tmp_path: Path) -> None:
    """Steps of a rank that no scan here has would be noise alone, and the arms learn from fewer than they say."""
    options = _options([])
    site = _site(options, tmp_path / "state", DataSource(folder=tmp_path))
    private = _study(options, arm=NAMED["epsilon-8"], rate=RATE, noise=2.0)
    assert Site(site.config, private, site.run).ranks == {2}


def test_optimisers_step_alike_where_there_is_nothing_but_noise() -> None:
    """So that what they gain tells how they see a signal, not how far they go."""
    options, lengths = _options(["--steps", "40"]), {}
    for name in ("epsilon-8", "epsilon-8-noise-aware", "epsilon-8-momentum"):
        running = PrivateLearner(_study(options, arm=NAMED[name], rate=RATE, noise=2.0), ranks={2})
        before = {n: t.clone() for n, t in tensors_of(running.student).items()}
        for step in range(20):
            running.private_step([], rank=2, step=step)
        after = tensors_of(running.student)
        moved = [after[n] - before[n] for n in running.trained_names(2, 0)]
        lengths[name] = torch.cat([each.flatten() for each in moved]).norm().item()
    plain = lengths.pop("epsilon-8")
    assert all(0.5 < length / plain < 1.5 for length in lengths.values()), (plain, lengths)


def test_an_arm_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _options(["--arms", "epsilon-7"])
    assert "invalid choice: 'epsilon-7'" in capsys.readouterr().err
    assert _options(["--arms", "clip"]).arms == [NAMED["clip"]]
