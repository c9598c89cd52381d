"""A site's part of a round: from the student it receives to the update it sends."""

import hashlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from client.batches import Batch, Batches
from client.devices import run_team
from client.execution import devices_for, learner_for
from client.feedback import with_feedback
from client.held_out import measured
from client.lost_device import is_lost, told_by_kind
from client.own_model import keep_own_model, take_own_head_
from client.patient_draws import PatientDraw, PatientDraws
from client.site import Site
from client.site_state import Remembered
from client.telling import tell
from client.watch import Watch, is_of_one_message, watched
from unimiss_core import progress
from unimiss_core.divergence import Start, divergence_aware_start
from unimiss_core.errors import CheckpointError, ConfigError, DeviceError, NonFiniteLossError, WireError, where
from unimiss_core.formats import FORMATS
from unimiss_core.groups import group_of
from unimiss_core.learner import Learner, StepReport
from unimiss_core.local_state import LearnerState
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.network import below, tensors_of
from unimiss_core.objectives import has_teacher
from unimiss_core.scan import RANKS
from unimiss_core.schedule import rank_of_step, steps_of_round
from unimiss_core.teacher import advance_teacher
from unimiss_core.team import Alone, Team
from unimiss_core.wire import TrainReply, TrainRequest

log = logging.getLogger(__name__)

BATCH_TRIES = 5
"""Batches that may be tried for one step; when all of them give NaN or infinity, it is not the batch's fault."""

_LEARNER = "learner/"
_TEACHER = "teacher/"
_STUDENT = "student/"
"""What this site trained to; kept only where the study's `local.divergence_scale` asks for it."""
_RELEASED = "released/"
"""The student that the round began with; only where the study's format sends its steps."""
_LOST = "feedback/"
"""What the wire lost of the updates until then; likewise."""

_SCALE = "divergence_scale"
"""Among the facts: FedEMA's lambda of this site (`unimiss_core.divergence`)."""


def run_round(site: Site, request: TrainRequest) -> TrainReply:
    """Train `local_steps` steps from the received student, on all of the site's devices; remember what stays here,
    return what may leave.

    A round that was begun before, from the same student and teacher, goes on where it was last saved. Raises WireError
    `needs_whole` where the request brings no student or teacher and this site cannot rebuild it, and `not_finite` where
    the update is not; DeviceError where a device was lost or hangs, with what a next try begins with;
    NonFiniteLossError where no batch gives a step, ConfigError where the state folder cannot be written. Nothing but
    the unfinished round is remembered then.
    """
    devices = devices_for(site.config)
    _ = site.library  # what is new is read here, once, before several processes open it
    began = time.monotonic()
    try:
        reply = _trained(site, request, devices)
    except DeviceError as error:
        again = _next_try(site, request.round)
        raise DeviceError(f"{error}. The round is given up; asked for again, it {again}") from None
    assert reply is not None
    return replace(reply, seconds=time.monotonic() - began)


class Beginning(NamedTuple):
    """What a round begins with: what this site remembers from before it, and the student and teacher that the request
    brings or that follow from it."""

    memory: Remembered | None
    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """Of student and teacher; equal however they came."""
        return _digest(self.student, self.teacher)


def beginning(site: Site, request: TrainRequest) -> Beginning:
    """Raises WireError `needs_whole`."""
    memory = site.memory.before(request.round)
    student = _round_student(request, memory)
    return Beginning(memory, student, _round_teacher(request, student, memory))


def _trained(site: Site, request: TrainRequest, devices: Sequence[torch.device]) -> TrainReply | None:
    """`train`, of several devices in a process for each. Raises as that does, and DeviceError."""
    watch = _watch(site, request.round) if devices[0].type == "cuda" else None  # how long a CPU takes, nobody can say
    if len(devices) > 1:
        return run_team(train, (site, request), devices=devices, state=site.config.state, watch=watch)
    work = partial(_train_here, site, request, devices[0])
    return watched(work, watch) if watch is not None and is_of_one_message() else work()


def _train_here(site: Site, request: TrainRequest, device: torch.device) -> TrainReply | None:
    with told_by_kind(device):
        return train(site, request, device=device, team=Alone())


