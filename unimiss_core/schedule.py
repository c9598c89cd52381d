"""What every step of a study uses: rates as pure functions of the study's global step.

Steps count from 0 over the whole study, rounds from 1: round r holds steps (r - 1) * local_steps up to, not
including, r * local_steps. Nothing here depends on a site's data, so nothing tells how much it holds.
"""

import math
from collections.abc import Collection

from unimiss_core.groups import GROUPS, Group, groups_of_ranks
from unimiss_core.scan import Rank
from unimiss_core.study import ScheduleConfig, StudyConfig


def total_steps(schedule: ScheduleConfig) -> int:
    """Optimiser steps of one site over the whole study."""
    return schedule.rounds * schedule.local_steps


def steps_of_round(schedule: ScheduleConfig, round_number: int) -> range:
    """The global steps of a round, which counts from 1."""
    return range((round_number - 1) * schedule.local_steps, round_number * schedule.local_steps)


def learning_rate(study: StudyConfig, step: int) -> float:
    """Linear warm-up from lr / warmup_steps to lr, then cosine to final_lr, which the last step uses."""
    rate = study.optimiser
    if step < rate.warmup_steps:
        return rate.lr * (step + 1) / rate.warmup_steps
    return _cosine(rate.lr, rate.final_lr, step - rate.warmup_steps, total_steps(study.schedule) - rate.warmup_steps)


def weight_decay(study: StudyConfig, step: int) -> float:
    """Cosine from the first to the second value of `optimiser.weight_decay`."""
    return _cosine(*study.optimiser.weight_decay, step, total_steps(study.schedule))


def teacher_momentum(study: StudyConfig, step: int) -> float:
    """Cosine from the first to the second value of `objective.teacher_momentum`. In fine-tuning, which has no teacher,
    0: what stands in its place is the student."""
    if study.finetune is not None:
        return 0.0
    return _cosine(*study.objective.teacher_momentum, step, total_steps(study.schedule))


def rank_of_step(ranks: Collection[Rank], step: int, alternate: tuple[int, int]) -> Rank:
    """The rank that a site with scans of `ranks` trains in this step.

    A site with one rank always takes it; a site with both takes `alternate[0]` 2D steps, then `alternate[1]` 3D
    steps, and so on, from the study's first step. Raises ValueError: no rank.
    """
    if not ranks:
        raise ValueError("a site without scans has no steps")
    if len(set(ranks)) == 1:
        return next(iter(ranks))
    return 2 if step % sum(alternate) < alternate[0] else 3


def steps_of_rank(rank: Rank, ranks: Collection[Rank], schedule: ScheduleConfig, rounds: range) -> int:
    """How many steps of these rounds, which follow each other, `rank_of_step` gives to `rank`; counted without going
    through them."""
    steps = len(rounds) * schedule.local_steps
    if len(set(ranks)) == 1:
        return steps if rank in ranks else 0
    start, first, period = (rounds.start - 1) * schedule.local_steps, schedule.alternate[0], sum(schedule.alternate)

    def images_before(step: int) -> int:
        return step // period * first + min(step % period, first)

    images = images_before(start + steps) - images_before(start)
    return images if rank == 2 else steps - images


def untaught(study: StudyConfig) -> str | None:
    """Says that a site with both ranks trains no volume in the whole study, for its turns of images are as long; None
    where it does, or where the study is of one rank."""
    schedule = study.schedule
    if len(study.ranks) == 1 or steps_of_rank(3, study.ranks, schedule, range(1, schedule.rounds + 1)):
        return None
    return (
        f"schedule.alternate begins with {schedule.alternate[0]} steps on images, and the study has "
        f"{total_steps(schedule)}: a site with both trains no volume; give a shorter turn"
    )


def trained_steps(ranks: Collection[Rank], schedule: ScheduleConfig, round_number: int) -> dict[Group, int]:
    """How many steps of the round train each group, at a site with scans of `ranks`; 0 for an untouched group."""
    trained = _groups_by_step(ranks, schedule, round_number)
    return {group: sum(group in groups for groups in trained.values()) for group in GROUPS}


def teacher_retention(study: StudyConfig, ranks: Collection[Rank], round_number: int) -> dict[Group, float]:
    """What is left of each group's teacher after the round at such a site: the product m of its steps' momenta.

    An EMA moves only what its step trained; an untouched group keeps 1. With the student's values S after the round,
    the coordinator takes m * T + (1 - m) * S for the global teacher: what the EMA of a student standing at S gives.
    """
    trained = _groups_by_step(ranks, study.schedule, round_number)
    return {
        group: math.prod(teacher_momentum(study, step) for step, groups in trained.items() if group in groups)
        for group in GROUPS
    }


def _groups_by_step(
    ranks: Collection[Rank], schedule: ScheduleConfig, round_number: int
) -> dict[int, frozenset[Group]]:
    return {
        step: groups_of_ranks({rank_of_step(ranks, step, schedule.alternate)})
        for step in steps_of_round(schedule, round_number)
    }


def _cosine(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps - 1`, half a cosine; `end` from there on."""
    progress = min(1.0, step / (steps - 1)) if steps > 1 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
