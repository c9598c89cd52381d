"""FedEMA: where a site's round starts from, at a site that is new, comes back, missed a round or lost its memory."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from client.site import Site
from client.trainer import run_round
from tests.federation import small_study
from tests.test_trainer import assert_same_reply, first_round, killed, request_of, site_with_pictures, steps_taken
from unimiss_core import progress
from unimiss_core.divergence import divergence_aware_start
from unimiss_core.learner import Learner
from unimiss_core.network import build_network, tensors_of
from unimiss_core.study import StudyConfig
from unimiss_core.wire import TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")

TAU = 0.6
SHAPES = {"backbone.stem.2d.weight": (3, 5), "backbone.norm.bias": (7,), "head.mlp.weight": (4, 3)}
SCALE = "divergence_scale"


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def encoder_distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """By NumPy, over all values of the encoder end to end."""
    names = [name for name in one if not name.startswith("head.")]
    flat = [np.concatenate([each[name].numpy().astype(np.float64).ravel() for name in names]) for each in (one, other)]
    return float(np.sqrt(((flat[0] - flat[1]) ** 2).sum()))


def assert_mixed(start: Mapping[str, Tensor], received: Mapping[str, Tensor], own: Mapping[str, Tensor], mu: float):  # type: ignore[no-untyped-def]
    assert start.keys() == received.keys()
    for name, tensor in start.items():
        expected = mu * own[name].numpy().astype(np.float64) + (1 - mu) * received[name].numpy().astype(np.float64)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_first_return_makes_the_scale_and_later_ones_keep_it() -> None:
    received, own = tensors(0), tensors(1)
    first = divergence_aware_start(received, own, tau=TAU, scale=None)
    assert first.scale == pytest.approx(TAU / encoder_distance(received, own))
    assert first.own_share == pytest.approx(TAU)
    assert_mixed(first.student, received, own, TAU)
    nearer = {name: received[name] + (own[name] - received[name]) / 3 for name in own}
    second = divergence_aware_start(received, nearer, tau=TAU, scale=first.scale)
    assert (second.scale, second.own_share) == (first.scale, pytest.approx(TAU / 3))
    assert_mixed(second.student, received, nearer, TAU / 3)


def test_the_share_is_measured_on_the_encoder_and_mixes_the_head_too() -> None:
    received, own = tensors(0), tensors(1)
    other_head = {**own, "head.mlp.weight": own["head.mlp.weight"] + 100}
    start = divergence_aware_start(received, other_head, tau=TAU, scale=0.1)
    assert start.own_share == divergence_aware_start(received, own, tau=TAU, scale=0.1).own_share
    assert_mixed(start.student, received, other_head, start.own_share)


def test_a_site_far_from_the_others_starts_from_its_own_student() -> None:
    received, own = tensors(0), tensors(1)
    start = divergence_aware_start(received, own, tau=TAU, scale=100.0)
    assert start.own_share == 1.0
    assert all(torch.equal(tensor, own[name]) for name, tensor in start.student.items())


def test_students_that_do_not_differ_leave_the_scale_for_a_later_round() -> None:
    received = tensors(0)
    start = divergence_aware_start(received, dict(received), tau=TAU, scale=None)
    assert (start.student, start.own_share, start.scale) == (received, 0.0, None)
    assert divergence_aware_start(received, dict(received), tau=TAU, scale=2.0).scale == 2.0


# -- at a site ---------------------------------------------------------------------------------------------------------

STUDY = small_study(5, batch={"images": 3}, local={"divergence_scale": TAU})


def global_student(study: StudyConfig, seed: int) -> dict[str, Tensor]:
    """The first round's student a little moved, as by the updates of others."""
    first, other = (tensors_of(build_network(study.model, seed=one, ranks={2})) for one in (0, seed))
    return {name: first[name] + 0.01 * other[name] for name in first}


def later_round(round: int, study: StudyConfig = STUDY) -> TrainRequest:
    """With the teacher, which a site that missed a round could not rebuild."""
    student = global_student(study, round)
    return request_of(round, study=study, student=student, teacher=global_student(study, 100 + round))


def trained_to(site: Site, round: int) -> dict[str, Tensor]:
    """What the site's disk holds for its student after `round`."""
    memory = site.memory.before(round + 1)
    assert memory is not None
    assert memory.round == round
    start = "student/"
    return {name.removeprefix(start): tensor for name, tensor in memory.tensors.items() if name.startswith(start)}


