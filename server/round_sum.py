"""From the updates of a round to the next global student and teacher."""

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from server.aggregation import Aggregate, group_norm, group_weights
from server.global_state import GlobalState
from server.optimisers import build_optimiser
from server.site_level import public_retention
from unimiss_core.codec import Layout
from unimiss_core.groups import GROUPS, Group, group_of, groups_of_ranks
from unimiss_core.scan import RANKS, Rank
from unimiss_core.schedule import teacher_retention, trained_steps
from unimiss_core.study import StudyConfig
from unimiss_core.teacher import advance_teacher
from unimiss_core.wire import TrainReply


def layout_for(ranks: frozenset[Rank], layout: Layout) -> Layout:
    """The part of a network's layout that a site with scans of `ranks` receives and sends."""
    return {group: specs for group, specs in layout.items() if group in groups_of_ranks(ranks)}


class RoundSum:
    """The admitted updates of one round, folded in as they arrive.

    aggregate: the study's rule, to which nothing was given yet.
    """

    def __init__(self, study: StudyConfig, aggregate: Aggregate) -> None:
        self._study = study
        self._aggregate = aggregate
        self._optimiser = build_optimiser(study.aggregation.server_optimiser)
        self._retention = _MeanRetention()

    def fold(self, answer: TrainReply, *, share: float = 1.0) -> None:
        """Add one site's update, by what the site trained of each group in its round.

        share: of its weight; less than 1 for an update that comes late.
        """
        study = self._study
        ranks = frozenset(rank for rank in RANKS if answer.scans[rank] > 0)
        trained = trained_steps(ranks, study.schedule, answer.round)
        held = {group_of(name) for name in answer.update}
        groups = [group for group, steps in trained.items() if steps > 0 and group in held]
        whole = group_weights(answer.scans, groups, study.aggregation.weighting)
        weights = {group: share * weight for group, weight in whole.items()}
        self._aggregate.fold(answer.update, weights)
        self._retention.fold(weights, teacher_retention(study, ranks, answer.round))

    def applied_to(self, state: GlobalState, round: int) -> tuple[GlobalState, dict[Group, float]]:
        """(state after the round, norm of what was added to each group of the student). Groups that nobody trained keep
        their bits, but under site-level privacy, whose noise is on all that the study trains."""
        step, optimiser = self._optimiser.step(self._aggregate.result(), state.optimiser)
        layout = state.release.layout
        update_norm = {group: group_norm(step, specs) for group, specs in layout.items()}
        # In the memory of what is added, which nobody else holds: fresh pages take longer than the addition.
        student = {name: step[name].add_(tensor) if name in step else tensor for name, tensor in state.student.items()}
        release, left = state.release.after(student), self._left_of_teacher(round)
        teacher: dict[str, Tensor] = {}
        for group, specs in layout.items():
            before = {spec.name: state.teacher[spec.name] for spec in specs}
            teacher |= advance_teacher(before, release.seen(group), dict.fromkeys(before, left[group]))
        after = replace(state, round=round, release=release, teacher=teacher, retention=left, optimiser=optimiser)
        return after, update_norm

    def _left_of_teacher(self, round: int) -> dict[Group, float]:
        """Sites are told it, so where any one of them is to be hidden it hangs on none."""
        if self._study.privacy.mode == "site":
            return public_retention(self._study, round)
        return self._retention.result()


class _MeanRetention:
    """What is left of the global teacher in a round: per group the weighted mean over the sites' steps.

    Site i's teacher ends a round at m_i T + (1 - m_i) S, so the mean of the sites' teachers has m = mean of m_i.
    The order of the sites does not matter, not even to the last bit.
    """

    def __init__(self) -> None:
        self._seen: dict[Group, list[tuple[float, float]]] = {group: [] for group in GROUPS}
        """(weight, m) of each site."""

    def fold(self, weights: Mapping[Group, float], retention: Mapping[Group, float]) -> None:
        for group, weight in weights.items():
            self._seen[group].append((weight, retention[group]))

    def result(self) -> dict[Group, float]:
        """1 - the teacher stays - for a group that nobody trained."""
        return {group: self._mean(group) for group in GROUPS}

    def _mean(self, group: Group) -> float:
        total = math.fsum(weight for weight, _ in self._seen[group])
        return math.fsum(weight * kept for weight, kept in self._seen[group]) / total if total > 0 else 1.0
