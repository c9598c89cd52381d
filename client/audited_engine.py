"""The private engine as its auditor meets it: built as a site builds it, fed canaries, its releases read back.

A release is taken where no engine can keep it back: the gradient that AdamW was fed, from its first moment, and the
step that the centre made.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from client.canaries import GAIN, CanaryObjective, audited
from client.patient_draws import PatientDraws
from client.site import Site
from unimiss_core.execution import PLAIN, Execution
from unimiss_core.groups import group_of
from unimiss_core.local_state import LearnerState
from unimiss_core.noise import Noise
from unimiss_core.objective import Centre, Loss, Objective
from unimiss_core.privacy_config import PatientPrivacyConfig
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.scan import Rank
from unimiss_core.students import Student
from unimiss_core.study import StudyConfig
from unimiss_core.team import Alone, Team

_MOMENT, _KEPT = "adam_moment1.", 0.9
"""AdamW's first moment becomes 0.9 of itself and 0.1 of the gradient."""


class MakeLearner(Protocol):
    """Builds a learner as `PrivateLearner` does."""

    def __call__(
        self,
        study: StudyConfig,
        *,
        noise: Noise | None = None,
        ranks: Collection[Rank],
        team: Team,
        execution: Execution = PLAIN,
    ) -> PrivateLearner: ...


class MakeDraws(Protocol):
    """Builds the draws of a site as `PatientDraws` does."""

    def __call__(self, site: Site, team: Team, device: torch.device) -> PatientDraws: ...


@dataclass(frozen=True)
class Engine:
    """What is audited: a study of mode `patient`, and the program that trains on it, where scans are of one rank.

    patients_at_once: as the site file has it (`unimiss_core.patient_gradients`).
    """

    study: StudyConfig
    rank: Rank
    make_learner: MakeLearner = PrivateLearner
    make_draws: MakeDraws = PatientDraws
    patients_at_once: int = 1

    @property
    def privacy(self) -> PatientPrivacyConfig:
        """Raises ValueError: the study is not in this mode."""
        if not isinstance(self.study.privacy, PatientPrivacyConfig):
            raise ValueError(f"the study's privacy mode is {self.study.privacy.mode}, not patient")
        return self.study.privacy

    @property
    def step(self) -> int:
        """In the middle of the study, where rates are neither zero nor warming up."""
        return self.study.schedule.rounds * self.study.schedule.local_steps // 2

    def learner(self, *, noise: Noise | None = None, team: Team | None = None) -> PrivateLearner:
        """A new one. noise: None leaves the engine its own."""
        together = replace(PLAIN, patients_at_once=self.patients_at_once)
        return self.make_learner(
            audited(self.study), noise=noise, ranks={self.rank}, team=team or Alone(), execution=together
        )

    def watched(
        self, *, noise: Noise | None = None, team: Team | None = None, length: float | None = None, reach: float = 1.0
    ) -> "Watched":
        """A new learner that minimises the canaries' objective.

        length, reach: of a canary's gradient, in clip norms, and of its bottleneck; None: far above the clip norm.
        """
        learner = self.learner(noise=noise, team=team)
        names = learner.trained_names(self.rank, self.step)
        gain = GAIN if length is None else length / math.sqrt(len(names))
        learner.objective = CanaryObjective(learner.objective, names, self.privacy.clip_norm, gain=gain, reach=reach)
        return Watched(learner, self.rank, self.step)

    def watched_on_scans(self, *, noise: Noise, gain: float = 1.0) -> "Watched":
        """A new learner that minimises `gain` times the study's own objective, from weights so large that it tells
        scans apart."""
        learner = self.learner(noise=noise)
        _tell_scans_apart(learner)
        learner.objective = _Louder(learner.objective, gain)
        return Watched(learner, self.rank, self.step)