def _watch(site: Site, round: int) -> Watch:
    schedule = site.study.schedule
    return Watch([rank_of_step(site.ranks, step, schedule.alternate) for step in steps_of_round(schedule, round)])


def _next_try(site: Site, round: int) -> str:
    """What the same round does when it is asked for again."""
    facts = site.memory.facts_unfinished(round)
    steps = len(facts.get("figures", {}).get("grad_norms", [])) if facts else 0
    if steps:
        return f"goes on after step {steps}, the last that was saved"
    every = f"checkpoint_minutes: {site.config.checkpoint_minutes:g}"
    if facts is None:
        return f"goes on from what was saved of it last, if anything was ({every})"
    return f"begins anew, for nothing of it was saved yet ({every})"


def train(site: Site, request: TrainRequest, *, device: torch.device, team: Team) -> TrainReply | None:
    """`run_round` as one process of `team` on one device. The first one remembers and replies, for they end alike;
    the others return None. `seconds` is left to `run_round`, which knows what starting the processes took."""
    study, library = site.study, site.library
    if site.config.threads:
        torch.set_num_threads(site.config.threads)
    learner = learner_for(site.config, study, site.ranks, device=device, team=team)
    memory, student, teacher = begun = beginning(site, request)
    start = _round_start(request, student, memory)
    received = _digest(student, teacher, start.student) if start.own_share else begun.digest
    learner.stay_near(student)
    figures = _gone_on_with(site, learner, request.round, received)
    if figures is None:
        figures = _RoundFigures()
        if not _restored(learner, memory, site.config.name) and request.round > 1:
            take_own_head_(learner.student, site)
        learner.start_round(start.student, teacher)

    _take_steps(site, learner, figures, request.round, received, device=device, team=team)
    if team.place > 0:
        return None
    validation = _validation(site, learner, figures, request.round, received, student, device)
    update = _remembered_update(site, learner, request.round, start, student, teacher, memory)
    keep_own_model(site, learner.student, student, request.round)
    own_share = {} if study.local.divergence_scale is None else {"own_share": start.own_share}
    return TrainReply(
        site=site.config.name,
        run=request.run,
        round=request.round,
        study_digest=study.digest(),
        update=update,
        scans={rank: len(library.of_rank(rank)) for rank in RANKS},
        steps=study.schedule.local_steps,
        seconds=0.0,
        losses=figures.losses() if study.wire.losses else {},
        diagnostics={**learner.round_diagnostics(), **figures.diagnostics(), **own_share, **validation}
        if study.wire.losses
        else {},
    )


def _take_steps(
    site: Site,
    learner: Learner,
    figures: "_RoundFigures",
    round: int,
    received: str,
    *,
    device: torch.device,
    team: Team,
) -> None:
    """Train the steps of the round that `figures` does not hold yet; save the round at work from time to time."""
    study, saved = site.study, time.monotonic()
    kind = PatientDraws if study.privacy.mode == "patient" else Batches
    batches = kind(site, team, device)
    with batches.drawn_ahead(steps_of_round(study.schedule, round)[figures.steps :]) as upcoming:
        for step, batch in upcoming:
            progress.report(progress.Working())  # it is drawn; the step has its own time, and so has what is saved
            report, skipped = _take_step(learner, batches, step, batch, site=site.config.name)
            figures.add(report, skipped)
            loss = None if site.is_private else mean_cross_entropy(report.terms)
            progress.report(progress.StepDone(site.config.name, figures.steps, study.schedule.local_steps, loss))
            if team.place == 0 and time.monotonic() - saved >= 60 * site.config.checkpoint_minutes:
                _save_unfinished(site, learner, round, received, figures)
                progress.report(progress.Working())
                saved = time.monotonic()


