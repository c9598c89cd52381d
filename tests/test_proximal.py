"""FedProx's term: the gradient of mu/2 ||w - w_received||^2, once a step, and only where the step trains."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.test_learner import apart, assert_same, copied, everything, images, in_float64, study, volumes
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.groups import group_of
from unimiss_core.learner import Learner
from unimiss_core.network import build_network, tensors_of
from unimiss_core.objective import UniMiSS
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig
from unimiss_core.team import Alone, Team


def near(proximal: float, **optimiser: object) -> StudyConfig:
    raw = study(**optimiser).model_dump(mode="json")
    return parse(StudyConfig, {**raw, "local": {"proximal": proximal}}, where="test")


def received(ranks: set[Rank]) -> dict[str, Tensor]:
    """A global student that is neither the learner's student nor its teacher."""
    return copied(tensors_of(build_network(study().model, seed=2, ranks=ranks)))


def drawn_to(tensors: dict[str, Tensor], study: StudyConfig, *, ranks: set[Rank], team: Team | None = None) -> Learner:
    learner = in_float64(apart(Learner(study, ranks=ranks, team=team)))
    learner.stay_near({name: tensor.double() for name, tensor in tensors.items()})
    return learner


def first_gradients(learner: Learner) -> dict[str, Tensor]:
    """After a first step: Adam's first moment is (1 - 0.9) times the gradient that it was given."""
    start = "adam_moment1."
    found = {name: tensor for name, tensor in learner.state().tensors.items() if name.startswith(start)}
    return {name.removeprefix(start): tensor / 0.1 for name, tensor in found.items()}


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("mu", [0.01, 3.0])
def test_the_gradient_is_that_of_the_loss_plus_the_term_then_clipped(mu: float, clip: float | None) -> None:
    goal = received({2})
    learner = drawn_to(goal, near(mu, clip_norm=clip), ranks={2})
    oracle = in_float64(apart(Learner(study(), ranks={2})))
    parameters = dict(oracle.student.named_parameters())
    loss = UniMiSS(learner.study.objective)(oracle.student, oracle.teacher, images().double(), oracle.centre)
    squared = sum((parameters[name] - tensor.double()).pow(2).sum() for name, tensor in goal.items())
    torch.autograd.backward(loss.total + mu / 2 * squared)

    report = learner.step(images().double(), step=0)

    assert report.total == pytest.approx(loss.total.item())
    taken = first_gradients(learner)
    assert taken.keys() == parameters.keys()
    norms = []
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        norms.append(parameter.grad.norm().item())
        scale = 1.0 if clip is None else min(1.0, clip / (norms[-1] + 1e-6))
        torch.testing.assert_close(taken[name], scale * parameter.grad, rtol=1e-7, atol=1e-12)
    assert report.diagnostics["grad_norm"] == pytest.approx(math.hypot(*norms))
    assert isinstance(squared, Tensor)
    assert report.diagnostics["global_distance"] == pytest.approx(squared.sqrt().item())


def test_a_round_that_starts_from_the_received_student_is_not_pulled_in_its_first_step() -> None:
    plain, drawn = apart(Learner(study(), ranks={2})), apart(Learner(near(3.0), ranks={2}))
    drawn.stay_near(copied(tensors_of(drawn.student)))
    expected, report = plain.step(images(), step=0), drawn.step(images(), step=0)
    assert report.diagnostics.pop("global_distance") == 0
    assert report == expected
    # Last bits apart: where nothing pulls, the norm that clips the prototypes' gradient is found without making it.
    torch.testing.assert_close(everything(drawn), everything(plain), rtol=1e-5, atol=1e-10)
    drawn.step(images(1), step=1)
    plain.step(images(1), step=1)
    assert any(not torch.equal(tensors_of(drawn.student)[name], own) for name, own in tensors_of(plain.student).items())


def test_a_mu_of_nought_changes_no_bit_and_reports_nothing() -> None:
    plain, off = apart(Learner(study(), ranks={2, 3})), apart(Learner(near(0.0), ranks={2, 3}))
    off.stay_near(received({2, 3}))
    for step, batch in enumerate((images(), volumes())):
        assert off.step(batch, step=step) == plain.step(batch, step=step)
    assert_same(everything(off), everything(plain))


def test_what_a_step_does_not_train_is_not_pulled() -> None:
    learner = drawn_to(received({2, 3}), near(3.0, freeze_prototypes_steps=1), ranks={2, 3})
    before = copied(tensors_of(learner.student))
    learner.step(images().double(), step=0)
    still = {name for name, tensor in tensors_of(learner.student).items() if torch.equal(tensor, before[name])}
    untrained = {name for name in before if group_of(name) == "3d"} | {"head.prototypes.weight"}
    assert still == untrained
    assert first_gradients(learner).keys() == before.keys() - untrained


def test_a_strong_term_keeps_the_student_nearer_to_the_received_one() -> None:
    distance = {}
    for mu in (0.0, 30.0):
        learner = apart(Learner(near(mu, lr=3e-3, warmup_steps=0), ranks={2}))
        start = copied(tensors_of(learner.student))
        learner.stay_near(start)
        for step in range(6):
            learner.step(images(step), step=step)
        moved = [(tensor - start[name]).norm() for name, tensor in tensors_of(learner.student).items()]
        distance[mu] = torch.stack(moved).norm().item()
    assert distance[30.0] < 0.7 * distance[0.0]


class Twins(Alone):
    """Two processes of which each has the same half: a sum is twice one's own."""

    size = 2

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def test_a_team_and_parts_of_a_batch_are_pulled_once() -> None:
    goal, batch = received({2}), images(scans=4).double()
    alone = drawn_to(goal, near(3.0), ranks={2})
    expected = alone.step(batch, step=0)
    team = drawn_to(goal, near(3.0), ranks={2}, team=Twins())
    assert team.step(batch, step=0, share=0.5) == expected
    assert_same(everything(team), everything(alone))
    parts = drawn_to(goal, near(3.0), ranks={2})
    parts.micro_batch = {2: 1}
    assert parts.step(batch, step=0).diagnostics == pytest.approx(expected.diagnostics, rel=1e-9)
    for name, gradient in first_gradients(alone).items():
        torch.testing.assert_close(first_gradients(parts)[name], gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    "wrong", [{"proximal": -0.1}, {"divergence_scale": 0.0}, {"divergence_scale": 1.5}, {"proximl": 0.1}]
)
def test_options_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"local.{next(iter(wrong))}"):
        parse(StudyConfig, {"name": "x", "local": wrong}, where="")


def test_a_study_without_the_options_keeps_the_digest_it_had_before_there_were_any() -> None:
    plain = parse(StudyConfig, {"name": "x"}, where="")
    off = parse(StudyConfig, {"name": "x", "local": {"proximal": 0, "divergence_scale": None}}, where="")
    assert '"local":' not in plain.canonical()
    assert off.digest() == plain.digest()
    assert len({near(0.1).digest(), near(0.2).digest(), study().digest()}) == 3