@dataclass(frozen=True)
class Release:
    """Sums over patients, noise and all: of gradients by tensor, in clip norms; of bottlenecks by representation."""

    gradients: Mapping[str, Tensor]
    centres: Mapping[str, Tensor]

    def __sub__(self, other: "Release") -> "Release":
        return Release(_less(self.gradients, other.gradients), _less(self.centres, other.centres))

    def groups(self) -> dict[str, Tensor]:
        """Values (n,) of each group of parameters."""
        names = sorted({group_of(name) for name in self.gradients})
        return {g: _flat({n: t for n, t in self.gradients.items() if group_of(n) == g}) for g in names}

    def gradient(self) -> Tensor:
        """All gradients as one vector."""
        return _flat(self.gradients)

    def centre(self) -> Tensor:
        """All centres as one vector."""
        return _flat(self.centres)

    def lengths(self) -> tuple[float, list[float]]:
        """L2 norms: of all gradients together, and of each centre."""
        gradient, *centres = (x.double().norm().item() for x in (self.gradient(), *self.centres.values()))
        return gradient, centres


class Watched:
    """A learner, and what each of its steps released."""

    def __init__(self, learner: PrivateLearner, rank: Rank, step: int) -> None:
        self.learner, self._rank, self._step = learner, rank, step
        privacy, objective = learner.study.privacy, learner.study.objective
        assert isinstance(privacy, PatientPrivacyConfig)
        self._expected, self._clip_norm = learner.study.batch.of(rank), privacy.clip_norm
        self._momentum = objective.centre_momentum

    def release(self, patients: Sequence[Tensor]) -> Release:
        """Take a step on a draw of `patients`, views (N, V, C, *S) each, and read back the sums it was made of."""
        before = self._kept()
        self.learner.private_step(iter(patients), rank=self._rank, step=self._step)
        after = self._kept()
        in_clip_norms = self._expected / self._clip_norm
        gradients = {
            name.removeprefix(_MOMENT): in_clip_norms * _fed(before.get(name), after[name], _KEPT)
            for name in after
            if name.startswith(_MOMENT)
        }
        centres = {
            name: self._expected * _fed(before[f"centre.{name}"], after[f"centre.{name}"], self._momentum)
            for name in self.learner.objective.representations(self._rank)
        }
        return Release(gradients, centres)

    def state(self) -> LearnerState:
        """All that later steps and the round's update can be made of; not what the site's own screen shows."""
        found = self.learner.state(weights=True)
        return LearnerState({name: tensor.clone() for name, tensor in found.tensors.items()}, found.facts)

    def restore(self, state: LearnerState) -> None:
        self.learner.restore(state)

    def _kept(self) -> dict[str, Tensor]:
        tensors = self.learner.state().tensors
        return {name: t.clone() for name, t in tensors.items() if name.startswith((_MOMENT, "centre."))}


class Silence:
    """Noise that is none, so that sums can be seen."""

    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        pass


class Overwriting:
    """Noise that takes the place of the sums: what follows hangs on them no longer, unless by another way."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        for total in sums:
            total.copy_(deviation * torch.randn(total.shape, generator=self._generator))


class OneOf(Alone):
    """One of a team of `size`, whose sums are its own values."""

    def __init__(self, place: int, size: int) -> None:
        self.place, self.size = place, size


@dataclass(frozen=True)
class _Louder:
    """An objective times `gain`."""

    like: Objective
    gain: float

    def representations(self, rank: Rank) -> tuple[str, ...]:
        return self.like.representations(rank)

    def __call__(self, student: Student, teacher: Any, views: Tensor, centre: Centre) -> Loss:
        loss = self.like(student, teacher, views, centre)
        return replace(loss, total=self.gain * loss.total)


def _tell_scans_apart(learner: PrivateLearner) -> None:
    """At the weights that a network begins with, a teacher says nearly the same of every scan, and what couples
    patients would not show."""
    generator = torch.Generator().manual_seed(0)
    student = {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in learner.student.named_parameters()
    }
    learner.start_round(student, {name: 1.1 * tensor for name, tensor in student.items()})


def _fed(before: Tensor | None, after: Tensor, kept: float) -> Tensor:
    """What a running mean, which keeps this share of itself, was fed."""
    moved = after.double() if before is None else after.double() - kept * before.double()
    return (moved / (1 - kept)).float()


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _less(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor that one of them lacks counts as nought."""
    found = {name: tensor.clone() for name, tensor in one.items()}
    for name, tensor in other.items():
        found[name] = found.get(name, torch.zeros_like(tensor)) - tensor
    return found