def _validation(
    site: Site,
    learner: Learner,
    figures: "_RoundFigures",
    round: int,
    received: str,
    student: Mapping[str, Tensor],
    device: torch.device,
) -> dict[str, float]:
    """What the site measures of the `student` that it was sent. Whatever ends that costs the figure and no step: the
    steps are saved before, and asked for the round again, the site does not measure a second time. Where the device is
    lost, nothing could be remembered either, and its error is raised."""
    if site.study.finetune is None or not site.study.finetune.validation:
        return {}
    if figures.measuring:
        tell(
            site.config.name, f"does not measure the shared model in round {round}: it was ended by that, or soon after"
        )
        return {}
    figures.measuring = True
    _save_unfinished(site, learner, round, received, figures)
    try:
        learner.release()  # a second network is built beside it
        return measured(site.config, site.study, site.everything, student, device)
    except RuntimeError as error:
        if is_lost(error, device):
            raise
        tell(site.config.name, f"does not measure the shared model: {where(error)}")
        return {}


def _remembered_update(
    site: Site,
    learner: Learner,
    round: int,
    start: Start,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    memory: Remembered | None,
) -> dict[str, Tensor]:
    """What training changed of the received `student`, as it may leave; all that the next round needs is remembered."""
    trained = tensors_of(learner.student)
    update = {name: trained[name].cpu() - tensor for name, tensor in student.items()}
    kept: dict[str, Mapping[str, Tensor]] = {_TEACHER: teacher} if has_teacher(site.study) else {}
    if FORMATS[site.study.wire.dtype].carries_over:
        lost_before = {} if memory is None else below(_LOST, memory.tensors)
        update, lost = with_feedback(update, lost_before, study=site.study, ranks=site.ranks, round=round)
        # Copied, because in round 1 the teacher is the student, and no file takes the same memory twice.
        kept |= {_RELEASED: {name: tensor.clone() for name, tensor in student.items()}, _LOST: lost}
    if site.study.local.divergence_scale is not None:
        kept |= {_STUDENT: {name: trained[name] for name in student}}
    _remember(site, learner, round, start, kept)
    return update


def _remember(site: Site, learner: Learner, round: int, start: Start, kept: dict[str, Mapping[str, Tensor]]) -> None:
    """kept: prefix -> tensors that stay besides the learner's state."""
    state = learner.state()
    parts = {_LEARNER: state.tensors, **kept}
    facts = dict(state.facts)
    if site.study.local.divergence_scale is not None:
        facts[_SCALE] = start.scale
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    site.memory.remember(Remembered(round, tensors, facts))


def _restored(learner: Learner, memory: Remembered | None, site: str) -> bool:
    """Whether the learner goes on from what the site remembers."""
    if memory is None:
        return False
    try:
        learner.restore(LearnerState(below(_LEARNER, memory.tensors), dict(memory.facts)))
    except CheckpointError as error:
        # A site that has gained volumes since, say, holds state for other tensors: it begins anew, as a new site does.
        tell(site, f"what it remembers of round {memory.round} does not fit, so moments and centre begin anew: {error}")
        return False
    return True


def _round_student(request: TrainRequest, memory: Remembered | None) -> Mapping[str, Tensor]:
    """The released student that this round begins with: received, or rebuilt from the one before and its step."""
    if request.student is not None:
        return request.student
    assert request.student_step is not None, "a request that was unpacked holds one of the two"
    before = _held(_RELEASED, request.student_step.keys(), request.round, memory)
    return {name: before[name] + step for name, step in request.student_step.items()}


def _round_teacher(
    request: TrainRequest, student: Mapping[str, Tensor], memory: Remembered | None
) -> Mapping[str, Tensor]:
    """The global teacher that this round begins with: received, or rebuilt from the one before and `student`.

    The coordinator moves its teacher by the same function on the same values, so both hold the same bits.
    """
    if request.teacher is not None:
        return request.teacher
    if request.round == 1 or not has_teacher(request.study):
        return student
    before = _held(_TEACHER, student.keys(), request.round, memory)
    retention: dict[str, float] = {name: request.teacher_retention.get(group_of(name), 1.0) for name in before}
    return advance_teacher(before, student, retention)


def _held(prefix: str, names: Collection[str], round: int, memory: Remembered | None) -> dict[str, Tensor]:
    """What this site holds of the round before `round`, for exactly these tensors. Raises WireError `needs_whole`."""
    if memory is None or memory.round != round - 1:
        raise WireError("needs_whole", f"round {round} builds on a student and teacher that this site does not hold")
    held = below(prefix, memory.tensors)
    if held.keys() != set(names):
        raise WireError("needs_whole", "this site trained other tensors in the round before")
    return held


