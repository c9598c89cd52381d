"""Patients worked out together give what they give alone."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.test_private_learner import CLIP, SIZES, Recorded, distance, learner, patient, study, ward
from unimiss_core.execution import Execution
from unimiss_core.network import Network
from unimiss_core.objective import Loss
from unimiss_core.patient_gradients import gradients_of_each, grouped
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

pytestmark = pytest.mark.usefixtures("shallow")  # each kind of layer, of some sizes


def study_of(objective: str, **changes: object) -> StudyConfig:
    model = {"prototypes": 16, "reconstruction": objective == "unimiss_plus"}
    return study(objective={"name": objective}, model=model, views={"image_size": SIZES[3][1:]}, **changes)


def taking(
    at_once: int, of: StudyConfig | None = None, *, double: bool = False, **execution: object
) -> tuple[PrivateLearner, Recorded, list[str]]:
    """A learner as if trained, that takes so many patients at once; the sums that it was given; what it told."""
    noise, told = Recorded(), []
    trained = learner(noise, of or study())
    made = PrivateLearner(
        trained.study,
        ranks={2, 3},
        noise=noise,
        execution=Execution(patients_at_once=at_once, **execution),  # type: ignore[arg-type]
        tell=told.append,
    )
    made.restore(replace(trained.state(weights=True)))
    if double:
        made.student.double()
        made.teacher.double()
        made.centre = {name: centre.double() for name, centre in made.centre.items()}
    return made, noise, told


@pytest.mark.parametrize("objective", ["unimiss", "unimiss_plus"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("scans", [1, 2])
def test_gradients_losses_and_what_was_seen_are_those_of_each_patient_alone(
    objective: str, rank: Rank, scans: int
) -> None:
    running, _, _ = taking(1, study_of(objective), double=True)
    names = running.trained_names(rank, 0)
    patients = torch.stack([patient(rank, scans, seed).double() for seed in range(3 if rank == 2 else 2)])
    found = gradients_of_each(running.student, running._loss_of, patients, names)
    for views, (loss, gradients) in zip(patients, found, strict=True):
        alone = running.objective(running.student, running.teacher, views, running.centre)
        expected = torch.autograd.grad(alone.total, [running.student.get_parameter(name) for name in names])
        length = math.sqrt(sum(g.square().sum().item() for g in expected))
        assert distance([gradients[name] for name in names], expected) <= 1e-9 * length
        torch.testing.assert_close(loss.total, alone.total.detach())
        torch.testing.assert_close(loss.terms, {name: term.detach() for name, term in alone.terms.items()})
        for name, seen in alone.observed.items():
            torch.testing.assert_close(vars(loss.observed[name]), vars(seen))


@pytest.mark.parametrize("rank", [2, 3])
def test_a_step_is_the_same_however_many_are_worked_out_together(rank: Rank) -> None:
    """Patients with one scan, two, three and sixteen, and more with one than are taken at once."""
    patients = [views.double() for views in (*ward(rank), *(patient(rank, 1, seed) for seed in range(20, 23)))]
    together, alone = (taking(at_once, double=True) for at_once in (3, 1))  # whose weights enlarge what is rounded
    reports = [made.private_step(iter(patients), rank=rank, step=0) for made, _, _ in (together, alone)]
    near = 1e-9
    for one, other in zip(together[1].sums, alone[1].sums, strict=True):
        assert distance(one, other) <= near * math.sqrt(sum(total.square().sum().item() for total in other))
    assert reports[0].total == pytest.approx(reports[1].total, rel=near)


def test_a_patient_moves_the_sum_no_further_than_its_bound_when_worked_out_with_others() -> None:
    patients = [50 * patient(2, 1, 0), *(patient(2, 1, seed) for seed in range(1, 4))]
    with_it, without = taking(4), taking(4)
    with_it[0].private_step(patients, rank=2, step=0)
    without[0].private_step(patients[1:], rank=2, step=0)
    assert distance(with_it[1].sums[0], without[1].sums[0]) <= CLIP * (1 + 1e-6)


def test_a_patient_of_nan_adds_nothing_and_harms_none_of_its_group() -> None:
    broken, good = patient(2, 1, 0), [patient(2, 1, seed) for seed in (1, 2)]
    broken[0, 0, 0, 3, 3] = math.nan
    with_it, without = taking(3), taking(3)
    with_it[0].private_step([good[0], broken, good[1]], rank=2, step=0)
    without[0].private_step(good, rank=2, step=0)
    for one, other in zip(with_it[1].sums, without[1].sums, strict=True):
        assert distance(one, other) <= 1e-4 * CLIP


def test_prototypes_that_stand_still_have_no_gradient_and_the_losses_no_graph() -> None:
    running, _, _ = taking(2, study(optimiser={"warmup_steps": 1, "freeze_prototypes_steps": 10}))
    names = running.trained_names(2, 0)
    patients = torch.stack([patient(2, 1, seed) for seed in range(2)])
    for loss, gradients in gradients_of_each(running.student, running._loss_of, patients, names):
        assert gradients.keys() == set(names)
        assert "head.prototypes.weight" not in gradients
        assert not loss.total.requires_grad


class Roomy:
    """An objective that runs out of memory where more than one patient is worked out at a time."""

    def __init__(self, inner: PrivateLearner) -> None:
        self._objective = inner.objective
        self.tries = 0

    def representations(self, rank: Rank) -> tuple[str, ...]:
        return self._objective.representations(rank)

    def __call__(self, student: Network, teacher: Network, views: Tensor, centre: Mapping[str, Tensor]) -> Loss:
        if torch._C._functorch.is_functorch_wrapped_tensor(views):
            self.tries += 1
            raise torch.OutOfMemoryError("too many")
        return self._objective(student, teacher, views, centre)


def test_where_memory_runs_out_fewer_are_worked_out_together_and_none_is_lost() -> None:
    patients = [patient(2, 1, seed) for seed in range(9)]
    running, noise, told = taking(4)
    running.objective = scarce = Roomy(running)
    running.private_step(patients, rank=2, step=0)
    alone, exact, _ = taking(1)
    alone.private_step(patients, rank=2, step=0)
    assert distance(noise.sums[0], exact.sums[0]) <= 1e-5 * CLIP
    assert scarce.tries == 6  # of four, and twice of two, in either group: what one needs decides about no other
    assert told == [
        "out of memory: 2, not 4 patients are worked out together",
        "out of memory: 1, not 2 patients are worked out together",
    ]


@pytest.mark.parametrize("other", [{"precision": "bf16"}, {"views_in_turn": True}, {"activation_checkpointing": True}])
def test_what_it_does_not_go_with_turns_it_off_and_is_told(other: dict[str, object]) -> None:
    running, _, told = taking(4, **other)
    assert running._at_once == 1
    assert len(told) == 1
    assert told[0].startswith("patients_at_once is not used: it goes with none of precision: bf16")


def test_patients_of_one_shape_are_grouped_and_none_is_lost() -> None:
    shapes = [1, 2, 1, 1, 2, 3, 1]
    patients = [torch.full((scans, 2, 1, 4, 4), float(number)) for number, scans in enumerate(shapes)]
    groups = [[int(views.max()) for views in group] for group in grouped(iter(patients), 2)]
    assert groups == [[0, 2], [1, 4], [3, 6], [5]]


def test_a_patient_whose_scans_do_not_fit_leaves_the_others_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Met in parts from then on, they would round otherwise."""
    others, large = [patient(2, 3, seed) for seed in range(4)], patient(2, 6, 9)
    running, noise, told = taking(1)
    whole = running._gather_gradients

    def short_of_memory(views: Tensor, rank: Rank, share: float) -> Loss:
        if running.micro_batch.get(rank, len(views)) > 3 and len(views) > 3:
            raise torch.OutOfMemoryError
        return whole(views, rank, share)

    monkeypatch.setattr(running, "_gather_gradients", short_of_memory)
    running.private_step([large, *others], rank=2, step=0)
    alone, exact, _ = taking(1)
    alone.private_step([large], rank=2, step=0)
    without, of_others, _ = taking(1)
    without.private_step(others, rank=2, step=0)
    assert told == ["out of memory: 2D batches are met in parts of 3, not 6 scans"]
    assert running.micro_batch == without.micro_batch
    assert (
        distance(noise.sums[0], [a + b for a, b in zip(exact.sums[0], of_others.sums[0], strict=True)]) <= 1e-5 * CLIP
    )