def scale_of(site: Site, round: int) -> float | None:
    memory = site.memory.before(round + 1)
    assert memory is not None
    scale: float | None = memory.facts[SCALE]
    return scale


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The student that each round starts from."""
    seen: list[dict[str, Tensor]] = []
    start_round = Learner.start_round

    def watched(learner: Learner, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        seen.append({name: tensor.clone() for name, tensor in student.items()})
        start_round(learner, student, teacher)

    monkeypatch.setattr(Learner, "start_round", watched)
    return seen


def assert_started_at(start: Mapping[str, Tensor], request: TrainRequest) -> None:
    assert start.keys() == request.student.keys()
    assert all(torch.equal(start[name], tensor) for name, tensor in request.student.items())


def assert_update_is_trained_minus_received(reply: TrainReply, site: Site, request: TrainRequest) -> None:
    trained = trained_to(site, request.round)
    assert reply.update.keys() == trained.keys()
    assert all(torch.equal(reply.update[name], trained[name] - request.student[name]) for name in trained)


def test_a_site_that_comes_back_starts_between_the_students(tmp_path: Path, starts: list[dict[str, Tensor]]) -> None:
    site = site_with_pictures(tmp_path, STUDY)
    new = run_round(site, first_round(STUDY))
    assert (new.diagnostics["own_share"], scale_of(site, 1)) == (0.0, None)
    assert_started_at(starts[-1], first_round(STUDY))

    own, request = trained_to(site, 1), later_round(2)
    back = run_round(site, request)
    scale = TAU / encoder_distance(request.student, own)
    assert back.diagnostics["own_share"] == pytest.approx(TAU)
    assert scale_of(site, 2) == pytest.approx(scale)
    assert_mixed(starts[-1], request.student, own, TAU)
    assert_update_is_trained_minus_received(back, site, request)

    own, request = trained_to(site, 2), later_round(3)
    again = run_round(site, request)
    mu = min(scale * encoder_distance(request.student, own), 1.0)
    assert again.diagnostics["own_share"] == pytest.approx(mu)
    assert scale_of(site, 3) == scale_of(site, 2)
    assert_mixed(starts[-1], request.student, own, mu)
    assert_same_reply(run_round(site, request), again)  # asked again by a coordinator that was killed


def test_a_site_that_missed_a_round_starts_from_the_received_student_and_keeps_its_scale(
    tmp_path: Path, starts: list[dict[str, Tensor]]
) -> None:
    site = site_with_pictures(tmp_path, STUDY)
    for request in (first_round(STUDY), later_round(2)):
        run_round(site, request)
    scale = scale_of(site, 2)
    assert run_round(site, later_round(4)).diagnostics["own_share"] == 0.0
    assert_started_at(starts[-1], later_round(4))
    own, request = trained_to(site, 4), later_round(5)
    assert scale is not None
    mu = min(scale * encoder_distance(request.student, own), 1.0)
    assert run_round(site, request).diagnostics["own_share"] == pytest.approx(mu)
    assert scale_of(site, 5) == scale
    assert_mixed(starts[-1], request.student, own, mu)


def test_a_site_that_lost_its_memory_is_as_a_new_one(tmp_path: Path, starts: list[dict[str, Tensor]]) -> None:
    site = site_with_pictures(tmp_path, STUDY)
    for request in (first_round(STUDY), later_round(2)):
        run_round(site, request)
    shutil.rmtree(tmp_path / "state")
    lost = run_round(site_with_pictures(tmp_path, STUDY), later_round(3))
    assert (lost.diagnostics["own_share"], scale_of(site, 3)) == (0.0, None)
    assert_started_at(starts[-1], later_round(3))
    assert run_round(site, later_round(4)).diagnostics["own_share"] == pytest.approx(TAU)


def test_without_the_option_no_own_student_is_kept_and_nothing_is_told(tmp_path: Path) -> None:
    plain = small_study(5, batch={"images": 3})
    site, other = site_with_pictures(tmp_path / "a", plain), site_with_pictures(tmp_path / "b", STUDY)
    off, new = run_round(site, first_round(plain)), run_round(other, first_round(STUDY))
    assert trained_to(site, 1) == {}
    assert new.diagnostics.pop("own_share") == 0.0  # type: ignore[attr-defined]
    assert_same_reply(replace(new, study_digest=off.study_digest), off)


BOTH = small_study(
    2,
    batch={"images": 2},
    schedule={"rounds": 2, "local_steps": 6},
    local={"proximal": 0.5, "divergence_scale": TAU},
)


def test_a_site_killed_in_the_middle_of_a_round_under_both_options_ends_bit_identical(tmp_path: Path) -> None:
    unbroken, broken = (
        site_with_pictures(tmp_path / name, BOTH, 3, checkpoint_minutes=minutes)
        for name, minutes in (("a", 10), ("b", 0))
    )
    for site in (unbroken, broken):
        run_round(site, first_round(BOTH))
    expected = run_round(unbroken, later_round(2, BOTH))
    killed(broken, later_round(2, BOTH))
    reply, steps = steps_taken(broken, later_round(2, BOTH))
    assert steps == [5, 6]
    assert reply.diagnostics["own_share"] == pytest.approx(TAU)
    assert reply.diagnostics["global_distance"] > 0
    assert_same_reply(reply, expected)
    kept, held = broken.memory.before(3), unbroken.memory.before(3)
    assert kept is not None
    assert held is not None
    assert kept.facts == held.facts
    assert kept.tensors.keys() == held.tensors.keys()
    assert all(torch.equal(tensor, held.tensors[name]) for name, tensor in kept.tensors.items())


def test_an_unfinished_round_whose_start_is_lost_begins_anew(tmp_path: Path) -> None:
    site = site_with_pictures(tmp_path, BOTH, 3, checkpoint_minutes=0)
    run_round(site, first_round(BOTH))

    def stop(event: progress.Event) -> None:
        if isinstance(event, progress.StepDone) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), progress.listen(stop):
        run_round(site, later_round(2, BOTH))
    assert site.memory.unfinished(2) is not None
    (kept,) = (tmp_path / "state").rglob("round-0001.safetensors")
    kept.unlink()
    reply, steps = steps_taken(site, later_round(2, BOTH))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert reply.diagnostics["own_share"] == 0.0


def test_the_distance_to_the_received_student_is_the_mean_over_the_rounds_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a round that starts from a mixture: it is measured from what was received."""
    site, request, distances = site_with_pictures(tmp_path, BOTH, 3), later_round(2, BOTH), []
    run_round(site, first_round(BOTH))
    step = Learner.step

    def watched(learner: Learner, *given: object, **named: object):  # type: ignore[no-untyped-def]
        now = tensors_of(learner.student)
        apart = torch.cat([(now[name] - request.student[name]).flatten() for name in now])
        distances.append(apart.double().norm().item())
        return step(learner, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "step", watched)
    reply = run_round(site, request)
    assert distances[0] > 0
    assert reply.diagnostics["global_distance"] == pytest.approx(sum(distances) / 6, rel=1e-5)
