"""One site's student and teacher, and the optimiser step that moves them.

Which parameters a step touches follows from the rank of its scans: parameters of an unused rank have no gradient,
keep their optimiser state, and their teacher stands still.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimiss_core.allocation import MemoryOfSteps
from unimiss_core.collapse import RoundWatch
from unimiss_core.errors import CheckpointError, MemoryTooSmallError, NonFiniteLossError
from unimiss_core.execution import (
    PLAIN,
    Execution,
    compiling,
    out_of_memory_by_its_name,
    set_up_blocks_,
)
from unimiss_core.gathering import GatheredGradient
from unimiss_core.groups import group_of, groups_of_ranks, ranks_needed
from unimiss_core.local_optimiser import (
    BlockwiseAdamW,
    build_local_optimiser,
    clip_each_,
    clip_scale,
    kept_by,
    set_rates_,
)
from unimiss_core.local_state import OPTIMISER_KEYS, STATE_FORMAT, LearnerState, check_state
from unimiss_core.network import below, check_tensors, load_tensors_, tensors_of
from unimiss_core.objective import Loss, PiecewiseObjective, move_centre, new_centre, weighted_sum
from unimiss_core.objectives import build_objective, has_teacher
from unimiss_core.proximal import ProximalTerm
from unimiss_core.scan import RANKS, Rank
from unimiss_core.schedule import teacher_momentum
from unimiss_core.step_graphs import StepGraphs
from unimiss_core.step_report import StepReport as StepReport
from unimiss_core.step_report import report_of
from unimiss_core.students import Student, build_student, gathering, rank_of_views, shape_of_views, staying_names
from unimiss_core.study import StudyConfig
from unimiss_core.team import Alone, Team, largest_part

log = logging.getLogger(__name__)

PROTOTYPES = "head.prototypes.weight"


class Gathered(NamedTuple):
    """What a batch's backward passes gave besides the gradients that parameters hold.

    loss: without graph. apart: gradients of which their parameters hold nothing.
    """

    loss: Loss
    apart: list[GatheredGradient]


class Learner:
    """Student, teacher, centre and optimiser of one site.

    ranks: of the site's scans; they decide which tensors exist (`unimiss_core.groups.ranks_needed`).
    execution: how steps are computed; by default in float32 on the CPU, each batch as a whole.
    team: the processes that take this site's steps together, each with a learner of its own that stays like the others.
    tell: hears in a sentence what could not be done as `execution` asks; by default the log does.
    """

    def __init__(
        self,
        study: StudyConfig,
        *,
        ranks: Collection[Rank],
        execution: Execution = PLAIN,
        team: Team | None = None,
        tell: Callable[[str], None] = log.warning,
    ) -> None:
        self.study = study
        self.ranks = tuple(sorted(set(ranks)))
        self.execution = execution
        self.device = execution.device
        self.micro_batch = dict(execution.micro_batch)
        self.team = team or Alone()
        self._tell = tell
        self.student = build_student(study, ranks=ranks_needed(self.ranks)).to(self.device)
        self.teacher = deepcopy(self.student).requires_grad_(False) if has_teacher(study) else None
        # Kept, for going through the modules takes milliseconds, in which a GPU would wait.
        self._parameters = dict(self.student.named_parameters())
        self._of_teacher = {} if self.teacher is None else dict(self.teacher.named_parameters())
        self._followed = {
            rank: [name for name in self._of_teacher if group_of(name) in groups_of_ranks({rank})] for rank in RANKS
        }
        self.objective = build_objective(study)
        self._staying = staying_names(study, tensors_of(self.student))
        bottleneck = self.student.backbone.architecture.bottleneck
        names = [name for rank in self.ranks for name in self.objective.representations(rank)]
        self.centre = new_centre(names, bottleneck, self.device)
        self._optimiser = build_local_optimiser(study.optimiser, self.student)
        self._watch = RoundWatch()
        self._proximal = ProximalTerm(study.local.proximal)
        self._memory = MemoryOfSteps(execution)
        self._compiled = execution.compile
        self._set_up_blocks(compiled=self._compiled)
        recorded = execution.cuda_graphs and self.device.type == "cuda"
        self._graphs: StepGraphs[Gathered] = StepGraphs(list(self._parameters.values()), on=recorded)

    def start_round(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Begin from the global student and teacher; centre, optimiser state and what stays here go on from the last
        round. teacher: not looked at where there is none.

        Raises CheckpointError: names or shapes are not exactly those of this site's networks; nothing has changed then.
        """
        if self.teacher is not None:
            check_tensors(self.teacher, teacher)
        load_tensors_(self.student, {**self._own(), **student})
        if self.teacher is not None:
            load_tensors_(self.teacher, teacher)
        self._watch = RoundWatch()

    def stay_near(self, received: Mapping[str, Tensor]) -> None:
        """From here on FedProx's term pulls towards `received`, the global student, where the study has that term
        (`unimiss_core.proximal`)."""
        self._proximal.stay_near(received, self.device)

    def round_diagnostics(self) -> dict[str, float]:
        """Collapse figures over the round's steps so far (`unimiss_core.collapse.RoundWatch.figures`).

        Better founded than those of a step, whose batch may hold two volumes.
        """
        return self._watch.figures()

    def step(self, views: Tensor, *, step: int, share: float = 1.0) -> StepReport:
        """Train on views (B, V, C, *S) as global step `step` of the study.

        share: what part of the step's batch these views are; the rest is with others of the team
        (`unimiss_core.team.part_of`). The report is of the whole batch.
        Raises NonFiniteLossError: loss or gradient is NaN or infinite; nothing has changed then.
        MemoryTooSmallError: the device cannot hold one scan's part of the step; nothing has changed then.
        ValueError: the views do not fit the model.
        """
        rank, views = rank_of_views(views), views.to(self.device, non_blocking=True)
        try:
            worked_out = self._work_out(views, rank, step, share)
        except torch.OutOfMemoryError:
            if self.team.size > 1 or not self._graphs.hold_memory:  # of a team's sum a part may have been taken already
                raise
            worked_out = None
        if worked_out is None:  # only here, for until now the error held on to the gradients
            self._graphs.make_room(self._tell)
            worked_out = self._work_out(views, rank, step, share)
        report, norms, loss, grads, apart = worked_out
        if not (math.isfinite(report.total) and math.isfinite(report.diagnostics["grad_norm"])):
            self._optimiser.drop_gradients()
            raise NonFiniteLossError(
                f"step {step}: loss {report.total}, gradient norm {report.diagnostics['grad_norm']}; step not taken"
            )
        self._move(rank, step, grads, norms, apart)
        for name, observed in loss.observed.items():
            moved = move_centre(self.centre[name], observed.bottleneck, self.study.objective.centre_momentum)
            self.centre[name].copy_(moved)
        self._watch.add(loss.observed)
        return report

    def _work_out(
        self, views: Tensor, rank: Rank, step: int, share: float
    ) -> tuple[StepReport, list[float], Loss, list[Tensor], list[GatheredGradient]]:
        """The report, and what `_move` takes; nothing has moved then, so it may be done again."""
        loss, apart = self._gather_in_parts_that_fit(views, rank, share)
        if step < self.study.optimiser.freeze_prototypes_steps:
            frozen = self.student.get_parameter(PROTOTYPES)
            frozen.grad, apart = None, [gradient for gradient in apart if gradient.weight is not frozen]
        self._sum_over_team(loss)
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        distance = self._proximal.pull_(self._parameters)
        norms_apart = [gradient.norm() for gradient in apart]
        report, norms = report_of(rank, loss, torch.stack([*torch._foreach_norm(grads), *norms_apart]), distance)
        return report, norms, loss, grads, apart

    def _move(
        self,
        rank: Rank,
        step: int,
        grads: Sequence[Tensor],
        norms: Sequence[float],
        apart: Sequence[GatheredGradient] = (),
    ) -> None:
        """Student and teacher, by the gradients that the parameters hold, and by those `apart` that they do not;
        `norms` are theirs, in this order."""
        limit = self.study.optimiser.clip_norm
        clip_each_(grads, norms[: len(grads)], limit)
        set_rates_(self._optimiser, self.study, step, rank)
        self._optimiser.step()
        self._optimiser.drop_gradients()
        for gradient, norm in zip(apart, norms[len(grads) :], strict=True):
            assert isinstance(self._optimiser, BlockwiseAdamW)
            scale = clip_scale(norm, limit)
            clipped = ((rows, block.mul_(scale)) for rows, block in gradient.blocks())
            self._optimiser.step_blocks(gradient.weight, clipped)
        self._move_teacher(rank, teacher_momentum(self.study, step))

    def state(self, *, weights: bool = False) -> LearnerState:
        """Optimiser moments and step counts, centre, and a local head; with `weights` student, teacher and the round's
        collapse figures, so that a round can be gone on with in its middle.

        Tensors share memory with the learner: save them before a step.
        """
        tensors = {f"centre.{name}": centre for name, centre in self.centre.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                tensors[f"{OPTIMISER_KEYS[key]}.{name}"] = value
        if not weights:
            tensors |= {f"own.{name}": tensor for name, tensor in self._own().items()}
            return LearnerState(tensors, {**self._identity(), "weights": False})
        watched, steps = self._watch.state()
        for prefix, more in (
            ("student", tensors_of(self.student)),
            ("teacher", {} if self.teacher is None else tensors_of(self.teacher)),
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
        centre = below("centre.", state.tensors)
        kept = kept_by(self.study.optimiser)
        moments = {key: below(f"{OPTIMISER_KEYS[key]}.", state.tensors) for key in kept}
        check_state(centre, self.centre, moments, self._parameters)
        own = below("own.", state.tensors)
        check_tensors(self.student, tensors_of(self.student) | own)
        if state.facts["weights"]:
            watched = {name: tensor.to(self.device) for name, tensor in below("watch.", state.tensors).items()}
            watch = RoundWatch.restored(watched, state.facts.get("watched_steps", {}))
            self.start_round(below("student.", state.tensors), below("teacher.", state.tensors))
            self._watch = watch
        if own:
            load_tensors_(self.student, tensors_of(self.student) | own)
        self.centre = {name: centre[name].to(self.device, copy=True) for name in self.centre}
        self._optimiser.state.clear()
        for name, parameter in self._parameters.items():
            if name in moments["step"]:
                self._optimiser.take_up(parameter, {key: tensors[name] for key, tensors in moments.items()})

    def most_scans(self, rank: Rank) -> int:
        """Scans of one rank that this process works out together, at most: its part of a batch."""
        return largest_part(self.team, self.study.batch.of(rank))

    def fits(self, rank: Rank, micro_batch: int) -> bool:
        """Whether the device's memory holds a step over its part of the study's batch, `micro_batch` scans at a time,
        by trial.

        Nothing changes: no weight, no state of this learner, no global random state.
        """
        before = dict(self.micro_batch)
        self.micro_batch[rank] = micro_batch
        self.release()
        self._set_up_blocks(compiled=False)  # or each trial would take minutes to compile
        try:
            with out_of_memory_by_its_name():
                self._rehearse(rank, 2 * micro_batch)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        finally:
            self.micro_batch = before
            self._set_up_blocks(compiled=self._compiled)
        self.release()
        return fits

    def release(self) -> None:
        """Give back what gradients and recorded steps hold of the device's memory; the next steps are recorded anew."""
        self._graphs.release()

    def _rehearse(self, rank: Rank, scans: int) -> None:
        """Gradients of random views, with room taken for all else that is there in a step: AdamW's moments, this
        process's part of the batch, of the next one and of what a recorded step reads, FedProx's copies, and of another
        rank's recorded step the gradients and what it reads.

        Two parts are enough, and needed: the second finds the first's gradients in memory.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        batch = torch.rand(self._shape_of_batch(rank), generator=generator, device=self.device)
        parameters = list(self._parameters.values())
        copied = [p for p in parameters if p not in self._optimiser.state] + parameters * (
            self.study.local.proximal > 0
        )
        room = [torch.empty_like(tensor) for tensor in (*copied, batch) for _ in range(2)]
        for other in set(self.ranks) - {rank} if self._graphs.on else ():
            room += [torch.empty_like(parameter) for parameter in parameters]
            room.append(torch.empty(self._shape_of_batch(other), device=self.device))
        self._gather_gradients(batch[:scans], rank, 1.0)
        del room

    def _shape_of_batch(self, rank: Rank) -> tuple[int, ...]:
        """Of the views that this process has of a step."""
        return (self.most_scans(rank), *shape_of_views(self.study, rank))

    def _gather_in_parts_that_fit(self, views: Tensor, rank: Rank, share: float) -> Gathered:
        """`_gather_gradients`, again in halved parts while memory runs out. Nothing but gradients has changed by then,
        so the repeated step is the same step. Later steps of this learner keep the smaller parts."""
        while True:
            try:
                return self._graphs.take(
                    rank,
                    partial(self._gather_gradients, rank=rank, share=share),
                    views,
                    launch=partial(self._gather_or_stop_compiling, rank=rank, share=share),
                    circumstances=(share, self.micro_batch.get(rank), *(c.data_ptr() for c in self.centre.values())),
                    tell=self._tell,
                )
            except torch.OutOfMemoryError:
                pass  # and leave this clause, for until then the error holds on to the activations
            if self._graphs.make_room(self._tell):
                continue
            self.release()
            before = min(self.micro_batch.get(rank, len(views)), len(views))
            if before == 1:
                raise MemoryTooSmallError(
                    f"a step on one {rank}D scan, views of shape {tuple(views[:1].shape)}, does not fit in the memory "
                    f"of {self.device}. In the site file set views_in_turn or, for more, activation_checkpointing to "
                    "true, free the device of other work or name another one; or take part in a study with a smaller "
                    "model or smaller views."
                )
            self.micro_batch[rank] = before // 2
            self._tell(f"out of memory: {rank}D batches are met in parts of {before // 2}, not {before} scans")

    def _gather_or_stop_compiling(self, views: Tensor, rank: Rank, share: float) -> Gathered:
        """`_gather_gradients`; where that fails and is compiled, again without, now and from then on."""
        try:
            return self._gather_gradients(views, rank, share)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if not self._compiled:
                raise
            told = " ".join(f"{type(error).__name__}: {error}".split("\n")[:2])  # the cause stands in the second
            self._tell(f"compilation failed, going on without it: {told[:300]}")
        self._set_up_blocks(compiled=False)
        self._compiled = False
        return self._gather_gradients(views, rank, share)

    def _gather_gradients(self, views: Tensor, rank: Rank, share: float) -> Gathered:
        """Forward and backward over this process's share of the batch, in parts where that is larger than a
        micro-batch: gradients and loss, without graph, weighed as in the whole batch."""
        self._optimiser.drop_gradients()
        parts = views.split(self.micro_batch.get(rank, len(views)))
        losses = []
        helped = compiling() if self._compiled else nullcontext()
        with self._memory.laid_out(parts), out_of_memory_by_its_name(), helped:
            # Around all parts, so that what autocast casts of the student's weights is cast once.
            with gathering(self.student) as gathered, self._autocast():
                for part in parts:
                    weight = share * len(part) / len(views)
                    for loss in self._losses_of(part):
                        with torch.autocast(self.device.type, enabled=False):
                            torch.autograd.backward(loss.total * weight)
                        losses.append((weight, loss.detached()))
            # A weight that met few rows in one pass and many in another holds a part: the two are one gradient.
            apart = [each for each in gathered if each.weight.grad is None and self._keeps_apart(each)]
            for gradient in gathered:
                if gradient not in apart:
                    gradient.write()
        return Gathered(weighted_sum(losses), apart)

    def _keeps_apart(self, gradient: GatheredGradient) -> bool:  # noqa: ARG002 - all alike here
        """Whether it never exists as a whole. It must where it is summed over a team or takes FedProx's pull; and does
        on a GPU, where many small steps cost more than the memory is worth."""
        if self.device.type == "cuda" or self.team.size > 1 or self._proximal.is_on:
            return False
        return isinstance(self._optimiser, BlockwiseAdamW)

    def _losses_of(self, views: Tensor) -> Iterator[Loss]:
        """views (B, V, C, *S) -> losses with graph that add up to theirs: one, or where memory is to be saved one for
        each thing that the student looks at, made when the one before is done with. Call it under `_autocast`."""
        if not (self.execution.in_pieces and isinstance(self.objective, PiecewiseObjective)):
            yield self._loss_of(views)
            return
        yield from self.objective.pieces(self.student, self.teacher, views, self.centre)

    def _loss_of(self, views: Tensor) -> Loss:
        """views (B, V, C, *S) -> their loss, with graph."""
        with self._autocast():
            return self.objective(self.student, self.teacher, views, self.centre)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.execution.precision == "bf16")

    def _sum_over_team(self, loss: Loss) -> None:
        """Gradients and `loss` of this process's share become those of the whole batch."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        self.team.sum_([*grads, *loss.tensors()])

    def _set_up_blocks(self, *, compiled: bool) -> None:
        for network in self._networks():
            recomputed = self.execution.activation_checkpointing and network is self.student
            set_up_blocks_(network.backbone, compiled=compiled, recomputed=recomputed)

    def _networks(self) -> list[Student]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def _own(self) -> dict[str, Tensor]:
        """What of the student stays here for ever, and no round brings."""
        return {name: tensor for name, tensor in tensors_of(self.student).items() if name in self._staying}

    @torch.no_grad()
    def _move_teacher(self, rank: Rank, momentum: float) -> None:
        names = self._followed[rank]
        if names:
            teachers: list[Tensor] = [self._of_teacher[name] for name in names]
            students: list[Tensor] = [self._parameters[name] for name in names]
            torch._foreach_lerp_(teachers, students, 1.0 - momentum)

    def _identity(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            "model": self.study.model.model_dump(mode="json"),
            "objective": self.study.objective.name if self.study.finetune is None else self.study.task,
            "ranks": list(self.ranks),
        }
