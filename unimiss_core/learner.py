"""One site's student and teacher, and the optimiser step that moves them.

Which parameters a step touches follows from the rank of its scans: parameters of an unused rank have no gradient,
keep their optimiser state, and their teacher stands still.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unimiss_core.collapse import RoundWatch
from unimiss_core.errors import CheckpointError, NonFiniteLossError
from unimiss_core.groups import group_of, groups_of_ranks, ranks_needed
from unimiss_core.network import build_network, load_tensors_, tensors_of
from unimiss_core.objective import Loss, move_centre, new_centre, weighted_mean
from unimiss_core.objectives import build_objective
from unimiss_core.scan import Rank
from unimiss_core.schedule import learning_rate, teacher_momentum, weight_decay
from unimiss_core.study import StudyConfig
from unimiss_core.team import Alone, Team

Precision = Literal["fp32", "bf16"]

STATE_FORMAT = 1

_PROTOTYPES = "head.prototypes.weight"
_OPTIMISER_KEYS = {"step": "adam_step", "exp_avg": "adam_moment1", "exp_avg_sq": "adam_moment2"}


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step cost and showed.

    terms: the loss terms by name; total: their sum by weight; diagnostics: `grad_norm` before clipping, and by
    representation the entropy of the teacher's targets and of their mean over the batch, in nats (log K says: no
    information).
    """

    rank: Rank
    terms: dict[str, float]
    total: float
    diagnostics: dict[str, float]


