"""Local DP-SGD whose unit is the patient: a learner whose weights tell little of any one patient.

One step, over a Poisson draw of patients (Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with the patient for the
example):

1. a patient's scans, views and slices are one gradient, of the mean loss over that patient's scans;
2. it is shortened to the clip norm C over all parameters together that the step trains;
3. the sum over patients, plus N(0, (s C)^2) on every value, divided by a constant, is the step's gradient;
4. likewise the patients' mean bottlenecks, of norm 1 at most, move the centre for the *next* step.

Whatever follows - clipping per tensor, optimiser, teacher, the round's update - is made of these two alone, the round's
start and the study. Which parameters a step trains follows from its rank, never from who was drawn; the divisor is the
study's batch, never the number drawn; an empty draw is a step of noise. Every patient is worked out alone, so that any
operation may stand in the network that does not couple scans, and memory is that of one patient; or, where a site asks
for it, several are worked out side by side (`unimiss_core.patient_gradients`).
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from unimiss_core.execution import PLAIN, Execution, out_of_memory_by_its_name
from unimiss_core.gathering import GatheredGradient
from unimiss_core.groups import group_of, groups_of_ranks
from unimiss_core.learner import PROTOTYPES, Learner, StepReport
from unimiss_core.noise import GaussianNoise, Noise
from unimiss_core.objective import Loss, move_centre
from unimiss_core.patient_gradients import Found, gradients_of_each, grouped
from unimiss_core.privacy_config import PatientPrivacyConfig
from unimiss_core.prototypes_gradient import PrototypesGradient
from unimiss_core.rounding import relative_error
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

_LAST_STAGES = ("backbone.encoder.stages.3.", "backbone.decoder.stages.0.")
"""Where an image is told in the fewest positions and the most channels."""

_LEAST_SCALE = torch.finfo(torch.float32).tiny
"""By which float32 can shorten a gradient without overstepping the clip norm: of smaller numbers it keeps few bits."""

_FEW = 64
"""Values whose norm is taken in float32: 2e-6 of it may be lost."""


class PrivateLearner(Learner):
    """A learner of a study in the privacy mode `patient`. Nothing of a `StepReport` or `round_diagnostics` may leave
    the site: they are not noised.

    noise: by default Gaussian noise seeded by the operating system.
    """

    def __init__(self, study: StudyConfig, *, noise: Noise | None = None, **settings: Any) -> None:
        """settings: as of `Learner`; of its execution `compile` is not used: where it fails for one patient, all who
        come after would be worked out otherwise, and the sum would move by more than that patient's share. Raises
        ValueError: the study is not in this mode."""
        asked: Execution = settings.get("execution", PLAIN)
        super().__init__(study, **{**settings, "execution": replace(asked, compile=False, cuda_graphs=False)})
        if not isinstance(study.privacy, PatientPrivacyConfig):
            raise ValueError(f"the study's privacy mode is {study.privacy.mode}, not patient")
        self._privacy = study.privacy
        self.noise = noise or GaussianNoise(self.device)
        if asked.compile:
            self._tell("compile is not used: in a private study one patient must not decide how others are worked out")
        self._tell = _once(self._tell)  # what is tried again for each patient would be told for each
        self._at_once = self._patients_at_once()

    def private_step(self, patients: Iterable[Tensor], *, rank: Rank, step: int) -> StepReport:
        """Train on one draw of patients as global step `step`; `patients` may be empty, and is gone through once.

        patients: of each the views (N, V, C, *S) of N of its scans, all of `rank`. With several processes each is given
        its own part of the draw. Raises MemoryTooSmallError: one scan does not fit; nothing has changed then.
        """
        names = self.trained_names(rank, step)
        parameters = [self._parameters[name] for name in names]
        sums = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
        centres = {name: torch.zeros_like(self.centre[name]) for name in self.objective.representations(rank)}
        losses: list[Loss | None] = []
        for group in grouped(patients, self._at_once):
            on_device = [views.to(self.device, non_blocking=True) for views in group]
            losses += self._add_group(on_device, rank, sums, centres)
        privacy, expected = self._privacy, self.study.batch.of(rank)
        if self.team.place == 0:  # once, however many processes share a step
            self.noise.add_(list(sums.values()), privacy.noise_multiplier * privacy.clip_norm)
            self.noise.add_(list(centres.values()), privacy.centre_noise)
        self.team.sum_([*sums.values(), *centres.values()])
        for parameter, name in zip(parameters, names, strict=True):
            parameter.grad = sums[name].div_(expected)
        distance = self._proximal.pull_(self._parameters)
        grads = list(sums.values())
        norms = [norm.item() for norm in torch._foreach_norm(grads)]
        self._move(rank, step, grads, norms)
        for name, total in centres.items():
            self.centre[name] = move_centre(self.centre[name], total / expected, self._momentum)
        return _report(rank, [loss for loss in losses if loss is not None], norms, distance)

    def trained_names(self, rank: Rank, step: int) -> list[str]:
        """The parameters that a step of this rank trains: by the study alone, whatever was drawn."""
        groups = groups_of_ranks({rank})
        frozen = {PROTOTYPES} if step < self.study.optimiser.freeze_prototypes_steps else set()
        return [
            name
            for name, parameter in self._parameters.items()
            if group_of(name) in groups and name not in frozen and is_trained(self.study, name, parameter)
        ]

    def most_scans(self, rank: Rank) -> int:  # noqa: ARG002 - the same for both
        """Scans that are worked out together, at most: those of one patient."""
        return self._privacy.scans_per_patient

    def _keeps_apart(self, gradient: GatheredGradient) -> bool:
        """A patient's gradient of the prototypes is clipped, and added, by the rows that make it."""
        return gradient.weight is self.student.get_parameter(PROTOTYPES)

    @property
    def _momentum(self) -> float:
        return self.study.objective.centre_momentum

    def _patients_at_once(self) -> int:
        asked, execution = self.execution.patients_at_once, self.execution
        if asked > 1 and (execution.precision == "bf16" or execution.in_pieces):
            self._tell(
                "patients_at_once is not used: it goes with none of precision: bf16, views_in_turn and "
                "activation_checkpointing (docs/performance.md)"
            )
            return 1
        return asked

    def _add_group(
        self, group: Sequence[Tensor], rank: Rank, sums: Mapping[str, Tensor], centres: Mapping[str, Tensor]
    ) -> list[Loss | None]:
        """Add patients with as many scans each, worked out together, or in halves where memory runs out."""
        if len(group) == 1:
            loss, gradients, prototypes = self._alone(group[0], rank, sums)
            return [self._add_patient(loss, gradients, sums, centres, prototypes)]
        if found := self._together(group, sums):
            return [self._add_patient(*one, sums, centres) for one in found]
        half = len(group) // 2
        return [loss for part in (group[:half], group[half:]) for loss in self._add_group(part, rank, sums, centres)]

    def _alone(
        self, views: Tensor, rank: Rank, names: Collection[str]
    ) -> tuple[Loss, Mapping[str, Tensor], PrototypesGradient | None]:
        """Loss and gradients, that of the prototypes apart from the others where it is no more than few rows.

        One whose scans do not fit is met in parts; the next is met as if there had been none, for parts round
        otherwise, and one patient would change what others release."""
        parts = dict(self.micro_batch)
        loss, apart = self._gather_in_parts_that_fit(views, rank, 1.0)
        self.micro_batch = parts
        # `_keeps_apart` lets no other gradient be.
        prototypes = cast(PrototypesGradient, apart[0]) if apart else None
        if PROTOTYPES not in names:
            prototypes = None
        elif prototypes and not prototypes.is_rows:
            prototypes.write()
            prototypes = None
        found = {name: p.grad for name, p in self._parameters.items() if name in names and p.grad is not None}
        self._optimiser.drop_gradients()
        return loss, found, prototypes

    def _together(self, group: Sequence[Tensor], names: Collection[str]) -> list[Found]:
        """Of each; nothing where memory runs out. The next group is as large again: see `_alone`."""
        try:
            with out_of_memory_by_its_name():
                return gradients_of_each(self.student, self._loss_of, torch.stack(list(group)), names)
        except torch.OutOfMemoryError:
            pass  # and leave this clause, for until then the error holds on to the activations
        self.release()
        self._tell(f"out of memory: {len(group) // 2}, not {len(group)} patients are worked out together")
        return []

    def _add_patient(
        self,
        loss: Loss,
        gradients: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        centres: Mapping[str, Tensor],
        prototypes: PrototypesGradient | None = None,
    ) -> Loss | None:
        """Add one patient's clipped gradient and mean bottlenecks. One whose numbers are not finite, or whose gradient
        is too long to be shortened exactly, adds nothing, is charged all the same, and gives None."""
        means = {name: loss.observed[name].bottleneck for name in centres}
        lengths = {name: _length([mean]) for name, mean in means.items()}
        length = math.hypot(_length(gradients.values()), prototypes.norm_at_most() if prototypes else 0.0)
        scale = _scale(length, self._privacy.clip_norm)
        if not all(map(math.isfinite, (length, *lengths.values()))) or scale < _LEAST_SCALE:
            return None
        added = [sums[name] for name in gradients]
        torch._foreach_add_(added, list(gradients.values()), alpha=scale)
        if prototypes is not None:
            prototypes.add_to_(sums[PROTOTYPES], scale)
        for name, mean in means.items():
            centres[name].add_(mean, alpha=_scale(lengths[name], 1.0))  # rounding may take a mean of units above 1
        self._watch.add(loss.observed)
        return loss


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """`tell`, that says nothing twice."""
    told: set[str] = set()

    def say(words: str) -> None:
        if words not in told:
            told.add(words)
            tell(words)

    return say