def _round_start(request: TrainRequest, student: Mapping[str, Tensor], memory: Remembered | None) -> Start:
    """What this round starts from: the received `student`; under FedEMA with a share of the site's own.

    That takes part only where it is of the round before: a site that is new, lost its memory, missed a round or trained
    other tensors starts from the received student. Its scale outlives a missed round, not the others.
    """
    tau = request.study.local.divergence_scale
    if tau is None or memory is None:
        return Start(student, 0.0, None)
    own = below(_STUDENT, memory.tensors)
    if own.keys() != student.keys():
        return Start(student, 0.0, None)
    scale = memory.facts[_SCALE]
    if memory.round != request.round - 1:
        return Start(student, 0.0, scale)
    return divergence_aware_start(student, own, tau=tau, scale=scale)


def _take_step(
    learner: Learner, batches: Batches | PatientDraws, step: int, batch: Batch | PatientDraw, *, site: str
) -> tuple[StepReport, int]:
    """(report, batches skipped): a step, with another batch where one gave NaN or infinity. A private step never does:
    a second draw would be a second release.

    Such a step changes nothing, so the state to go on from is the one before it. Raises NonFiniteLossError.
    """
    attempt = 0
    while True:
        try:
            return batch.train(learner, step), attempt
        except NonFiniteLossError as error:  # not to be kept, by a log neither: it holds the gradients of its step
            attempt += 1
            if attempt == BATCH_TRIES:
                raise
            tell(site, f"batch skipped: {error}")
        batch = batches.draw(step, attempt)


def _save_unfinished(site: Site, learner: Learner, round: int, received: str, figures: "_RoundFigures") -> None:
    state = learner.state(weights=True)
    facts = {"received": received, "figures": asdict(figures), "learner": state.facts}
    try:
        site.memory.remember_unfinished(Remembered(round, state.tensors, facts))
    except ConfigError as error:  # only a later kill would need it
        log.warning("the round goes on without a checkpoint on the way: %s", error)


def _gone_on_with(site: Site, learner: Learner, round: int, received: str) -> "_RoundFigures | None":
    """Put `learner` where the same round was last saved; the figures until there, or None where there is nothing."""
    state = site.memory.unfinished(round)
    if state is None or state.facts.get("received") != received:
        return None
    try:
        figures = _RoundFigures(**state.facts["figures"])
        learner.restore(LearnerState(dict(state.tensors), state.facts["learner"]))
    except (CheckpointError, KeyError, TypeError) as error:  # the last two: another version of the program wrote it
        tell(site.config.name, f"what was saved of round {round} does not fit, so the round begins anew: {error}")
        return None
    steps = site.study.schedule.local_steps
    tell(site.config.name, f"round {round} goes on after step {figures.steps} of {steps}")
    return figures


def _digest(*begun_with: Mapping[str, Tensor]) -> str:
    """Names what a round begins with: sha256 over the values of each, by name."""
    digest = hashlib.sha256()
    for tensors in begun_with:
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


@dataclass
class _RoundFigures:
    """What each step of a round reported."""

    terms: dict[str, list[float]] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    global_distances: list[float] = field(default_factory=list)
    """Under FedProx."""
    skipped_batches: int = 0
    measuring: bool = False
    """Whether all steps are taken and held-out patients' scans come next."""

    @property
    def steps(self) -> int:
        return len(self.grad_norms)

    def add(self, report: StepReport, skipped: int) -> None:
        for name, value in report.terms.items():
            self.terms.setdefault(name, []).append(value)
        self.grad_norms.append(report.diagnostics["grad_norm"])
        if "global_distance" in report.diagnostics:
            self.global_distances.append(report.diagnostics["global_distance"])
        self.skipped_batches += skipped

    def losses(self) -> dict[str, float]:
        return {name: fmean(values) for name, values in self.terms.items()}

    def diagnostics(self) -> dict[str, float]:
        figures = {"grad_norm": fmean(self.grad_norms), "skipped_batches": float(self.skipped_batches)}
        if self.global_distances:
            figures["global_distance"] = fmean(self.global_distances)
        return figures