@dataclass(frozen=True)
class LearnerState:
    """What a site keeps on its own disk: tensors for a safetensors file, facts for JSON beside it."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Learner:
    """Student, teacher, centre and AdamW of one site.

    ranks: of the site's scans; they decide which tensors exist (`unimiss_core.groups.ranks_needed`).
    precision: bf16 runs the networks in bfloat16; losses, centre, norms, weights and their averages stay float32.
    micro_batch: most scans in one forward pass, by rank; a larger batch is met in parts, with the same outcome.
    team: the processes that take this site's steps together, each with a learner of its own that stays like the others.
    """

    def __init__(
        self,
        study: StudyConfig,
        *,
        ranks: Collection[Rank],
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        micro_batch: Mapping[Rank, int] | None = None,
        team: Team | None = None,
    ) -> None:
        self.study = study
        self.ranks = tuple(sorted(set(ranks)))
        self.device = torch.device(device)
        self.precision = precision
        self.micro_batch = dict(micro_batch or {})
        self.team = team or Alone()
        held = ranks_needed(self.ranks)
        self.student = build_network(study.model, seed=study.seed, ranks=held).to(self.device)
        self.teacher = build_network(study.model, seed=study.seed, ranks=held).to(self.device).requires_grad_(False)
        self.objective = build_objective(study)
        bottleneck = self.student.backbone.architecture.bottleneck
        names = [name for rank in self.ranks for name in self.objective.representations(rank)]
        self.centre = new_centre(names, bottleneck, self.device)
        self._optimiser = _adamw(self.student)
        self._watch = RoundWatch()

    def start_round(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Begin from the global student and teacher; centre and optimiser state go on from the last round.

        Raises CheckpointError: names or shapes are not exactly those of this site's networks.
        """
        load_tensors_(self.student, student)
        load_tensors_(self.teacher, teacher)
        self._watch = RoundWatch()

    def round_diagnostics(self) -> dict[str, float]:
        """Collapse figures over the round's steps so far (`unimiss_core.collapse.RoundWatch.figures`).

        Better founded than those of a step, whose batch may hold two volumes.
        """
        return self._watch.figures()

    def step(self, views: Tensor, *, step: int, share: float = 1.0) -> StepReport:
        """Train on views (B, V, C, *S) as global step `step` of the study.

        share: what part of the step's batch these views are; the rest is with others of the team
        (`unimiss_core.team.part_of`). The report is of the whole batch.
        Raises NonFiniteLossError: loss or gradient is NaN or infinite; nothing has changed then. ValueError: the
        views do not fit the model.
        """
        rank = _rank_of_views(views)
        gathered = self._gather_gradients(views.to(self.device, non_blocking=True), rank, share)
        if step < self.study.optimiser.freeze_prototypes_steps:
            self.student.get_parameter(_PROTOTYPES).grad = None
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        report = _report(rank, gathered, grad_norm=torch.linalg.vector_norm(norms))
        if not (math.isfinite(report.total) and math.isfinite(report.diagnostics["grad_norm"])):
            self._optimiser.zero_grad(set_to_none=True)
            raise NonFiniteLossError(
                f"step {step}: loss {report.total}, gradient norm {report.diagnostics['grad_norm']}; step not taken"
            )
        _clip_each_(grads, norms, self.study.optimiser.clip_norm)
        self._set_rates(step)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._move_teacher(rank, teacher_momentum(self.study, step))
        for name, observed in gathered.observed.items():
            self.centre[name] = move_centre(
                self.centre[name], observed.bottleneck, self.study.objective.centre_momentum
            )
        self._watch.add(gathered.observed)
        return report

    def state(self, *, weights: bool = False) -> LearnerState:
        """Optimiser moments and step counts, and the centre; with `weights` also student, teacher and the round's
        collapse figures, so that a round can be gone on with in its middle.

        Tensors share memory with the learner: save them before a step.
        """
        tensors = {f"centre.{name}": centre for name, centre in self.centre.items()}
        for name, parameter in self.student.named_parameters():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                tensors[f"{_OPTIMISER_KEYS[key]}.{name}"] = value
        if not weights:
            return LearnerState(tensors, {**self._identity(), "weights": False})
        watched, steps = self._watch.state()
        for prefix, more in (
            ("student", tensors_of(self.student)),
            ("teacher", tensors_of(self.teacher)),
            ("watch", watched),
        ):
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in more.items()}
        return LearnerState(tensors, {**self._identity(), "weights": True, "watched_steps": steps})

    def restore(self, state: LearnerState) -> None:
        """Take up a `state` of a learner of the same study and ranks; a float32 round trip is exact.

        Raises CheckpointError: another format, study or set of ranks, or tensors that do not fit; nothing has
        changed then.
        """
        identity = self._identity()
        differing = [key for key, value in identity.items() if state.facts.get(key) != value]
        if differing:
            raise CheckpointError(
                f"local state is of another {' and '.join(differing)}; expected "
                f"{[identity[key] for key in differing]}, got {[state.facts.get(key) for key in differing]}. "
                "Move the state folder away to start afresh."
            )
        centre = _below("centre", state.tensors)
        moments = {key: _below(prefix, state.tensors) for key, prefix in _OPTIMISER_KEYS.items()}
        self._check_state(centre, moments)
        if state.facts["weights"]:
            self.start_round(_below("student", state.tensors), _below("teacher", state.tensors))
            self._watch = RoundWatch.restored(
                {name: tensor.to(self.device) for name, tensor in _below("watch", state.tensors).items()},
                state.facts["watched_steps"],
            )
        self.centre = {name: centre[name].to(self.device, copy=True) for name in self.centre}
        self._optimiser.state.clear()
        for name, parameter in self.student.named_parameters():
            if name in moments["step"]:
                self._optimiser.state[parameter] = {
                    key: tensors[name].to(self.device, copy=True) for key, tensors in moments.items()
                }

    def _gather_gradients(self, views: Tensor, rank: Rank, share: float) -> Loss:
        """Gradients and loss of the whole batch, without graph: forward and backward over this process's share, in
        parts where it is larger than a micro-batch, then summed over the team."""
        self._optimiser.zero_grad(set_to_none=True)
        parts = views.split(self.micro_batch.get(rank, len(views)))
        losses = []
        for part in parts:
            weight = share * len(part) / len(views)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.objective(self.student, self.teacher, part, self.centre)
            torch.autograd.backward(loss.total * weight)
            losses.append((weight, loss))
        whole = _weighted_sum(losses)
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        self.team.sum_([*grads, *_tensors_in(whole)])
        return whole

    def _set_rates(self, step: int) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(self.study, step)
            group["weight_decay"] = weight_decay(self.study, step) if group["decays"] else 0.0

    def _move_teacher(self, rank: Rank, momentum: float) -> None:
        groups = groups_of_ranks({rank})
        names = [name for name, _ in self.student.named_parameters() if group_of(name) in groups]
        students = [self.student.get_parameter(name).detach() for name in names]
        teachers: list[Tensor] = [self.teacher.get_parameter(name) for name in names]
        torch._foreach_lerp_(teachers, students, 1.0 - momentum)

    def _identity(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            "model": self.study.model.model_dump(mode="json"),
            "objective": self.study.objective.name,
            "ranks": list(self.ranks),
        }

    def _check_state(self, centre: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> None:
        parameters = dict(self.student.named_parameters())
        fits = centre.keys() == self.centre.keys() and all(
            centre[name].shape == own.shape for name, own in self.centre.items()
        )
        names = moments["step"].keys()
        fits = fits and names <= parameters.keys() and all(tensors.keys() == names for tensors in moments.values())
        fits = fits and all(
            tensors[name].shape == parameters[name].shape
            for key, tensors in moments.items()
            if key != "step"
            for name in names
        )
        if not fits:
            raise CheckpointError(
                "local state is damaged: its tensors do not fit the model. Move the state folder away to start afresh."
            )


def _adamw(student: nn.Module) -> torch.optim.AdamW:
    """Two groups: matrices, tables and kernels decay; biases and other 1-D tensors do not. Rates are set per step."""
    decaying = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decaying, "decays": True}, {"params": others, "decays": False}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def _clip_each_(grads: list[Tensor], norms: Tensor, limit: float | None) -> None:
    """Scale each gradient whose norm is above `limit` down to it; the published clipping is per tensor."""
    if limit is not None:
        scales = (limit / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(scales.unbind()))


