"""A site's part of a round: from the student it receives to the update it sends."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean

import torch
from torch import Tensor

from client.cache import CachedScan
from client.site import Site
from client.site_state import Remembered
from unimiss_core import progress
from unimiss_core.device import device_of
from unimiss_core.errors import CheckpointError, WireError
from unimiss_core.groups import group_of
from unimiss_core.learner import Learner, LearnerState, StepReport
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.network import tensors_of
from unimiss_core.scan import RANKS, Rank
from unimiss_core.schedule import rank_of_step, steps_of_round
from unimiss_core.study import BatchConfig
from unimiss_core.teacher import advance_teacher
from unimiss_core.views import draw_batch, generator_for
from unimiss_core.wire import TrainReply, TrainRequest

log = logging.getLogger(__name__)

_TEACHER = "teacher/"
_LEARNER = "learner/"


def run_round(site: Site, request: TrainRequest) -> TrainReply:
    """Train `local_steps` steps from the received student; remember what stays here, return what may leave.

    Raises WireError `needs_teacher` where the request brings no teacher and this site cannot rebuild it, and what
    `Learner.step` raises. Nothing is remembered of a round that did not end.
    """
    began = time.monotonic()
    study, library = site.study, site.library
    if site.config.threads:
        torch.set_num_threads(site.config.threads)
    learner = Learner(study, ranks=library.ranks, device=device_of(site.config.device), precision=site.config.precision)
    memory = site.memory.before(request.round)
    teacher = _round_teacher(request, memory)
    if memory is not None:
        _restore(learner, memory)
    learner.start_round(request.student, teacher)

    figures = _RoundFigures()
    steps = steps_of_round(study.schedule, request.round)
    for number, (step, views) in enumerate(_batches(site, learner.device, steps), start=1):
        report = learner.step(views, step=step)
        figures.add(report)
        loss = mean_cross_entropy(report.terms)
        progress.report(progress.StepDone(site.config.name, number, study.schedule.local_steps, loss))

    kept = learner.state()
    tensors = {_LEARNER + name: tensor for name, tensor in kept.tensors.items()}
    tensors |= {_TEACHER + name: tensor for name, tensor in teacher.items()}
    site.memory.remember(Remembered(request.round, tensors, kept.facts))
    return TrainReply(
        site=site.config.name,
        round=request.round,
        study_digest=study.digest(),
        update={name: t.cpu() - request.student[name] for name, t in tensors_of(learner.student).items()},
        scans={rank: len(library.of_rank(rank)) for rank in RANKS},
        steps=study.schedule.local_steps,
        seconds=time.monotonic() - began,
        losses=figures.losses(),
        diagnostics={**learner.round_diagnostics(), "grad_norm": figures.grad_norm()},
    )


def _restore(learner: Learner, memory: Remembered) -> None:
    try:
        learner.restore(LearnerState(_below(_LEARNER, memory.tensors), dict(memory.facts)))
    except CheckpointError as error:
        # A site that has gained volumes since, say, holds state for other tensors: it begins anew, as a new site does.
        log.warning("local state of round %d does not fit, starting afresh: %s", memory.round, error)


def _round_teacher(request: TrainRequest, memory: Remembered | None) -> Mapping[str, Tensor]:
    """The global teacher that this round begins with: received, or rebuilt from the one before.

    The coordinator moves its teacher by the same function on the same values, so both hold the same bits.
    """
    if request.teacher is not None:
        return request.teacher
    if request.round == 1:
        return request.student
    if memory is None or memory.round != request.round - 1:
        raise WireError("needs_teacher", f"round {request.round} builds on a teacher that this site does not hold")
    before = _below(_TEACHER, memory.tensors)
    if before.keys() != request.student.keys():
        raise WireError("needs_teacher", "this site trained other tensors in the round before")
    retention: dict[str, float] = {name: request.teacher_retention.get(group_of(name), 1.0) for name in before}
    return advance_teacher(before, request.student, retention)


def _batches(site: Site, device: torch.device, steps: range) -> Iterator[tuple[int, Tensor]]:
    """(global step, views) of each step of a round; the next views are drawn while the current ones are trained on."""

    def draw(step: int) -> Tensor:
        schedule = site.study.schedule
        rank = rank_of_step(site.library.ranks, step, schedule.alternate)
        generator = generator_for(site.study.seed, site.config.name, step)
        scans = _sample(site.library.of_rank(rank), site.study.batch, rank, generator)
        return draw_batch(scans, site.study.views, generator, device)

    with ThreadPoolExecutor(max_workers=1) as ahead:
        upcoming: Future[Tensor] = ahead.submit(draw, steps[0])
        for step, following in zip_longest(steps, steps[1:]):
            views = upcoming.result()
            if following is not None:
                upcoming = ahead.submit(draw, following)
            yield step, views


def _sample(
    scans: Sequence[CachedScan], batch: BatchConfig, rank: Rank, generator: torch.Generator
) -> list[CachedScan]:
    """The scans of one batch: of different scans or patients, as the study says, unless the site holds fewer."""
    by_patient = defaultdict(list)
    for index, scan in enumerate(scans):
        by_patient[scan.patient if batch.sampling == "patients" else index].append(scan)
    groups, count = list(by_patient.values()), batch.of(rank)
    if count <= len(groups):
        chosen = torch.randperm(len(groups), generator=generator)[:count]
    else:
        chosen = torch.randint(len(groups), (count,), generator=generator)
    return [_one_of(groups[index], generator) for index in chosen.tolist()]


def _one_of(scans: Sequence[CachedScan], generator: torch.Generator) -> CachedScan:
    return scans[0] if len(scans) == 1 else scans[int(torch.randint(len(scans), (), generator=generator))]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass
class _RoundFigures:
    """Means over a round of what each step reported."""

    _terms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _grad_norms: list[float] = field(default_factory=list)

    def add(self, report: StepReport) -> None:
        for name, value in report.terms.items():
            self._terms[name].append(value)
        self._grad_norms.append(report.diagnostics["grad_norm"])

    def losses(self) -> dict[str, float]:
        return {name: fmean(values) for name, values in self._terms.items()}

    def grad_norm(self) -> float:
        return fmean(self._grad_norms)