def is_trained(study: StudyConfig, name: str, parameter: Tensor) -> bool:
    """Whether a private study trains it: `PatientPrivacyConfig.trained`, and of a task's model what `finetune.trains`
    does, its head in each case."""
    trained = study.privacy.trained if study.privacy.mode == "patient" else "all"
    if study.finetune is not None and (group_of(name) == "head" or not parameter.requires_grad):
        return parameter.requires_grad
    if trained == "all":
        return True
    is_last = trained == "last_stages" and name.startswith(_LAST_STAGES)
    return is_last or (name.startswith("backbone.") and parameter.ndim == 1)


def _scale(length: float, limit: float) -> float:
    """What shortens a vector of `length` to `limit` where it is longer."""
    return 1.0 if length <= limit else limit / length


def _length(tensors: Iterable[Tensor]) -> float:
    """L2 norm over all tensors together, rounded up: a clip norm that rounding oversteps is no bound.

    In float32 a table of 65,536 prototypes loses 3e-4 of its norm. So few values at a time are squared and summed in
    the tensors' own type, which loses _FEW / 2 + 2 roundings of their norm at most, the root's among them; what is left
    to sum is little, in float64. Four more are what shortening the tensors by it may round. Infinite where a square is.
    """
    norms: list[Tensor] = []
    roundings = 0.0
    for tensor in tensors:
        flat = tensor.flatten()
        rows = flat[: len(flat) // _FEW * _FEW].view(-1, _FEW)
        norms += [torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(flat[rows.numel() :]).view(1)]
        roundings = max(roundings, relative_error(_FEW // 2 + 6, tensor.dtype))
    return float(torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64)) * (1 + roundings)


def _report(rank: Rank, losses: Sequence[Loss], norms: Sequence[float], distance: Mapping[str, Tensor]) -> StepReport:
    """For this site's own screen: means over the patients that this process worked out."""
    names = losses[0].terms if losses else {}
    terms = {name: sum(loss.terms[name].item() for loss in losses) / len(losses) for name in names}
    total = sum(loss.total.item() for loss in losses) / len(losses) if losses else 0.0
    diagnostics = {"grad_norm": math.hypot(*norms), **{name: value.item() for name, value in distance.items()}}
    return StepReport(rank, terms, total, diagnostics)