def _rank_of_views(views: Tensor) -> Rank:
    if views.ndim == 5:
        return 2
    if views.ndim == 6:
        return 3
    raise ValueError(f"expected views (B, V, C, H, W) or (B, V, C, D, H, W); got shape {tuple(views.shape)}")


def _weighted_sum(losses: list[tuple[float, Loss]]) -> Loss:
    """The loss of a batch from its parts' shares; means of equal-sized views weigh by their part's size."""

    def total(values: Iterator[Tensor]) -> Tensor:
        return torch.stack([share * value.detach() for (share, _), value in zip(losses, values, strict=True)]).sum(0)

    first = losses[0][1]
    return Loss(
        terms={name: total(loss.terms[name] for _, loss in losses) for name in first.terms},
        total=total(loss.total for _, loss in losses),
        observed={
            name: weighted_mean([(share, loss.observed[name]) for share, loss in losses]) for name in first.observed
        },
    )


def _tensors_in(loss: Loss) -> list[Tensor]:
    observed = [getattr(one, part.name) for one in loss.observed.values() for part in fields(one)]
    return [*loss.terms.values(), loss.total, *observed]


def _report(rank: Rank, loss: Loss, *, grad_norm: Tensor) -> StepReport:
    """All scalars in one transfer from the device."""
    diagnostics = {"grad_norm": grad_norm}
    for name, observed in loss.observed.items():
        diagnostics[f"target_entropy_{name}"] = observed.target_entropy
        diagnostics[f"mean_target_entropy_{name}"] = torch.special.entr(observed.target).sum()
    values = torch.stack([loss.total, *loss.terms.values(), *diagnostics.values()]).tolist()
    count = 1 + len(loss.terms)
    return StepReport(
        rank=rank,
        terms=dict(zip(loss.terms, values[1:count], strict=True)),
        total=values[0],
        diagnostics=dict(zip(diagnostics, values[count:], strict=True)),
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
